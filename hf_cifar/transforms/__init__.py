"""Transforms for batches of pixels, on the model's device."""

from __future__ import annotations

# Weights of red, green and blue in brightness: ITU-R 601-2, as in Pillow's conversion to "L".
LUMA = (0.299, 0.587, 0.114)

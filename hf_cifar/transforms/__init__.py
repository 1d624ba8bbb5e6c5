"""Transforms of a batch of pixels, on the device where the model runs."""

from __future__ import annotations

# What red, green and blue add to brightness: ITU-R 601-2, as Pillow's conversion to "L" has it.
LUMA = (0.299, 0.587, 0.114)

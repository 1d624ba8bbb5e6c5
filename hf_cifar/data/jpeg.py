"""Decode JPEG files with simplejpeg: Pillow's pixels, from the same C library, in less time."""

from __future__ import annotations

import numpy as np
import simplejpeg


def decode_jpeg(data: bytes) -> np.ndarray | None:
    """Decode a JPEG file of grey or RGB pixels to [H, W, 3] uint8, not turned.

    Returns None for a damaged file, and for other colours: those are left to Pillow.
    """
    try:
        return simplejpeg.decode_jpeg(data)
    except ValueError:
        return None

"""Image properties used to slice an evaluation."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from hf_cifar.transforms import LUMA

Array = np.ndarray


def image_properties(images: Array | Iterable[Array]) -> dict[str, Array]:
    """Measure brightness, contrast and sharpness [N] of images, uint8 [N, H, W, 3] or of any sizes.

    brightness: mean, 0..1. contrast: standard deviation of brightness, 0..0.5. sharpness: mean absolute
    Laplacian of brightness, as a share of the contrast; 0 for a uniform image.
    """
    rows = [_properties(image @ np.array(LUMA, np.float32) / 255) for image in images]
    return dict(zip(("brightness", "contrast", "sharpness"), np.array(rows).T, strict=True))


def _properties(grey: Array) -> tuple[float, float, float]:
    contrast = float(grey.std())
    if min(grey.shape) < 3 or contrast < 1e-6:
        return float(grey.mean()), contrast, 0.0
    inner = grey[1:-1, 1:-1]
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * inner
    return float(grey.mean()), contrast, float(np.abs(laplacian).mean()) / contrast

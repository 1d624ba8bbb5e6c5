"""Bit-exact batched versions of Pillow's and torchvision's resizing of uint8 images, as used by image
processors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from hf_cifar.transforms.resampling import Taps, along_width

# From version 13, Pillow resizes vertically first if the height loses more than twice as many pixels as the
# width (`ImagingResampleInner` in src/libImaging/Resample.c).
PILLOW_MAY_START_VERTICALLY = int(PIL.__version__.split(".")[0]) >= 13


def resize_exactly(
    images: Tensor,
    box: Tensor,
    size: tuple[int, int],
    interpolation: str = "bicubic",
    library: str = "pillow",
) -> Tensor:
    """Resize like `resample` with one box for all images, bit-identical to "pillow" or "torchvision".

    images [N, C, H, W] uint8; box [1, 4] as for `resample`. Returns float [N, C, h, w], whole numbers 0..255.
    """
    (height, width), (out_height, out_width) = images.shape[-2:], size
    top, left, bottom, right = box.to("cpu", torch.float64).unbind(dim=1)
    # The size to which the whole image is resized, before the crop to `size`.
    whole_height = round(out_height * height / (bottom - top).item())
    whole_width = round(out_width * width / (right - left).item())

    def taps(start: Tensor, stop: Tensor, side: int, out_size: int, whole_size: int) -> FixedPoint:
        bits = _fraction_bits(library, side, whole_size, interpolation)
        return FixedPoint.of(Taps.of(start, stop, side, out_size, interpolation), bits)

    rows = taps(top, bottom, height, out_height, whole_height)
    columns = taps(left, right, width, out_width, whole_width)
    shrinks_most = height - whole_height > max(0, 2 * (width - whole_width))
    if shrinks_most and library == "pillow" and PILLOW_MAY_START_VERTICALLY:
        return along_width(rows(images.to(torch.float32)), columns)
    return rows(along_width(images, columns))


def by_pillow(image: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """Resize an image [H, W, 3] uint8 to (height, width) with Pillow."""
    mode = Image.Resampling[interpolation.upper()]
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), mode))


def by_torch(image: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """Resize an image [H, W, 3] uint8 to (height, width) with torch, as torchvision does."""
    # torch warns about read-only arrays.
    writable = image if image.flags.writeable else image.copy()
    pixels = torch.from_numpy(writable).permute(2, 0, 1)[None]
    resized = F.interpolate(pixels, size, mode=interpolation, antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


# How each library resizes one image, for the filters that it has.
LIBRARIES = {
    **{("pillow", name): by_pillow for name in ("bicubic", "bilinear", "box", "lanczos")},
    **{("torchvision", name): by_torch for name in ("bicubic", "bilinear")},
}


def _fraction_bits(library: str, side: int, whole_size: int, interpolation: str) -> int:
    """Number of fractional bits of a library's weights when it resizes uint8.

    Sources: Pillow, src/libImaging/Resample.c (`PRECISION_BITS`); torch, aten/src/ATen/native/cpu/
    UpSampleKernel.cpp, where the largest weight must fit in 16 bits.
    """
    if library == "pillow":
        return 22
    line = torch.zeros(1, dtype=torch.float64), torch.full((1,), side, dtype=torch.float64)
    largest = Taps.of(*line, side, whole_size, interpolation).weights.max().item()
    return max(bits for bits in range(23) if int(largest * 2**bits + 0.5) < 2**15)


@dataclass(frozen=True, eq=False)
class FixedPoint:
    """Taps with fixed-point weights, in two parts, so that float32 sums each over integer pixels exactly.

    Guaranteed for up to 64 taps (bicubic, shrinking by 16), and true beyond that in practice.
    """

    coarse: Taps
    rest: Taps

    @classmethod
    def of(cls, taps: Taps, bits: int) -> FixedPoint:
        """Round the weights of float64 taps to `bits` fractional bits, halves away from zero."""
        fine = taps.weights.sign() * (taps.weights.abs() * 2**bits + 0.5).floor()
        low = 2 ** max(0, bits - 11)
        coarse = (fine / low).round() * low
        parts = ((part / 2**bits).to(torch.float32) for part in (coarse, fine - coarse))
        return cls(*(replace(taps, weights=part) for part in parts))

    def __call__(self, lines: Tensor) -> Tensor:
        """Resample like `Taps.__call__`, rounded half up to whole numbers 0..255."""
        found, rest = (
            Taps(
                taps.index.to(lines.device, non_blocking=True),
                taps.weights.to(lines.device, non_blocking=True),
                taps.in_size,
            )(lines)
            for taps in (self.coarse, self.rest)
        )
        whole = found.add_(0.5).floor()
        return whole.add_(found.sub_(whole).add_(rest).floor_()).clamp_(0, 255)

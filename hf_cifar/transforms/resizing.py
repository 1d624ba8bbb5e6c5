"""Resizing of uint8 images, to the bit as Pillow or torchvision does it: a model sees in a batch what its
image processor shows it one by one."""

from __future__ import annotations

from typing import NamedTuple

import PIL
import torch
from torch import Tensor

from hf_cifar.transforms.resampling import Taps, along_width

# Since 13, Pillow begins with the height where that shrinks by more than twice as many pixels as the width
# (`ImagingResampleInner` in src/libImaging/Resample.c).
PILLOW_BEGINS_WITH_HEIGHT = int(PIL.__version__.split(".")[0]) >= 13


def resize_exactly(
    images: Tensor,
    box: Tensor,
    size: tuple[int, int],
    interpolation: str = "bicubic",
    library: str = "pillow",
) -> Tensor:
    """As `resample` with one box for all, and to the bit what "pillow" or "torchvision" makes of each image.

    images [N, C, H, W] uint8; box [1, 4] as for `resample`. Returns float [N, C, h, w], whole numbers 0..255.
    """
    (height, width), (out_height, out_width) = images.shape[-2:], size
    top, left, bottom, right = box.to("cpu", torch.float64).unbind(dim=1)
    # The size that the whole image is brought to, of which `size` is a part.
    whole_height = round(out_height * height / (bottom - top).item())
    whole_width = round(out_width * width / (right - left).item())

    def taps(start: Tensor, stop: Tensor, side: int, out_size: int, whole_size: int) -> FixedPoint:
        bits = _fraction_bits(library, side, whole_size, interpolation)
        return FixedPoint.of(Taps.of(start, stop, side, out_size, interpolation), bits)

    rows = taps(top, bottom, height, out_height, whole_height)
    columns = taps(left, right, width, out_width, whole_width)
    shrinks_most = height - whole_height > max(0, 2 * (width - whole_width))
    if shrinks_most and library == "pillow" and PILLOW_BEGINS_WITH_HEIGHT:
        return along_width(rows(images.to(torch.float32)), columns)
    return rows(along_width(images, columns))


def _fraction_bits(library: str, side: int, whole_size: int, interpolation: str) -> int:
    """How many bits behind the point a library's weights have when it resizes uint8.

    Sources: Pillow, src/libImaging/Resample.c (`PRECISION_BITS`); torch, aten/src/ATen/native/cpu/
    UpSampleKernel.cpp, where the largest weight has to fit in 16 bits.
    """
    if library == "pillow":
        return 22
    line = torch.zeros(1, dtype=torch.float64), torch.full((1,), side, dtype=torch.float64)
    largest = Taps.of(*line, side, whole_size, interpolation).weights.max().item()
    return max(bits for bits in range(23) if int(largest * 2**bits + 0.5) < 2**15)


class FixedPoint(NamedTuple):
    """Taps whose weights are whole multiples of a power of 2, in two parts, so that float32 holds the sum of
    either, of whole pixels, exactly: surely for 64 taps, a bicubic shrinking by 16, and in practice beyond.
    """

    coarse: Taps
    rest: Taps

    @classmethod
    def of(cls, taps: Taps, bits: int) -> FixedPoint:
        """Of taps in float64: weights with so many bits behind the point, halves away from zero."""
        fine = taps.weights.sign() * (taps.weights.abs() * 2**bits + 0.5).floor()
        low = 2 ** max(0, bits - 11)
        coarse = (fine / low).round() * low
        parts = ((part / 2**bits).to(torch.float32) for part in (coarse, fine - coarse))
        return cls(*(taps._replace(weights=part) for part in parts))

    def __call__(self, lines: Tensor) -> Tensor:
        """As `Taps.__call__`, to whole numbers 0..255; a half goes up."""
        found, rest = (
            Taps(
                taps.index.to(lines.device, non_blocking=True),
                taps.weights.to(lines.device, non_blocking=True),
                taps.in_size,
            )(lines)
            for taps in self
        )
        whole = found.add_(0.5).floor()
        return whole.add_(found.sub_(whole).add_(rest).floor_()).clamp_(0, 255)

"""Geometry of batches on device tensors, and their normalisation.

Crop, flip, scale and resize are one separable resampling, `out = Wy @ image @ Wx'`, with one pair of
sparse interpolation matrices per sample. Evaluation does the same with one fixed box (see resizing.py).

Shapes: N images, C channels, H x W pixels in, h x w pixels out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def _bicubic(x: Tensor) -> Tensor:
    """Keys' cubic kernel with a = -0.5, as in Pillow (torch uses -0.75)."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def _bilinear(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp_min(0)


def _box(x: Tensor) -> Tensor:
    return ((x > -0.5) & (x <= 0.5)).to(x.dtype)


def _lanczos(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 3, torch.sinc(x) * torch.sinc(x / 3), torch.zeros_like(x))


KERNELS = {
    "bicubic": (_bicubic, 2.0),
    "bilinear": (_bilinear, 1.0),
    "box": (_box, 0.5),
    "lanczos": (_lanczos, 3.0),
}


class Levels(NamedTuple):
    """Per-channel map from pixels 0..255 to model inputs, value * scale + shift; both [C], scale > 0."""

    scale: Tensor
    shift: Tensor

    @classmethod
    def normalizing(cls, mean: Tensor, std: Tensor, rescale_factor: float = 1 / 255) -> Levels:
        """Map values to (value * rescale_factor - mean) / std; mean and std are [C]."""
        return cls(rescale_factor / std, -mean / std)

    def __call__(self, images: Tensor) -> Tensor:
        """Map images [N, C, H, W] to float of the same shape."""
        shape = (1, -1, 1, 1)
        return (images.to(torch.float32) * self.scale.view(shape)).add_(self.shift.view(shape))


@dataclass(frozen=True, eq=False)
class Taps:
    """Input pixels and weights for each output pixel of a resampled line.

    index: int64 [N, out_size, T], 0..in_size - 1; weights: [N, out_size, T], which sum to 1 over T.
    """

    index: Tensor
    weights: Tensor
    in_size: int

    @classmethod
    def of(
        cls,
        start: Tensor,
        stop: Tensor,
        in_size: int,
        out_size: int,
        interpolation: str = "bicubic",
        device: torch.device | None = None,
    ) -> Taps:
        """Compute the taps that resample the interval [start, stop) of a line of pixels.

        `start` and `stop` [N] are in input pixels; `stop < start` mirrors. When the interval shrinks, the
        kernel widens to avoid aliasing. Inside the image the weights are Pillow's: taps outside it are
        dropped and the rest renormalised. Samples outside the image are mirrored back in.
        device: of the result; default: that of `start`.

        Source: Pillow, src/libImaging/Resample.c (`precompute_coeffs`).
        """
        kernel, support = KERNELS[interpolation]
        # Read before the copy, so that boxes drawn on the CPU need no synchronization with the GPU.
        widest = max(1.0, float((stop - start).abs().max()) / out_size)
        num_taps = math.ceil(2 * support * widest) + 1
        start, stop = start.to(device, non_blocking=True), stop.to(device, non_blocking=True)
        scale = (stop - start) / out_size
        steps = torch.arange(out_size, dtype=start.dtype, device=start.device) + 0.5
        centers = start[:, None] + steps * scale[:, None]
        period = 2.0 * in_size
        centers = centers.remainder(period)
        centers = torch.where(centers > in_size, period - centers, centers)[:, :, None]

        stretch = scale.abs().clamp_min(1.0)[:, None, None]
        # Pillow gives weight only to pixels whose centre rounds into the support.
        reach = support * stretch
        first = (centers - reach + 0.5).floor()
        last = (centers + reach + 0.5).floor()
        index = first + torch.arange(num_taps, dtype=start.dtype, device=start.device)
        taps = (index < last) & (index >= 0) & (index < in_size)
        weights = torch.where(taps, kernel((index + 0.5 - centers) / stretch), 0.0)
        weights /= weights.sum(dim=-1, keepdim=True)
        return cls(index.clamp_(0, in_size - 1).to(torch.int64), weights, in_size)

    def halves(self) -> tuple[Taps, Taps]:
        """Split into the taps of the first N / 2 lines and those of the rest."""
        indices, weights = self.index.chunk(2), self.weights.chunk(2)
        first, rest = (Taps(*half, self.in_size) for half in zip(indices, weights, strict=True))
        return first, rest

    @property
    def matrix(self) -> Tensor:
        """The taps as a mostly zero matrix [N, out_size, in_size]."""
        matrix = self.weights.new_zeros((*self.weights.shape[:2], self.in_size))
        return matrix.scatter_add_(2, self.index, self.weights)

    def __call__(self, lines: Tensor) -> Tensor:
        """Resample the second to last axis: [N, ..., in_size, L] float -> [N, ..., out_size, L]."""
        *images, _, length = lines.shape
        if lines.device.type != "cpu":
            matrix = self.matrix
            return matrix.view(len(matrix), *[1] * len(images[1:]), *matrix.shape[1:]) @ lines
        # The same product as a sum of table rows, without the zeros that take most of the time on a CPU.
        num_planes = math.prod(images)
        each = num_planes // len(self.index)
        starts = torch.arange(num_planes).view(-1, each, 1, 1) * self.in_size
        bags = (self.index[:, None] + starts).flatten(0, 2)
        weights = self.weights[:, None].expand(-1, each, -1, -1).flatten(0, 2)
        table = lines.reshape(-1, length)
        out = F.embedding_bag(bags, table, mode="sum", per_sample_weights=weights)
        return out.view(*images, -1, length)


def resample(
    images: Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    interpolation: str = "bicubic",
    levels: Levels | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Crop a box from every image and resize it to `size` in one pass.

    images [N, C, H, W] uint8 or float, values 0 to 255; boxes [N, 4] or [1, 4] as (top, left, bottom,
    right) in pixels, right < left flips. Returns float [N, C, h, w], clamped to 0..255 and then mapped by
    `levels`, in the requested memory format; neither costs an extra pass.
    """
    (height, width), (out_height, out_width) = images.shape[-2:], size
    device = images.device
    top, left, bottom, right = boxes.to(torch.float32).unbind(dim=1)
    if (height, out_height) == (width, out_width):
        # Both directions at once need half as many operations.
        start, stop = torch.cat((top, left)), torch.cat((bottom, right))
        rows, columns = Taps.of(start, stop, height, out_height, interpolation, device).halves()
    else:
        rows = Taps.of(top, bottom, height, out_height, interpolation, device)
        columns = Taps.of(left, right, width, out_width, interpolation, device)
    # Clamp between the passes, as Pillow does; a cubic kernel overshoots in each.
    pixels = along_width(images, columns).clamp_(0, 255)
    limits: Any = (0.0, 255.0)  # or two tensors
    if levels is not None:
        # Weights sum to 1, so the levels can be applied here, where there are fewer pixels.
        pixels = levels(pixels)
        ends = torch.tensor([0.0, 255.0]).to(device, non_blocking=True).view(2, 1, 1, 1)
        limits = levels(ends.expand(2, images.shape[1], 1, out_width))
    if memory_format == torch.channels_last:
        if levels is not None:
            limits = limits.permute(0, 2, 3, 1).flatten(2)
        out = rows(pixels.permute(0, 2, 3, 1).flatten(2)).clamp_(*limits)
        return out.unflatten(2, (out_width, -1)).permute(0, 3, 1, 2)
    return rows(pixels).clamp_(*limits)


def along_width(images: Tensor, columns: Callable[[Tensor], Tensor]) -> Tensor:
    """Resample the rows of images: [N, C, H, W] -> float [N, C, H, w]."""
    lines = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return columns(lines.flatten(2)).unflatten(2, lines.shape[2:]).permute(0, 2, 3, 1)


def affine_sample(images: Tensor, boxes: Tensor, linear: Tensor, size: tuple[int, int]) -> Tensor:
    """Resample like `resample`, with the content of each box rotated or sheared about its centre.

    images [N, C, H, W]; boxes [N, 4]; linear [N, 2, 2] maps an offset (y, x) from the centre of the box, in
    input pixels, to the offset that is sampled there: see `rotation` and `shear`. The image continues as its
    mirror image outside. Returns float [N, C, h, w], 0..255.
    """
    height, width = images.shape[-2:]
    top, left, bottom, right = boxes.to(images.device, torch.float32, non_blocking=True).unbind(
        dim=1
    )
    linear = linear.to(images.device, torch.float32, non_blocking=True)[..., None, None]
    # grid_sample does not average: shrink first if it would skip pixels.
    ratio = min(height / size[0], width / size[1])
    pixels = images.to(torch.float32)
    if ratio > 1:
        shrunk = (math.ceil(height / ratio), math.ceil(width / ratio))
        pixels = resample(images, whole_image(height, width), shrunk)
    # Output pixels as offsets from the centre of the box, in input pixels (else a rotation would shear) ...
    y = torch.linspace(-1 + 1 / size[0], 1 - 1 / size[0], size[0], device=images.device)
    x = torch.linspace(-1 + 1 / size[1], 1 - 1 / size[1], size[1], device=images.device)
    dy = y[None, :, None] * ((bottom - top) / 2)[:, None, None]
    dx = x[None, None, :] * ((right - left) / 2)[:, None, None]
    rows = ((top + bottom) / 2)[:, None, None] + linear[:, 0, 0] * dy + linear[:, 0, 1] * dx
    columns = ((left + right) / 2)[:, None, None] + linear[:, 1, 0] * dy + linear[:, 1, 1] * dx
    # ... and then in the grid's units, where the image spans -1..1.
    grid = torch.stack((columns * (2 / width) - 1, rows * (2 / height) - 1), dim=-1)
    out = F.grid_sample(
        pixels, grid, mode="bicubic", padding_mode="reflection", align_corners=False
    )
    return out.clamp_(0, 255)


def rotation(angles: Tensor) -> Tensor:
    """Maps [N, 2, 2] for `affine_sample` that rotate by [N] radians, counter-clockwise on the screen."""
    sin, cos = angles.sin(), angles.cos()
    return torch.stack((torch.stack((cos, sin), -1), torch.stack((-sin, cos), -1)), dim=-2)


def shear(y: Tensor, x: Tensor) -> Tensor:
    """Maps [N, 2, 2] for `affine_sample` that shift pixels down per column (y) and right per row (x)."""
    one = torch.ones_like(y)
    return torch.stack((torch.stack((one, -y), -1), torch.stack((-x, one), -1)), dim=-2)


def whole_image(height: int, width: int) -> Tensor:
    """The box [1, 4] of a whole image."""
    return torch.tensor([[0.0, 0.0, height, width]])

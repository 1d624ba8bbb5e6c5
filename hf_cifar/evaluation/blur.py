"""Blur of CIFAR-10-C: defocus, glass, motion and zoom.

Images are float [N, C, H, W] from 0 to 1. Lengths are for 32 px, and are multiplied by `scale_of` the images.
Beyond the edges, the outermost pixels are repeated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from hf_cifar.evaluation.noise import draw, uniform


def scale_of(images: Tensor) -> float:
    """Return the shorter side of images, relative to CIFAR-10's 32 px."""
    return min(images.shape[-2:]) / 32


def gaussian_filter(images: Tensor, sigma: float, reach: int | None = None) -> Tensor:
    """Blur with a Gaussian. reach: pixels to each side; default: 4 sigma, rounded."""
    reach = round(4 * sigma) if reach is None else reach
    if reach == 0:
        return images
    steps = torch.arange(-reach, reach + 1, device=images.device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (steps / sigma) ** 2)
    channels = images.shape[1]
    kernel = (kernel / kernel.sum()).expand(channels, 1, 1, -1)
    padded = F.pad(images, [reach] * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel, groups=channels), kernel.mT, groups=channels)


def defocus_blur(images: Tensor, severity: int, generators: Sequence[Generator]) -> Tensor:
    """Average over a disk, smoothed by a Gaussian of 3 x 3 px (for 32 px)."""
    scale = scale_of(images)
    radius, sigma = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))[severity - 1]
    radius, sigma = radius * scale, sigma * scale
    reach = int(radius)
    steps = torch.arange(-reach, reach + 1, device=images.device)
    disk = (steps**2 + steps[:, None] ** 2 <= radius**2).to(images.dtype)
    kernel = (disk / disk.sum()).expand(images.shape[1], 1, -1, -1)
    padded = F.pad(images, [reach] * 4, mode="replicate")
    averaged = F.conv2d(padded, kernel, groups=images.shape[1])
    return gaussian_filter(averaged, sigma, max(1, round(scale)))


def glass_blur(images: Tensor, severity: int, generators: Sequence[Generator]) -> Tensor:
    """Blur, exchange pixels with random neighbours, and blur again.

    Each pixel takes the value of one that is up to `delta` px above or to the left, or fewer below or to the
    right. The published code means to swap two pixels, but does this.
    """
    sigma, delta, rounds = (
        (0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)
    )[severity - 1]  # fmt: skip
    scale = scale_of(images)
    sigma, delta = sigma * scale, max(1, round(delta * scale))
    height, width = images.shape[-2:]
    number = torch.arange(len(images), device=images.device).view(-1, 1, 1)
    images = gaussian_filter(images, sigma)
    for _ in range(rounds):
        shift = draw(torch.rand, generators, (2, height, width), images.device)
        down, right = (shift * 2 * delta).floor().long().unbind(dim=1)
        rows = (torch.arange(height, device=images.device)[:, None] + down - delta).clamp(
            0, height - 1
        )
        columns = (torch.arange(width, device=images.device) + right - delta).clamp(0, width - 1)
        images = images[number, :, rows, columns].permute(0, 3, 1, 2)
    return gaussian_filter(images, sigma)


def smear(images: Tensor, radius: float, sigma: float, degrees: Tensor) -> Tensor:
    """Blur along a line to one side of each pixel, as ImageMagick's motion blur does.

    radius: half the length of the line; sigma: of the weights along it; degrees [N]: clockwise from right.
    """
    length = min(2 * math.ceil(radius), math.ceil(4 * sigma))
    steps = torch.arange(length + 1)
    weights = torch.exp(-0.5 * (steps / sigma) ** 2)
    weights = (weights / weights.sum()).tolist()
    angles = torch.deg2rad(degrees)[:, None]
    downs = length + (steps * angles.sin()).round().long()
    rights = length + (steps * angles.cos()).round().long()
    height, width = images.shape[-2:]
    padded = F.pad(images, [length] * 4, mode="replicate")
    smeared = torch.zeros_like(images)
    for image, source, *places in zip(
        smeared, padded, downs.tolist(), rights.tolist(), strict=True
    ):
        for weight, down, right in zip(weights, *places, strict=True):
            image.add_(source[:, down : down + height, right : right + width], alpha=weight)
    return smeared


def motion_blur(images: Tensor, severity: int, generators: Sequence[Generator]) -> Tensor:
    """Blur along a line within 45 degrees of the horizontal."""
    radius, sigma = ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))[severity - 1]
    scale = scale_of(images)
    return smear(images, radius * scale, sigma * scale, uniform(-45, 45, generators, ()))


def enlarge(images: Tensor, factor: float) -> Tensor:
    """Enlarge images about their centre, bilinearly, and crop them to their size."""
    matrix = torch.eye(2, 3, device=images.device) / factor
    grid = F.affine_grid(matrix.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def zoom_blur(images: Tensor, severity: int, generators: Sequence[Generator]) -> Tensor:
    """Average over the image and enlarged copies of it, in steps of 1%."""
    largest = (6, 11, 15, 20, 25)[severity - 1]
    total = images.clone()
    for percent in range(largest + 1):
        total += enlarge(images, 1 + percent / 100)
    return total / (largest + 2)

"""Colour operations on batches of images, with one strength per image.

Images are float [N, 3, H, W] with values 0..255, in and out; strengths are [N]. The operations are Pillow's
(`ImageEnhance`, `ImageOps`), on tensors of any device and without intermediate rounding.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_cifar.transforms import LUMA


def _per_image(strength: Tensor, images: Tensor) -> Tensor:
    return strength.to(images.device, images.dtype, non_blocking=True).view(-1, 1, 1, 1)


def blend(images: Tensor, others: Tensor | float, factor: Tensor) -> Tensor:
    """Interpolate from `others` (factor 0) to `images` (factor 1); extrapolate outside 0..1."""
    factor = _per_image(factor, images)
    return (images * factor + others * (1 - factor)).clamp_(0, 255)


def luma(images: Tensor) -> Tensor:
    """Grey value [N, 1, H, W] of each pixel."""
    weights = (
        torch.tensor(LUMA, dtype=images.dtype).to(images.device, non_blocking=True).view(1, 3, 1, 1)
    )
    return (images * weights).sum(dim=1, keepdim=True)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Scale brightness; black at factor 0."""
    return blend(images, 0.0, factor)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Scale contrast; the image's mean grey at factor 0."""
    return blend(images, luma(images).mean(dim=(1, 2, 3), keepdim=True).round_(), factor)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Scale saturation; greyscale at factor 0."""
    return blend(images, luma(images), factor)


def hue(images: Tensor, turn: Tensor) -> Tensor:
    """Rotate hues by `turn` of the colour circle (-0.5..0.5) at constant luma.

    This rotates the chroma plane of YIQ, one 3 x 3 matrix per image; HSV would need a branch per pixel.
    """
    to_yiq = torch.tensor([LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])
    angle = 2 * math.pi * turn.to("cpu", torch.float32)
    rotation = torch.eye(3).repeat(len(angle), 1, 1)
    rotation[:, 1, 1] = rotation[:, 2, 2] = angle.cos()
    rotation[:, 1, 2], rotation[:, 2, 1] = -angle.sin(), angle.sin()
    matrix = (torch.linalg.inv(to_yiq) @ rotation @ to_yiq).to(
        images.device, images.dtype, non_blocking=True
    )
    return torch.einsum("nij,njhw->nihw", matrix, images).clamp_(0, 255)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Sharpen; Pillow's smoothing filter at factor 0. Border pixels do not change."""
    if min(images.shape[-2:]) < 3:
        return images
    kernel = torch.ones(3, 1, 3, 3, dtype=images.dtype, device=images.device)
    kernel[:, :, 1, 1] = 5
    smooth = images.clone()
    smooth[..., 1:-1, 1:-1] = F.conv2d(images, kernel / 13, groups=3)
    return blend(images, smooth, factor)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert values at or above `threshold` (0..256)."""
    return torch.where(images >= _per_image(threshold, images), 255 - images, images)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the upper `bits` (0..8) of every value."""
    step = 2 ** (8 - _per_image(bits.round(), images))
    return torch.floor(images / step) * step


def autocontrast(images: Tensor) -> Tensor:
    """Stretch every channel to 0..255, except a constant one."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    scale = torch.where(high > low, 255 / (high - low).clamp_min(1e-6), torch.ones_like(high))
    return (images - torch.where(high > low, low, torch.zeros_like(low))) * scale


def equalize(images: Tensor) -> Tensor:
    """Equalize the histogram of every channel."""
    from torchvision.transforms.v2.functional import equalize as equalize_uint8

    return equalize_uint8(images.round().to(torch.uint8)).to(images.dtype)

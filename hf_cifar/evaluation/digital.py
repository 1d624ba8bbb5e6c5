"""Digital corruptions of CIFAR-10-C: contrast, elastic deformation, pixelation and JPEG.

Images are float [N, 3, H, W] from 0 to 1.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

from hf_cifar.data.images import decode_image
from hf_cifar.evaluation.blur import gaussian_filter, scale_of
from hf_cifar.evaluation.noise import draw, uniform
from hf_cifar.transforms.resizing import resize_exactly


def to_uint8(images: Tensor) -> Tensor:
    """Return images from 0 to 1 as integers from 0 to 255."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def contrast(images: Tensor, severity: int, generators: Sequence[Generator]) -> Tensor:
    """Move pixels towards the mean of their image and channel."""
    share = (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1]
    mean = images.mean(dim=(2, 3), keepdim=True)
    return mean + (images - mean) * share


def elastic_transform(images: Tensor, severity: int, generators: Sequence[Generator]) -> Tensor:
    """Apply a random affine transform, given by three moved points, and stretch the image locally.

    Lengths are shares of the side. From severity 1 to 5, the points move less and the local stretches grow.
    """
    strength, smoothness, shift = (
        (0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)
    )[severity - 1]  # fmt: skip
    count, (height, width) = len(images), images.shape[-2:]
    side, device = min(height, width), images.device
    # In the coordinates of grid_sample, (x, y) from -1 to 1: a share of the side is twice as long.
    corners = torch.tensor([[2 / 3, 2 / 3], [2 / 3, -2 / 3], [-2 / 3, -2 / 3]])
    moved = corners + 2 * shift * uniform(-1, 1, generators, (3, 2))
    ones = torch.ones(count, 3, 1)
    affine = torch.linalg.solve(torch.cat([moved, ones], dim=2), corners.expand(count, 3, 2))
    identity = torch.eye(2, 3, device=device).expand(count, 2, 3)
    points = F.affine_grid(identity, list(images.shape), align_corners=False)
    if strength:
        # White noise averages out more over more pixels; the scale compensates for this.
        noise = 2 * draw(torch.rand, generators, (2, height, width), device) - 1
        noise = gaussian_filter(noise, smoothness * side, round(3 * smoothness * side))
        points = points + 2 * strength * scale_of(images) * noise.permute(0, 2, 3, 1)
    affine = affine[:, None].to(device)
    points = points @ affine[:, :, :2] + affine[:, :, 2:]
    return F.grid_sample(images, points, padding_mode="reflection", align_corners=False)


def pixelate(images: Tensor, severity: int, generators: Sequence[Generator]) -> Tensor:
    """Shrink the image to a share of its side, and enlarge it again, with Pillow's box filter."""
    share = (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1]
    height, width = images.shape[-2:]
    small = max(1, int(height * share)), max(1, int(width * share))
    whole = torch.tensor([[0.0, 0.0, height, width]])
    shrunk = resize_exactly(to_uint8(images), whole, small, "box").to(torch.uint8)
    whole = torch.tensor([[0.0, 0.0, *small]])
    return resize_exactly(shrunk, whole, (height, width), "box") / 255


def jpeg_compression(images: Tensor, severity: int, generators: Sequence[Generator]) -> Tensor:
    """Compress as JPEG, with colours at half the resolution, as is usual."""
    quality = (80, 65, 58, 50, 40)[severity - 1]
    decoded = []
    for image in to_uint8(images).permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        decoded.append(decode_image(file.getvalue()))
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).to(images.device) / 255

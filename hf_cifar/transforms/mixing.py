"""Random erasing, mixup and cutmix."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Generator, Tensor

from hf_cifar.transforms.views import uniform


def box_mask(boxes: Tensor, height: int, width: int, device: torch.device) -> Tensor:
    """Mask [N, 1, H, W] that is True inside the boxes [N, 4] (top, left, bottom, right), in pixels."""
    top, left, bottom, right = boxes.to(device, non_blocking=True)[:, :, None, None].unbind(dim=1)
    y = torch.arange(height, device=device)[:, None]
    x = torch.arange(width, device=device)
    return ((y >= top) & (y < bottom) & (x >= left) & (x < right))[:, None]


def erase(pixel_values: Tensor, probability: float, generator: Generator) -> Tensor:
    """Random erasing: with this probability, a box of 2 to 33% of the area becomes 0, the mean colour.

    Source: Zhong et al., Random Erasing Data Augmentation, 2017.
    """
    num_images, _, height, width = pixel_values.shape
    side = (uniform(num_images, 0.02, 1 / 3, generator) * height * width).sqrt()
    stretch = torch.exp(uniform(num_images, -1, 1, generator) * (0.5 * math.log(1 / 0.3)))
    box_height = (side / stretch).round().clamp_max(height)
    box_width = (side * stretch).round().clamp_max(width)
    top = (uniform(num_images, 0, 1, generator) * (height - box_height + 1)).floor()
    left = (uniform(num_images, 0, 1, generator) * (width - box_width + 1)).floor()
    boxes = torch.stack((top, left, top + box_height, left + box_width), dim=1)
    boxes[uniform(num_images, 0, 1, generator) >= probability] = 0
    return pixel_values.masked_fill(box_mask(boxes, height, width, pixel_values.device), 0)


def mix(
    pixel_values: Tensor,
    targets: Tensor,
    mixup_alpha: float,
    cutmix_alpha: float,
    generator: Generator,
) -> tuple[Tensor, Tensor]:
    """Mixup and cutmix: each image is blended with another image of the batch, or gets a box of it.

    pixel_values [N, C, H, W]; targets [N, K], 0..1, are mixed by the share of pixels. The shares follow
    Beta(alpha, alpha), one per image; alpha 0 turns a kind off; with both on, each image draws one of them.

    Source: Zhang et al., mixup, 2017; Yun et al., CutMix, 2019.
    """
    num_images, _, height, width = pixel_values.shape
    beta = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    partner = torch.randperm(num_images, generator=generator)
    partner = partner.to(pixel_values.device, non_blocking=True)
    cut = uniform(num_images, 0, 1, generator) < (0.5 if mixup_alpha else 1.0)
    cut &= bool(cutmix_alpha)
    share = torch.ones(num_images)  # of the image itself
    if mixup_alpha:
        share = torch.from_numpy(beta.beta(mixup_alpha, mixup_alpha, num_images)).float()
    own = share.where(~cut, torch.ones(())).view(-1, 1, 1, 1)
    own = own.to(pixel_values.device, non_blocking=True)
    if cutmix_alpha:
        area = 1 - torch.from_numpy(beta.beta(cutmix_alpha, cutmix_alpha, num_images)).float()
        half = area.sqrt()[:, None] * torch.tensor([height / 2, width / 2])
        centre = torch.rand(num_images, 2, generator=generator) * torch.tensor([height, width])
        boxes = torch.cat((centre - half, centre + half), dim=1).round()
        boxes[~cut] = 0
        mask = box_mask(boxes, height, width, pixel_values.device)
        own = own * ~mask
        share = own.mean(dim=(1, 2, 3))
    pixel_values = torch.lerp(pixel_values[partner], pixel_values, own.to(pixel_values.dtype))
    share = share.to(targets, non_blocking=True)[:, None]
    return pixel_values, targets * share + targets[partner] * (1 - share)

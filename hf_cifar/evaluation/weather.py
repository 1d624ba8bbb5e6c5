"""Weather of CIFAR-10-C: snow, frost, fog and brightness.

Images are float [N, 3, H, W] from 0 to 1. Everything is drawn: no photograph is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from hf_cifar.evaluation.blur import enlarge, scale_of, smear
from hf_cifar.evaluation.noise import draw, uniform
from hf_cifar.transforms.color import luma

# As the five published photographs have on average, by channel relative to blue.
FROST_COLOR = (0.82, 0.93, 1.0)
NUM_CRYSTALS = 8


def snow(images: Tensor, severity: int, generators: Sequence[Generator]) -> Tensor:
    """Whiten the image, and add falling flakes: bright spots of noise, enlarged and blurred by motion."""
    mean, deviation, size, threshold, radius, sigma, kept = (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    )[severity - 1]
    scale = scale_of(images)
    noise = draw(torch.randn, generators, (1, *images.shape[-2:]), images.device)
    flakes = enlarge(mean + deviation * noise, max(1.0, size * scale))
    flakes = torch.where(flakes < threshold, 0, flakes.clamp(0, 1))
    falling = uniform(-135, -45, generators, ())
    flakes = smear(flakes, radius * scale, sigma * scale, falling)
    whitened = torch.maximum(images, luma(images) * 1.5 + 0.5)
    return kept * images + (1 - kept) * whitened + flakes + flakes.rot90(2, (2, 3))


def frost(images: Tensor, severity: int, generators: Sequence[Generator]) -> Tensor:
    """Add frost. It is drawn by `frost_texture`, where the published one is cut from photographs."""
    kept, added = ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))[severity - 1]
    color = torch.tensor(FROST_COLOR, device=images.device).view(3, 1, 1)
    texture = frost_texture(images.shape[-2:], generators).to(images.device)
    return kept * images + added * color * texture


def frost_texture(size: Sequence[int], generators: Sequence[Generator]) -> Tensor:
    """Return ice crystals with six branched arms, over a veil of uneven ice, [N, 1, H, W] from 0 to 1.

    Lengths are in pixels of an image of 32 px. Mean and contrast are like those of the photographs.
    """
    height, width = size
    scale = min(height, width) / 32
    # As in the photographs, dark frost has more contrast.
    light = uniform(0, 1, generators, (1, 1))
    rows = (torch.arange(height) + 0.5).view(1, -1, 1) / scale
    columns = (torch.arange(width) + 0.5).view(1, 1, -1) / scale
    crystals = torch.zeros(len(generators), height, width)
    for _ in range(NUM_CRYSTALS):
        y, x, turn, extent, spacing = uniform(0, 1, generators, (5,)).unbind(dim=1)
        down = rows - (y * height / scale).view(-1, 1, 1)
        right = columns - (x * width / scale).view(-1, 1, 1)
        reach = (8 + 16 * extent).view(-1, 1, 1)
        gap = (4 + 3 * spacing).view(-1, 1, 1)
        distance = torch.hypot(down, right)
        sixth = math.pi / 3
        angle = (torch.atan2(down, right) + (turn * sixth).view(-1, 1, 1)) % sixth - sixth / 2
        along, beside = distance * angle.cos(), distance * angle.sin().abs()
        # Side branches leave the arm at 60 degrees, at equal distances.
        start = along - beside / math.tan(sixth)
        branch = (start - gap * (start / gap).round()).abs() * math.sin(sixth)
        lines = torch.exp(-((beside / 1.0) ** 2)) + 0.7 * torch.exp(-((branch / 0.9) ** 2))
        crystals = torch.maximum(crystals, lines * (1 - distance / reach).clamp(min=0))
    veil = plasma(max(height, width), 2.0, generators)[:, :height, :width]
    ice = 0.3 + 0.44 * light + 0.1 * veil + (0.43 - 0.23 * light) * crystals
    return ice.clamp(0, 1)[:, None]


def fog(images: Tensor, severity: int, generators: Sequence[Generator]) -> Tensor:
    """Add a cloud of uneven density, and keep the brightest value of each image."""
    density, decay = ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))[severity - 1]
    height, width = images.shape[-2:]
    cloud = plasma(max(height, width), decay, generators)[:, None, :height, :width]
    brightest = images.amax(dim=(1, 2, 3), keepdim=True)
    return (images + density * cloud.to(images.device)) * brightest / (brightest + density)


def plasma(side: int, decay: float, generators: Sequence[Generator]) -> Tensor:
    """Return fractal clouds [N, S, S] from 0 to 1, with S a power of two of at least `side`.

    The diamond-square algorithm on a torus: points half a step apart get the mean of four neighbours, and
    noise whose amplitude falls by decay ** 2 with each halving of the step.
    """
    size = 2 ** max(1, math.ceil(math.log2(side)))
    cloud = torch.zeros(len(generators), size, size)
    noise = uniform(-1, 1, generators, (size, size))
    step, amplitude = size, 1.0
    while step >= 2:
        half = step // 2
        corners = cloud[:, ::step, ::step]
        across = corners + corners.roll(-1, dims=1)
        centres = (across + across.roll(-1, dims=2)) / 4
        cloud[:, half::step, half::step] = centres + amplitude * noise[:, half::step, half::step]
        centres = cloud[:, half::step, half::step]
        above = centres + centres.roll(1, dims=1) + corners + corners.roll(-1, dims=2)
        cloud[:, ::step, half::step] = above / 4 + amplitude * noise[:, ::step, half::step]
        left = centres + centres.roll(1, dims=2) + corners + corners.roll(-1, dims=1)
        cloud[:, half::step, ::step] = left / 4 + amplitude * noise[:, half::step, ::step]
        step, amplitude = half, amplitude / decay**2
    cloud -= cloud.amin(dim=(1, 2), keepdim=True)
    return cloud / cloud.amax(dim=(1, 2), keepdim=True)


def brightness(images: Tensor, severity: int, generators: Sequence[Generator]) -> Tensor:
    """Brighten, keeping hue and saturation until white."""
    added = (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1]
    value = images.amax(dim=1, keepdim=True)
    brighter = (value + added).clamp(max=1)
    return torch.where(value > 0, images / value.clamp(min=1 / 255) * brighter, brighter)

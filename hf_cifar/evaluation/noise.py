"""Noise of CIFAR-10-C, and the random numbers of all corruptions.

Images are float [N, 3, H, W] from 0 to 1; each has its own generator, so batching does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor


def draw(
    sample: Callable[..., Tensor],
    generators: Sequence[Generator],
    size: Sequence[int],
    device: torch.device,
) -> Tensor:
    """Return random numbers [N, *size] by torch.rand or torch.randn; they are the same on every device."""
    return torch.stack([sample(size, generator=each) for each in generators]).to(device)


def uniform(
    low: float, high: float, generators: Sequence[Generator], size: Sequence[int]
) -> Tensor:
    """Return uniform random numbers [N, *size] from low to high, on the CPU."""
    return low + (high - low) * draw(torch.rand, generators, size, torch.device("cpu"))


def gaussian_noise(images: Tensor, severity: int, generators: Sequence[Generator]) -> Tensor:
    """Add Gaussian noise to every pixel and channel."""
    strength = (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1]
    return images + strength * draw(torch.randn, generators, images.shape[1:], images.device)


def shot_noise(images: Tensor, severity: int, generators: Sequence[Generator]) -> Tensor:
    """Add Poisson noise, as if counting photons; a white pixel has the given mean number."""
    photons = (500, 250, 100, 75, 50)[severity - 1]
    counts = [
        torch.poisson(rates, generator=generator)
        for rates, generator in zip(images.cpu() * photons, generators, strict=True)
    ]
    return torch.stack(counts).to(images.device) / photons


def impulse_noise(images: Tensor, severity: int, generators: Sequence[Generator]) -> Tensor:
    """Set a share of the values, in each channel independently, to 0 or 1 (salt and pepper)."""
    share = (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
    place = draw(torch.rand, generators, images.shape[1:], images.device)
    return torch.where(place < share, (place < share / 2).to(images.dtype), images)

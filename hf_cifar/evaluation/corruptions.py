"""The fifteen common corruptions of CIFAR-10-C at five severities, to measure the robustness of a classifier.

Kinds and parameters are those of CIFAR-10-C: Hendrycks and Dietterich 2019, Benchmarking Neural Network
Robustness to Common Corruptions and Perturbations, and their code, make_cifar_c.py. They are for 32 px: for
other sizes, lengths in pixels (blur, displacements, flakes, crystals) are multiplied by the shorter side
divided by 32. Strengths and proportions are not changed: pixelate and JPEG are milder for large images.

Differences: frost is generated instead of cropped from photographs. Beyond the edges, blur repeats the last
pixel. Zoom blur is centred exactly, elastic deformation interpolates once, not twice, and values are rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from hf_cifar.data.store import PreparedStore, ResidentStore
from hf_cifar.evaluation.blur import defocus_blur, glass_blur, motion_blur, zoom_blur
from hf_cifar.evaluation.digital import (
    contrast,
    elastic_transform,
    jpeg_compression,
    pixelate,
    to_uint8,
)
from hf_cifar.evaluation.noise import gaussian_noise, impulse_noise, shot_noise
from hf_cifar.evaluation.weather import brightness, fog, frost, snow

SEVERITIES = (1, 2, 3, 4, 5)
Corruption = Callable[[Tensor, int, Sequence[Generator]], Tensor]
CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": gaussian_noise,
    "shot_noise": shot_noise,
    "impulse_noise": impulse_noise,
    "defocus_blur": defocus_blur,
    "glass_blur": glass_blur,
    "motion_blur": motion_blur,
    "zoom_blur": zoom_blur,
    "snow": snow,
    "frost": frost,
    "fog": fog,
    "brightness": brightness,
    "contrast": contrast,
    "elastic_transform": elastic_transform,
    "pixelate": pixelate,
    "jpeg_compression": jpeg_compression,
}


def corrupt(images: Tensor, name: str, severity: int, seeds: Sequence[int]) -> Tensor:
    """Return images uint8 [N, 3, H, W] under a corruption. Each image has its own seed."""
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    return to_uint8(CORRUPTIONS[name](images.float() / 255, severity, generators))


class CorruptedStore(Dataset):
    """A store that corrupts its images, each the same way in every batch and on every device."""

    def __init__(
        self, store: ResidentStore | PreparedStore, corruption: str, severity: int
    ) -> None:
        self.store = store
        self.name = f"{store.name}, {corruption} {severity}"
        self.corruption = corruption
        self.severity = severity

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> dict[str, Tensor]:
        batch = self.store.__getitems__(positions)
        pixels = corrupt(batch["pixel_values"], self.corruption, self.severity, positions)
        return {**batch, "pixel_values": pixels}

"""Common corruptions of images at five severities, to measure the robustness of a classifier.

Kinds and severities are those of CIFAR-10-C (Hendrycks and Dietterich 2019), except that the blur scales with
the image side. Images are uint8 [N, 3, H, W], in and out.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from hf_cifar.data.images import decode_image
from hf_cifar.data.store import PreparedStore, ResidentStore

SEVERITIES = (1, 2, 3, 4, 5)


def gaussian_noise(images: Tensor, severity: int, seeds: Sequence[int]) -> Tensor:
    """Add noise to every pixel and channel; each image has its own seed, so batching does not matter."""
    strength = (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1]
    noise = torch.stack(
        [
            torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
    )
    return _to_uint8(images + noise.to(images.device) * (255 * strength))


def gaussian_blur(images: Tensor, severity: int, seeds: Sequence[int]) -> Tensor:
    """Blur, with edge pixels repeated outside the image."""
    sigma = (0.4, 0.6, 0.7, 0.8, 1.0)[severity - 1] * min(images.shape[-2:]) / 32
    radius = max(1, round(4 * sigma))
    steps = torch.arange(-radius, radius + 1, device=images.device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (steps / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    blurred = F.pad(images.float(), [radius] * 4, mode="replicate")
    blurred = F.conv2d(F.conv2d(blurred, kernel, groups=3), kernel.mT, groups=3)
    return _to_uint8(blurred)


def jpeg(images: Tensor, severity: int, seeds: Sequence[int]) -> Tensor:
    """Compress as JPEG, with colours at half the resolution, the usual setting."""
    quality = (80, 65, 58, 50, 40)[severity - 1]
    decoded = []
    for image in images.permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        decoded.append(decode_image(file.getvalue()))
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).to(images.device)


def low_contrast(images: Tensor, severity: int, seeds: Sequence[int]) -> Tensor:
    """Move pixels towards the mean of their image and channel."""
    share = (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1]
    mean = images.float().mean(dim=(2, 3), keepdim=True)
    return _to_uint8(mean + (images - mean) * share)


def brightness(images: Tensor, severity: int, seeds: Sequence[int]) -> Tensor:
    """Brighten, keeping hue and saturation until white."""
    added = (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1] * 255
    value = images.amax(dim=1, keepdim=True).float()
    brighter = (value + added).clamp(max=255)
    return _to_uint8(torch.where(value > 0, images / value.clamp(min=1) * brighter, brighter))


Corruption = Callable[[Tensor, int, Sequence[int]], Tensor]
CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": gaussian_noise,
    "gaussian_blur": gaussian_blur,
    "jpeg": jpeg,
    "low_contrast": low_contrast,
    "brightness": brightness,
}


def _to_uint8(images: Tensor) -> Tensor:
    return images.round().clamp(0, 255).to(torch.uint8)


class CorruptedStore(Dataset):
    """A store that corrupts its images, each the same way in every batch and on every device."""

    def __init__(
        self, store: ResidentStore | PreparedStore, corruption: str, severity: int
    ) -> None:
        self.store = store
        self.name = f"{store.name}, {corruption} {severity}"
        self.corrupt = CORRUPTIONS[corruption]
        self.severity = severity

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> dict[str, Tensor]:
        batch = self.store.__getitems__(positions)
        pixels = self.corrupt(batch["pixel_values"], self.severity, positions)
        return {**batch, "pixel_values": pixels}

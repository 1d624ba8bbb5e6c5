"""Random augmentation of a training batch: each image gets its own, from one seeded generator.

Random numbers are drawn on the CPU, so that they are the same for every device; pixels are processed on the
images' device. The numbers are copied there asynchronously; a blocking copy waits for all queued kernels.
Colour operations come first, at the stored size. All geometry is then one resampling, including the upscale.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from hf_cifar.transforms import color
from hf_cifar.transforms.mixing import erase, mix
from hf_cifar.transforms.policies import Policy, color_jitter
from hf_cifar.transforms.preprocessing import Preprocessing
from hf_cifar.transforms.resampling import affine_sample, resample
from hf_cifar.transforms.views import Affine, RandomView, uniform


@dataclass(frozen=True)
class Augmentation:
    """The augmentation of a training batch, from stored pixels to the model's input.

    color_jitter, hue: see the function of that name. grayscale, random_erasing: probabilities. mixup_alpha,
    cutmix_alpha: see `mix`.
    """

    view: RandomView = field(default_factory=RandomView)
    policy: Policy | None = None
    color_jitter: float = 0.0
    hue: float = 0.0
    grayscale: float = 0.0
    random_erasing: float = 0.0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        preprocessing: Preprocessing,
        num_classes: int,
        generator: Generator,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> tuple[Tensor, Tensor]:
        """Transform images [N, 3, H, W] uint8 and labels [N] to pixel_values [N, 3, h, w] and targets.

        The targets are the labels, or with mixup or cutmix probabilities [N, num_classes]. Labels may also be
        [N, num_classes], 0 or 1.
        """
        pixel_values = self.sample(images, preprocessing, generator, memory_format)
        if self.random_erasing:
            pixel_values = erase(pixel_values, self.random_erasing, generator)
        if not (self.mixup_alpha or self.cutmix_alpha):
            return pixel_values, labels
        targets = labels if labels.ndim == 2 else F.one_hot(labels, num_classes)
        targets = targets.to(torch.float32)
        return mix(pixel_values, targets, self.mixup_alpha, self.cutmix_alpha, generator)

    @property
    def is_fixed(self) -> bool:
        """True if every image is seen as in evaluation."""
        mixed = self.random_erasing or self.mixup_alpha or self.cutmix_alpha
        return self._keeps_pixels and not mixed

    @property
    def _keeps_pixels(self) -> bool:
        """True if no augmentation that changes pixels is on before erasing and mixing."""
        still = self.view == RandomView(max_ratio=self.view.max_ratio)
        return still and not (self.policy or self.color_jitter or self.hue or self.grayscale)

    def sample(
        self,
        images: Tensor,
        preprocessing: Preprocessing,
        generator: Generator,
        memory_format: torch.memory_format,
    ) -> Tensor:
        """Draw a random view of each image, with random colours: `pixel_values` [N, 3, h, w]."""
        if self._keeps_pixels:
            return preprocessing(images, memory_format)
        images, frame = preprocessing.frame(images)
        num_images, _, height, width = images.shape
        top, left, bottom, right = frame[0].tolist()
        boxes, linear = self.view.draw(
            num_images, bottom - top, right - left, preprocessing.size, generator
        )
        boxes += torch.tensor([top, left, top, left])
        if self.policy is not None:
            images, affine = self.policy(images.to(torch.float32), generator)
            boxes, linear = combine_views(boxes, linear, affine, height, width)
        if self.color_jitter or self.hue:
            images = images.to(torch.float32)
            images = color_jitter(images, self.color_jitter, self.hue, generator)
        if self.grayscale:
            grey = uniform(num_images, 0, 1, generator) < self.grayscale
            images = color.saturation(images.to(torch.float32), 1 - grey.float())
        size, interpolation = preprocessing.size, preprocessing.interpolation
        levels = preprocessing.levels(images.device)
        if linear is None:
            return resample(images, boxes, size, interpolation, levels, memory_format)
        return levels(sample_views(images, boxes, linear, size, interpolation))


def combine_views(
    boxes: Tensor, linear: Tensor | None, affine: Affine, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Combine `affine` with a view (boxes, linear) of its result into one view of the original images."""
    middle = torch.tensor([height / 2, width / 2])
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 - middle
    half = (boxes[:, 2:] - boxes[:, :2]) / 2
    centre = torch.einsum("nij,nj->ni", affine.linear, centre) + affine.shift + middle
    linear = affine.linear if linear is None else affine.linear @ linear
    return torch.cat((centre - half, centre + half), dim=1), linear


def sample_views(
    images: Tensor, boxes: Tensor, linear: Tensor | None, size: tuple[int, int], interpolation: str
) -> Tensor:
    """Sample each box: axis-aligned ones by `resample`, rotated or sheared ones by `affine_sample`."""
    if linear is None:
        return resample(images, boxes, size, interpolation)
    straight = (linear == torch.eye(2)).all(dim=(1, 2))
    out = images.new_empty((*images.shape[:2], *size), dtype=torch.float32)
    for chosen, show in (
        (straight, lambda i, n: resample(images[i], boxes[n], size, interpolation)),
        (~straight, lambda i, n: affine_sample(images[i], boxes[n], linear[n], size)),
    ):
        rows = torch.nonzero(chosen).flatten()
        if len(rows):
            on_device = rows.to(images.device, non_blocking=True)
            out[on_device] = show(on_device, rows)
    return out

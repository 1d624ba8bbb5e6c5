"""Random operations of colour and geometry for each image: TrivialAugment, RandAugment, colour jitter."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from hf_cifar.transforms import color
from hf_cifar.transforms.resampling import rotation, shear
from hf_cifar.transforms.views import Affine, uniform


class Strengths(NamedTuple):
    """The maximum strength of each operation of a policy.

    shear: pixels per row. translate: share of the side. rotate: degrees. enhance: distance from factor 1.
    posterize: number of bits removed.
    """

    shear: float
    translate: float
    rotate: float
    enhance: float
    posterize: int


# Mueller and Hutter, TrivialAugment, 2021, table 1 ("wide"); 32 pixels at 224.
TRIVIAL_AUGMENT = Strengths(0.99, 32 / 224, 135.0, 0.99, 6)
# Cubuk et al., RandAugment, 2020, with the ranges of AutoAugment; 150 pixels at 331.
RAND_AUGMENT = Strengths(0.3, 150 / 331, 30.0, 0.9, 4)


# Arguments: images, one amount in -1..1 per image (0: no change), and the strengths at amount 1.
COLOR_OPS: dict[str, Callable[[Tensor, Tensor, Strengths], Tensor]] = {
    "brightness": lambda images, amount, top: color.brightness(images, 1 + amount * top.enhance),
    "contrast": lambda images, amount, top: color.contrast(images, 1 + amount * top.enhance),
    "saturation": lambda images, amount, top: color.saturation(images, 1 + amount * top.enhance),
    "sharpness": lambda images, amount, top: color.sharpness(images, 1 + amount * top.enhance),
    "solarize": lambda images, amount, top: color.solarize(images, 256 * (1 - amount.abs())),
    "posterize": lambda images, amount, top: color.posterize(
        images, 8 - amount.abs() * top.posterize
    ),
    "autocontrast": lambda images, amount, top: color.autocontrast(images),
    "equalize": lambda images, amount, top: color.equalize(images),
}
# Arguments: amounts and strengths. Result: the linear part, and the shift as a share of the sides.
GEOMETRIC_OPS: dict[str, Callable[[Tensor, Strengths], Affine]] = {
    "shear_y": lambda amount, top: _linear(shear(amount * top.shear, torch.zeros_like(amount))),
    "shear_x": lambda amount, top: _linear(shear(torch.zeros_like(amount), amount * top.shear)),
    "translate_y": lambda amount, top: _shift(amount * top.translate, torch.zeros_like(amount)),
    "translate_x": lambda amount, top: _shift(torch.zeros_like(amount), amount * top.translate),
    "rotate": lambda amount, top: _linear(rotation(amount * math.radians(top.rotate))),
}
OPS = ("identity", *COLOR_OPS, *GEOMETRIC_OPS)


def _linear(linear: Tensor) -> Affine:
    return Affine(linear, torch.zeros(len(linear), 2))


def _shift(y: Tensor, x: Tensor) -> Affine:
    return Affine(torch.eye(2).repeat(len(y), 1, 1), torch.stack((y, x), dim=1))


@dataclass(frozen=True)
class Policy:
    """Draws `num_ops` of 14 operations for each image, each with a random strength and direction.

    magnitude: mean share (0..1) of the maximum strength, with standard deviation `deviation`; None draws it
    uniformly.
    """

    strengths: Strengths
    num_ops: int
    magnitude: float | None = None
    deviation: float = 0.5 / 30

    @classmethod
    def trivial_augment(cls) -> Policy:
        """One operation at a uniform strength. Source: Mueller and Hutter, TrivialAugment, 2021."""
        return cls(TRIVIAL_AUGMENT, num_ops=1)

    @classmethod
    def rand_augment(cls, num_ops: int = 2, magnitude: float = 9 / 30) -> Policy:
        """Operations near one strength. Source: Cubuk et al., RandAugment, 2020; timm's deviation of 0.5."""
        return cls(RAND_AUGMENT, num_ops, magnitude)

    def __call__(self, images: Tensor, generator: Generator) -> tuple[Tensor, Affine]:
        """Apply the colour operations to float images [N, 3, H, W], 0..255; also returns the geometry."""
        num_images, _, height, width = images.shape
        sides = torch.tensor([height, width], dtype=torch.float32)
        affine = Affine.identity(num_images)
        for _ in range(self.num_ops):
            op = torch.randint(len(OPS), (num_images,), generator=generator)
            amount = self._magnitudes(num_images, generator)
            amount = torch.where(uniform(num_images, 0, 1, generator) < 0.5, -amount, amount)
            for name, change in COLOR_OPS.items():
                chosen = torch.nonzero(op == OPS.index(name)).flatten()
                if len(chosen):
                    where = chosen.to(images.device, non_blocking=True)
                    changed = change(images[where], amount[chosen], self.strengths)
                    images = images.index_copy(0, where, changed)
            step = Affine.identity(num_images)
            for name, move in GEOMETRIC_OPS.items():
                chosen = op == OPS.index(name)
                linear, shift = move(amount[chosen], self.strengths)
                step.linear[chosen], step.shift[chosen] = linear, shift * sides
            affine = affine.then(step)
        return images, affine

    def _magnitudes(self, num_images: int, generator: Generator) -> Tensor:
        if self.magnitude is None:
            return uniform(num_images, 0, 1, generator)
        spread = torch.randn(num_images, generator=generator) * self.deviation
        return (self.magnitude + spread).clamp_(0, 1)


def color_jitter(images: Tensor, strength: float, hue: float, generator: Generator) -> Tensor:
    """Scale brightness, contrast and saturation by 1 +- strength each, and shift hue by +- `hue` turns."""
    for change in (color.brightness, color.contrast, color.saturation):
        if strength:
            factor = uniform(len(images), max(0.0, 1 - strength), 1 + strength, generator)
            images = change(images, factor)
    if hue:
        images = color.hue(images, uniform(len(images), -hue, hue, generator))
    return images

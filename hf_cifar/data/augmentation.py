"""Random augmentation of a training batch: every image draws its own, from one seeded generator.

All draws happen on the CPU, so that every device sees the same ones; all pixels move on the images' device.
Colours change first, at the stored size. All geometry is then one resampling, with the upscale in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from hf_cifar.data import color
from hf_cifar.data.preprocessing import Preprocessing
from hf_cifar.data.transforms import affine_sample, resample, rotation, shear


def uniform(num: int, low: float, high: float, generator: Generator) -> Tensor:
    """[num] values in low..high."""
    return torch.rand(num, generator=generator) * (high - low) + low


class Affine(NamedTuple):
    """Where each pixel comes from: `linear` [N, 2, 2] @ its offset from the centre + `shift` [N, 2].

    In (y, x) and input pixels.
    """

    linear: Tensor
    shift: Tensor

    @classmethod
    def identity(cls, num_images: int) -> Affine:
        return cls(torch.eye(2).repeat(num_images, 1, 1), torch.zeros(num_images, 2))

    def then(self, following: Affine) -> Affine:
        """This map, and `following` applied to its result."""
        moved = torch.einsum("nij,nj->ni", self.linear, following.shift) + self.shift
        return Affine(self.linear @ following.linear, moved)


@dataclass(frozen=True)
class RandomView:
    """Draws one view per image: pad-and-crop, random resized crop, flip, rotation, shear, zoom.

    padding: largest shift, as a share of the side; in whole pixels of the result, because a shift by a
    part of one would blur what evaluation shows sharp. min_area: smallest share of the area kept; 1 keeps
    it all. max_ratio: largest aspect ratio of the crop. flip: probability. rotation: largest angle, in
    degrees. shear: largest shift of a row per row. zoom: largest relative change of size.
    """

    padding: float = 0.0
    min_area: float = 1.0
    max_ratio: float = 4 / 3
    flip: float = 0.0
    rotation: float = 0.0
    shear: float = 0.0
    zoom: float = 0.0

    def draw(
        self,
        num_images: int,
        height: int,
        width: int,
        size: tuple[int, int],
        generator: Generator,
    ) -> tuple[Tensor, Tensor | None]:
        """Views of height x width images that will be resampled to `size`.

        Boxes [N, 4], and what turns or shears their content: [N, 2, 2] for `affine_sample`, or None.
        """

        def draw(low: float, high: float) -> Tensor:
            return uniform(num_images, low, high, generator)

        def shift(pixel: float, side: int) -> Tensor:
            most = int(self.padding * side / pixel + 1e-6)
            return torch.randint(-most, most + 1, (num_images,), generator=generator) * pixel

        box_height = torch.full((num_images,), float(height))
        box_width = torch.full((num_images,), float(width))
        if self.min_area < 1:
            side = draw(self.min_area, 1).sqrt()
            stretch = torch.exp(draw(-1, 1) * (0.5 * math.log(self.max_ratio)))
            box_height = height * (side / stretch).clamp_max(1)
            box_width = width * (side * stretch).clamp_max(1)
        if self.zoom:
            factor = torch.exp(draw(-1, 1) * math.log1p(self.zoom))
            box_height, box_width = box_height * factor, box_width * factor
        # A smaller box lies anywhere inside the image, plus the padding's shift.
        middle_y = height / 2 + draw(-0.5, 0.5) * (height - box_height).abs()
        middle_x = width / 2 + draw(-0.5, 0.5) * (width - box_width).abs()
        if self.padding:
            middle_y = middle_y + shift(height / size[0], height)
            middle_x = middle_x + shift(width / size[1], width)
        top, bottom = middle_y - box_height / 2, middle_y + box_height / 2
        left, right = middle_x - box_width / 2, middle_x + box_width / 2
        if self.flip:
            mirrored = draw(0, 1) < self.flip
            left, right = torch.where(mirrored, right, left), torch.where(mirrored, left, right)
        linear = None
        if self.rotation:
            linear = rotation(draw(-1, 1) * math.radians(self.rotation))
        if self.shear:
            sheared = shear(draw(-1, 1) * self.shear, draw(-1, 1) * self.shear)
            linear = sheared if linear is None else linear @ sheared
        return torch.stack((top, left, bottom, right), dim=1), linear


class Strengths(NamedTuple):
    """The strongest form of each operation of a policy.

    shear: pixels per row. translate: share of the side. rotate: degrees. enhance: away from factor 1.
    posterize: bits that go.
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

# Of images, their amounts -1..1 (0: no change), and the strengths at 1.
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
# Of amounts and strengths: the linear part, and the shift as a share of the sides.
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
    """Draws `num_ops` of 14 operations for each image, each with its own strength and direction.

    magnitude: mean share (0..1) of the strongest form, spread by `deviation`; None draws it evenly.
    """

    strengths: Strengths
    num_ops: int
    magnitude: float | None = None
    deviation: float = 0.5 / 30

    @classmethod
    def trivial_augment(cls) -> Policy:
        """One operation at any strength. Source: Mueller and Hutter, TrivialAugment, 2021."""
        return cls(TRIVIAL_AUGMENT, num_ops=1)

    @classmethod
    def rand_augment(cls, num_ops: int = 2, magnitude: float = 9 / 30) -> Policy:
        """Operations of about one strength. Source: Cubuk et al., RandAugment, 2020; timm's spread of 0.5."""
        return cls(RAND_AUGMENT, num_ops, magnitude)

    def __call__(self, images: Tensor, generator: Generator) -> tuple[Tensor, Affine]:
        """Float images [N, 3, H, W], 0..255, in their new colours, and the geometry still to be done."""
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
                    where = chosen.to(images.device)
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
    """Brightness, contrast and saturation by factors of 1 +- strength each, and hue by +- `hue` turns."""
    for change in (color.brightness, color.contrast, color.saturation):
        if strength:
            factor = uniform(len(images), max(0.0, 1 - strength), 1 + strength, generator)
            images = change(images, factor)
    if hue:
        images = color.hue(images, uniform(len(images), -hue, hue, generator))
    return images


def box_mask(boxes: Tensor, height: int, width: int, device: torch.device) -> Tensor:
    """[N, 1, H, W] bool: True in the boxes [N, 4] (top, left, bottom, right), in pixels."""
    top, left, bottom, right = boxes.to(device)[:, :, None, None].unbind(dim=1)
    y = torch.arange(height, device=device)[:, None]
    x = torch.arange(width, device=device)
    return ((y >= top) & (y < bottom) & (x >= left) & (x < right))[:, None]


def erase(pixel_values: Tensor, probability: float, generator: Generator) -> Tensor:
    """Random erasing: a box of 2 to 33% of the area becomes 0, the mean colour, with this probability.

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
    """Mixup and cutmix: each image is blended with, or has a box of, another of the batch.

    pixel_values [N, C, H, W]; targets [N, K], 0..1, are mixed by the share of pixels. The shares
    are Beta(alpha, alpha), one for each image; alpha 0 turns a kind off; with both on, each image draws one.

    Source: Zhang et al., mixup, 2017; Yun et al., CutMix, 2019.
    """
    num_images, _, height, width = pixel_values.shape
    beta = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    partner = torch.randperm(num_images, generator=generator).to(pixel_values.device)
    cut = uniform(num_images, 0, 1, generator) < (0.5 if mixup_alpha else 1.0)
    cut &= bool(cutmix_alpha)
    share = torch.ones(num_images)  # of the image itself
    if mixup_alpha:
        share = torch.from_numpy(beta.beta(mixup_alpha, mixup_alpha, num_images)).float()
    own = share.where(~cut, torch.ones(())).view(-1, 1, 1, 1).to(pixel_values.device)
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
    share = share.to(targets)[:, None]
    return pixel_values, targets * share + targets[partner] * (1 - share)


@dataclass(frozen=True)
class Augmentation:
    """All that happens to a training batch, from stored pixels to the model's input.

    color_jitter, hue: see the function of that name. grayscale, erasing: probabilities. mixup_alpha,
    cutmix_alpha: see `mix`.
    """

    view: RandomView = RandomView()
    policy: Policy | None = None
    color_jitter: float = 0.0
    hue: float = 0.0
    grayscale: float = 0.0
    erasing: float = 0.0
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
        """images [N, 3, H, W] uint8 and labels [N] -> pixel_values [N, 3, h, w] and targets.

        The targets are the labels, or with mixup or cutmix probabilities [N, num_classes]. Labels may also be
        [N, num_classes], 0 or 1.
        """
        pixel_values = self.sample(images, preprocessing, generator, memory_format)
        if self.erasing:
            pixel_values = erase(pixel_values, self.erasing, generator)
        if not (self.mixup_alpha or self.cutmix_alpha):
            return pixel_values, labels
        targets = labels if labels.ndim == 2 else F.one_hot(labels, num_classes)
        targets = targets.to(torch.float32)
        return mix(pixel_values, targets, self.mixup_alpha, self.cutmix_alpha, generator)

    @property
    def _leaves_images_alone(self) -> bool:
        """Whether each image is shown as evaluation shows it."""
        still = self.view == RandomView(max_ratio=self.view.max_ratio)
        return still and not (self.policy or self.color_jitter or self.hue or self.grayscale)

    def sample(
        self,
        images: Tensor,
        preprocessing: Preprocessing,
        generator: Generator,
        memory_format: torch.memory_format,
    ) -> Tensor:
        """A random view of each image, in new colours: `pixel_values` [N, 3, h, w]."""
        if self._leaves_images_alone:
            return preprocessing(images, memory_format)
        num_images, _, height, width = images.shape
        boxes, linear = self.view.draw(num_images, height, width, preprocessing.size, generator)
        if self.policy is not None:
            images, affine = self.policy(images.to(torch.float32), generator)
            boxes, linear = move(boxes, linear, affine, height, width)
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
        return levels(sample(images, boxes, linear, size, interpolation))


def move(
    boxes: Tensor, linear: Tensor | None, affine: Affine, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """The view (boxes, linear) of images that `affine` has changed, as a view of the images themselves."""
    middle = torch.tensor([height / 2, width / 2])
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 - middle
    half = (boxes[:, 2:] - boxes[:, :2]) / 2
    centre = torch.einsum("nij,nj->ni", affine.linear, centre) + affine.shift + middle
    linear = affine.linear if linear is None else affine.linear @ linear
    return torch.cat((centre - half, centre + half), dim=1), linear


def sample(
    images: Tensor, boxes: Tensor, linear: Tensor | None, size: tuple[int, int], interpolation: str
) -> Tensor:
    """Show each box: by `resample` where it lies straight, by `affine_sample` where it does not."""
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
            on_device = rows.to(images.device)
            out[on_device] = show(on_device, rows)
    return out

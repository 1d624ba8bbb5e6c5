"""Random views: which part of each image is shown, flipped, rotated or sheared."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from hf_cifar.transforms.resampling import rotation, shear


def uniform(num: int, low: float, high: float, generator: Generator) -> Tensor:
    """Draw [num] values in low..high."""
    return torch.rand(num, generator=generator) * (high - low) + low


class Affine(NamedTuple):
    """The source of each pixel: `linear` [N, 2, 2] @ its offset from the centre + `shift` [N, 2].

    Offsets are (y, x), in input pixels.
    """

    linear: Tensor
    shift: Tensor

    @classmethod
    def identity(cls, num_images: int) -> Affine:
        return cls(torch.eye(2).repeat(num_images, 1, 1), torch.zeros(num_images, 2))

    def then(self, following: Affine) -> Affine:
        """Compose this map with `following`, applied to its result."""
        moved = torch.einsum("nij,nj->ni", self.linear, following.shift) + self.shift
        return Affine(self.linear @ following.linear, moved)


@dataclass(frozen=True)
class RandomView:
    """Draws one view per image: pad-and-crop, random resized crop, flip, rotation, shear, zoom.

    padding: largest shift, as a share of the side, in whole pixels of the result, because a fractional shift
    would blur images that are sharp in evaluation. min_area: smallest share of the area kept; 1 keeps
    everything. max_ratio: largest aspect ratio of the crop. flip: probability. rotation: largest angle, in
    degrees. shear: largest shift per row. zoom: largest relative change of size.
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
        height: float,
        width: float,
        size: tuple[int, int],
        generator: Generator,
    ) -> tuple[Tensor, Tensor | None]:
        """Draw views of height x width images that will be resampled to `size`.

        Returns boxes [N, 4], and the rotation and shear [N, 2, 2] for `affine_sample`, or None.
        """

        def draw(low: float, high: float) -> Tensor:
            return uniform(num_images, low, high, generator)

        def shift(pixel: float, side: float) -> Tensor:
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
        # A smaller box is anywhere inside the image, plus the shift for padding.
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

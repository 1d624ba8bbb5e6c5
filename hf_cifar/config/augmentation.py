"""Augmentation options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_cifar.config.fields import check_fields, option


@dataclass(frozen=True)
class AugmentConfig:
    """Random transforms of a training batch; each image draws its own."""

    _argument_group_name = "augmentation"

    crop_padding: float = option(
        0.03125,
        "Largest random shift, as a share of the image side (0.03125 of 32 px is 1 px, for a few epochs; "
        "0.125 is usual in long runs).",
        low=0,
        high=1,
    )
    crop_scale: float = option(
        1.0,
        "Smallest share of the image area that a random resized crop keeps; 1 turns it off.",
        low=0.01,
        high=1,
    )
    crop_ratio: float = option(
        4 / 3,
        "Largest aspect ratio of a random resized crop; the smallest is its inverse.",
        low=1,
        high=10,
    )
    flip: float = option(0.5, "Probability of a horizontal flip.", low=0, high=1)
    rotation: float = option(0.0, "Largest random rotation, in degrees.", low=0, high=180)
    shear: float = option(0.0, "Largest random shear, in pixels per row or column.", low=0, high=2)
    zoom: float = option(
        0.0, "Largest random zoom in or out, as a share of the size.", low=0, high=0.9
    )
    color_jitter: float = option(
        0.0, "Brightness, contrast and saturation each change by up to this share.", low=0, high=10
    )
    hue: float = option(
        0.0, "Largest random shift of the hue; 0.5 gives the opposite colour.", low=0, high=0.5
    )
    grayscale: float = option(0.0, "Probability that an image loses its colours.", low=0, high=1)
    auto_augment: Literal["none", "trivial_augment", "rand_augment"] = option(
        "none", "Policy that draws from 14 colour and geometry operations for each image."
    )
    rand_augment_ops: int = option(
        2, "Operations that rand_augment applies to an image.", low=1, high=14
    )
    rand_augment_magnitude: float = option(
        9, "Mean strength of rand_augment, 0 to 30.", low=0, high=30
    )
    random_erasing: float = option(
        0.0, "Probability that a box of up to a third of the image is erased.", low=0, high=1
    )
    mixup_alpha: float = option(
        0.0,
        "Mixup: images are blended in pairs by Beta(alpha, alpha); 0 turns it off.",
        low=0,
        high=100,
    )
    cutmix_alpha: float = option(
        0.0,
        "Cutmix: a box of another image, of area Beta(alpha, alpha); 0 turns it off.",
        low=0,
        high=100,
    )

    def __post_init__(self) -> None:
        check_fields(self)

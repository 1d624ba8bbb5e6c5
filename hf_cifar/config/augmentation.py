"""Augmentation options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_cifar.config.fields import option
from hf_cifar.errors import UserError


@dataclass(frozen=True)
class AugmentConfig:
    """Random transforms of a training batch; each image draws its own."""

    _argument_group_name = "augmentation"

    crop_padding: float = option(
        0.03125,
        "Largest random shift, as a share of the image side (0.03125 of 32 px is 1 px, for a few epochs; "
        "0.125 is usual in long runs).",
    )
    crop_scale: float = option(
        1.0, "Smallest share of the image area that a random resized crop keeps; 1 turns it off."
    )
    crop_ratio: float = option(
        4 / 3, "Largest aspect ratio of a random resized crop; the smallest is its inverse."
    )
    flip: float = option(0.5, "Probability of a horizontal flip.")
    rotation: float = option(0.0, "Largest random rotation, in degrees.")
    shear: float = option(0.0, "Largest random shear, in pixels per row or column.")
    zoom: float = option(0.0, "Largest random zoom in or out, as a share of the size.")
    color_jitter: float = option(
        0.0, "Brightness, contrast and saturation each change by up to this share."
    )
    hue: float = option(0.0, "Largest random turn of the colours; 0.5 is the opposite colour.")
    grayscale: float = option(0.0, "Probability of an image without colours.")
    auto_augment: Literal["none", "trivial_augment", "rand_augment"] = option(
        "none", "Policy that draws among 14 operations of colour and geometry for each image."
    )
    rand_augment_ops: int = option(2, "Operations that rand_augment applies to an image.")
    rand_augment_magnitude: float = option(9, "Mean strength of rand_augment, 0 to 30.")
    random_erasing: float = option(
        0.0, "Probability that a box of up to a third of the image is erased."
    )
    mixup_alpha: float = option(
        0.0, "Mixup: images are blended in pairs by Beta(alpha, alpha); 0 turns it off."
    )
    cutmix_alpha: float = option(
        0.0, "Cutmix: a box of another image, of area Beta(alpha, alpha); 0 turns it off."
    )

    def __post_init__(self) -> None:
        bounds = {
            "crop_padding": (0, 1), "crop_scale": (0.01, 1), "crop_ratio": (1, 10),
            "flip": (0, 1), "rotation": (0, 180), "shear": (0, 2), "zoom": (0, 0.9),
            "color_jitter": (0, 10), "hue": (0, 0.5), "grayscale": (0, 1),
            "rand_augment_ops": (1, 14), "rand_augment_magnitude": (0, 30),
            "random_erasing": (0, 1), "mixup_alpha": (0, 100), "cutmix_alpha": (0, 100),
        }  # fmt: skip
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                raise UserError(f"--{name} is {getattr(self, name)}; it must lie in {low}..{high}")

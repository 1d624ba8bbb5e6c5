"""The random transform of training batches, from the options."""

from __future__ import annotations

import dataclasses

from hf_cifar.config.augmentation import AugmentConfig
from hf_cifar.transforms.augmentation import Augmentation
from hf_cifar.transforms.policies import Policy
from hf_cifar.transforms.views import RandomView


def augmentation(options: AugmentConfig) -> Augmentation:
    """Return the random transform of training batches defined by the options."""
    view = RandomView(
        padding=options.crop_padding,
        min_area=options.crop_scale,
        max_ratio=options.crop_ratio,
        flip=options.flip,
        rotation=options.rotation,
        shear=options.shear,
        zoom=options.zoom,
    )
    policies = {
        "none": lambda: None,
        "trivial_augment": Policy.trivial_augment,
        "rand_augment": lambda: Policy.rand_augment(
            options.rand_augment_ops, options.rand_augment_magnitude / 30
        ),
    }
    names = {each.name for each in dataclasses.fields(Augmentation)} - {"view", "policy"}
    of_one_name = {name: getattr(options, name) for name in names}
    return Augmentation(view=view, policy=policies[options.auto_augment](), **of_one_name)

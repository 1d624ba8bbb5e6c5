"""Options of explanations."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from hf_cifar.config.data import MAX_IMAGE_PIXELS, PILLOW_PIXELS
from hf_cifar.config.fields import check_fields, option
from hf_cifar.errors import UserError
from hf_cifar.text import listed, nearest_hint

DEFAULT_METHODS = ("grad_cam", "attention_rollout", "integrated_gradients")
ALL_METHODS = (*DEFAULT_METHODS, "occlusion", "lime", "shap", "feature_maps", "filters")
DEFAULT_IMAGES = 20


@dataclass(frozen=True)
class ExplainConfig:
    """Which predictions to explain, and how."""

    _argument_group_name = "explanation"

    methods: list[str] | None = option(  # noqa: RUF009
        None,
        f"Any of {listed(ALL_METHODS)}. The default is grad_cam, attention_rollout where the model has "
        "attention between all patches, and integrated_gradients.",
    )
    target: str | None = option(
        None, "Class to explain, by its name; default: the predicted class of each image."
    )
    sanity: bool = option(
        True,
        "Check whether each map changes with randomised weights, and ranks pixels better than chance.",
    )
    output_dir: str | None = option(
        None, "Folder of the page and the pictures; default: explanations in the run's folder."
    )
    split: Literal["validation", "test"] | None = option(
        None, "Without files: the split to take images from (validation)."
    )
    num_images: int | None = option(
        None,
        f"Without files: images of the split, drawn with a fixed seed ({DEFAULT_IMAGES}).",
        low=1,
    )
    dataset_name: str | None = option(
        None, "Without files: data to take images from; default: the run's own."
    )
    model_revision: str | None = option(None, "Branch, tag or commit of a Hub model.")
    use_cpu: bool = option(False, "Compute on the CPU even if there is a GPU.")
    trust_remote_code: bool = option(
        False,
        "Run code that comes with the checkpoint; a Hub model needs a full commit as --model_revision.",
    )
    max_image_pixels: int = option(
        MAX_IMAGE_PIXELS,
        "Images of more pixels count as unreadable, and are not decoded.",
        low=1,
        high=PILLOW_PIXELS,
    )

    def __post_init__(self) -> None:
        check_fields(self)
        for name in self.methods or ():
            if name in ALL_METHODS:
                continue
            if os.path.exists(name):
                raise UserError(
                    f"--methods takes all words after it, {name} too; pass the run and the files before it"
                )
            hint = nearest_hint(name, ALL_METHODS)
            raise UserError(
                f"--methods does not take {name!r}{hint}; it takes {listed(ALL_METHODS)}"
            )

"""Data options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_cifar.config.fields import option
from hf_cifar.errors import UserError

MAX_IMAGE_PIXELS = 8192 * 8192
PILLOW_PIXELS = 178_956_970  # above, Pillow opens no file


@dataclass(frozen=True)
class DataConfig:
    """Which images and labels to use, and how they are split."""

    _argument_group_name = "data"

    dataset_name: str = option(
        "uoft-cs/cifar10",
        "Hub id, local folder (Hub layout, save_to_disk, or images in class folders), CIFAR archive, "
        "or bundled/digits.",
    )
    dataset_config_name: str | None = option(
        None, "Configuration of the data set, where it has several."
    )
    image_column_name: str | None = option(None, "Image column; found by its type if not given.")
    label_column_name: str | None = option(
        None,
        "Label column; found by its type if not given. May hold class labels, strings or integers, or lists "
        "of class labels or strings where an image has several.",
    )
    train_val_split: float = option(
        0.1,
        "Share of train that becomes validation, stratified (not of a stream), if the data has no validation "
        "split.",
    )
    split_seed: int = option(42, "Seed of the train/validation split and of every subsample.")
    max_train_samples: int | None = option(
        None,
        "Use at most this many training images, stratified; of a stream, a share of about as many.",
    )
    max_eval_samples: int | None = option(
        None,
        "Use at most this many validation (or test) images, stratified; of a stream, the first.",
    )

    streaming: bool = option(
        False,
        "Read train shard by shard as training goes, for data that is larger than the disk.",
    )
    pixel_store: Literal["auto", "resident", "streamed"] = option(
        "auto",
        "Where decoded images live: resident in memory, or streamed by loader processes; auto goes by "
        "their size and the free memory.",
    )
    on_bad_image: Literal["error", "skip"] = option(
        "error",
        "What images that cannot be read do: stop the run before its first step, with every row named, or "
        "stay out of it, as the model card then says.",
    )
    max_image_pixels: int = option(
        MAX_IMAGE_PIXELS,
        "An image of more pixels cannot be read: it is refused before it is decoded.",
    )

    def __post_init__(self) -> None:
        if not 0 < self.train_val_split < 1:
            raise UserError(
                f"--train_val_split is {self.train_val_split}; it must lie between 0 and 1, for example 0.1"
            )
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} is {value}; it must be at least 1")
        if self.streaming and self.pixel_store == "resident":
            raise UserError("--streaming and --pixel_store resident exclude each other")
        if self.streaming and self.on_bad_image == "skip":
            raise UserError(
                "--on_bad_image skip does not go with --streaming: nobody could say which rows it left out; "
                "leave one of them out"
            )
        check_max_image_pixels(self.max_image_pixels)


def check_max_image_pixels(value: int) -> None:
    """Raises: UserError for a --max_image_pixels that Pillow does not open."""
    if not 1 <= value <= PILLOW_PIXELS:
        raise UserError(f"--max_image_pixels is {value}; it must lie in 1..{PILLOW_PIXELS}")

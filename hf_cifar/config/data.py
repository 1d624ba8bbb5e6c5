"""Data options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hf_cifar.config.fields import check_fields, option
from hf_cifar.errors import UserError

MAX_IMAGE_PIXELS = 8192 * 8192
PILLOW_PIXELS = 178_956_970  # Pillow refuses larger files


@dataclass(frozen=True)
class DataConfig:
    """Which images and labels to use, and how they are split."""

    _argument_group_name = "data"

    dataset_name: str = option(
        "uoft-cs/cifar10",
        "Hub id, local folder (Hub layout, save_to_disk, or images in class folders), CIFAR archive, or "
        "bundled/digits.",
        public=False,
    )
    dataset_config_name: str | None = option(
        None, "Configuration of a data set that has more than one."
    )
    image_column_name: str | None = option(
        None,
        "Image column; default: found by its type, or by its name (such as image or img) among equals. "
        "Images, bytes, names of files, arrays or lists of pixels.",
    )
    label_column_name: str | None = option(
        None,
        "Label column; default: found by its type, or by its name (label, labels, class, target or category)"
        ". Class labels, strings, whole numbers or booleans; for multi-label data, lists of class labels or "
        "strings.",
    )
    train_val_split: float = option(
        0.1,
        "Fraction of train that becomes validation, stratified (not for a stream), if there is no "
        "validation split.",
    )
    split_seed: int = option(
        42, "Seed of the train/validation split and of every subsample.", low=0, high=2**32 - 1
    )
    max_train_samples: int | None = option(
        None, "Train on at most this many images, stratified; of a stream, on about as many.", low=1
    )
    max_eval_samples: int | None = option(
        None,
        "Evaluate at most this many images of validation or test, stratified; of a stream, the first.",
        low=1,
    )
    streaming: bool = option(
        False, "Read train shard by shard during training, for data larger than the disk."
    )
    pixel_store: Literal["auto", "resident", "streamed"] = option(
        "auto",
        "Decoded images: resident in memory, or streamed by loader processes; auto: by size and free "
        "memory.",
        may_change=True,
    )
    on_bad_image: Literal["error", "skip"] = option(
        "error",
        "Unreadable images: error stops before training and lists every row; skip leaves them out, and the "
        "model card records them.",
    )
    max_image_pixels: int = option(
        MAX_IMAGE_PIXELS,
        "Images with more pixels count as unreadable, and are not decoded.",
        low=1,
        high=PILLOW_PIXELS,
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.train_val_split < 1:
            raise UserError(
                f"--train_val_split is {self.train_val_split}; it must be between 0 and 1, for example 0.1"
            )
        if self.streaming and self.pixel_store == "resident":
            raise UserError("--streaming and --pixel_store resident cannot be combined")
        if self.streaming and self.on_bad_image == "skip":
            raise UserError(
                "--on_bad_image skip cannot be combined with --streaming: the skipped rows would be unknown; "
                "leave one of them out"
            )


def is_same_source(one: DataConfig, other: DataConfig) -> bool:
    """True if both name the same data set, whatever they select of it."""
    if one.dataset_config_name != other.dataset_config_name:
        return False
    paths = [Path(each.dataset_name).expanduser() for each in (one, other)]
    if all(path.exists() for path in paths):
        return paths[0].samefile(paths[1])
    return one.dataset_name == other.dataset_name

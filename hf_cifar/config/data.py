"""Data options."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hf_cifar.config.fields import check_fields, option
from hf_cifar.config.objects import named
from hf_cifar.errors import UserError

MAX_IMAGE_PIXELS = 8192 * 8192
PILLOW_PIXELS = 178_956_970  # Pillow refuses larger files
FULL_RANGE = "full"


@dataclass(frozen=True)
class ValueRange:
    """The values of images of more than 8 bits that become 0 and 255; low < high, both finite."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"no range of values: {self.low}, {self.high}")

    @classmethod
    def parse(cls, text: str) -> ValueRange:
        """Read `LOW,HIGH`. Raises: UserError unless they are two numbers, the lower one first."""
        try:
            low, high = (float(word) for word in text.split(","))
            return cls(low, high)
        except ValueError:
            raise UserError(
                f"--value_range is {text!r}; it takes LOW,HIGH, for example 0,4095 or "
                f"-1024,3000, or {FULL_RANGE}"
            ) from None

    def __str__(self) -> str:
        return ",".join(str(int(end) if end == int(end) else end) for end in (self.low, self.high))


@dataclass(frozen=True)
class DataConfig:
    """Which images and labels to use, and how they are split.

    In Python, `dataset_name` may be the data set itself, see `data.objects`.
    """

    _argument_group_name = "data"

    dataset_name: str = option(
        "uoft-cs/cifar10",
        "Hub id, local folder (images in class folders or with a table of labels, Hub layout, save_to_disk), "
        "zip or tar of one, CIFAR archive, or bundled/digits.",
        public=False,
    )
    dataset_config_name: str | None = option(
        None, "Configuration of a data set that has more than one."
    )
    folders: Literal["auto", "classes", "splits"] = option(
        "auto",
        "What the folders directly below a folder of images are; auto: splits if all are named train, "
        "validation, test or the like, else classes.",
    )
    labels_file: str | None = option(
        None,
        "CSV, TSV, JSON lines or Parquet file with the paths and labels of the images in --dataset_name; "
        "default: found there if there is exactly one.",
        public=False,
    )
    image_column_name: str | None = option(
        None,
        "Image column; default: found by its type, or by its name (such as image or img) if multiple fit. It "
        "holds images, bytes, file names, arrays or lists of pixels.",
    )
    label_column_name: str | None = option(
        None,
        "Label column; default: found by its type, or by its name (label, labels, class, target or category)"
        ". It holds class labels, strings, whole numbers or booleans; for multi-label data, lists of class "
        "labels or strings.",
    )
    group_column_name: str | None = option(
        None,
        "Column that groups images, for example by patient or camera: no group is divided between training "
        "and validation, or between folds.",
    )
    train_val_split: float = option(
        0.1,
        "Fraction of train that becomes validation, stratified (not for a stream), if there is no "
        "validation split.",
    )
    split_seed: int = option(
        42, "Seed of the train/validation split and of every subsample.", low=0, high=2**32 - 1
    )
    num_folds: int | None = option(
        None,
        "Divide train into this many stratified folds, instead of using --train_val_split.",
        low=2,
    )
    fold: int | None = option(
        None,
        "Number of the fold to validate on, from 1; train is the others. hf-cifar kfold runs all folds.",
        low=1,
    )
    imbalance_factor: float = option(
        1.0,
        "Train on a long tail: the first class keeps its images, the last one this many times fewer, those "
        "between fall exponentially.",
        low=1, high=1e6,
    )  # fmt: skip
    shots: int | None = option(None, "Train on this many images of each class.", low=1)
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
    pixel_store: Literal["auto", "resident", "disk", "streamed"] = option(
        "auto",
        "Prepared images: resident in memory, read from disk, or streamed (decoded at each use); auto: by "
        "their size, free memory and free disk.",
        may_change=True,
    )
    check_images: Literal["auto", "all", "used"] = option(
        "auto",
        "When training images are decoded and checked: all, before training, or used, each at its first use, "
        "so that training starts at once; auto: all if that takes at most ten seconds.",
    )
    on_bad_image: Literal["error", "skip"] = option(
        "error",
        "Unreadable images: error stops and lists every row; skip leaves them out, and the model card "
        "records them.",
    )
    value_range: str | None = option(
        None,
        "Images of more than 8 bits: LOW,HIGH, the values that become black and white, or full for the whole "
        "range of the file's type; default: the range of 99.8% of the training images' values.",
    )
    max_image_pixels: int = option(
        MAX_IMAGE_PIXELS,
        "Images with more pixels count as unreadable, and are not decoded.",
        low=1,
        high=PILLOW_PIXELS,
    )

    stored_rows: str | None = option(
        None,
        "Parquet file with rows of earlier data, written by hf-cifar update: they are added to train, "
        "validation and test, and their classes come first.",
        may_change=True, public=False,
    )  # fmt: skip

    def __post_init__(self) -> None:
        object.__setattr__(self, "dataset_name", named(self.dataset_name))
        check_fields(self)
        if not 0 < self.train_val_split < 1:
            raise UserError(
                f"--train_val_split is {self.train_val_split}; it must be between 0 and 1, for example 0.1"
            )
        if self.value_range is not None and self.value_range != FULL_RANGE:
            ValueRange.parse(self.value_range)
        if self.streaming and self.pixel_store == "resident":
            raise UserError("--streaming and --pixel_store resident cannot be combined")
        if self.fold is not None and self.fold > (self.num_folds or 0):
            raise UserError(
                f"--fold is {self.fold}, but "
                + (
                    "--num_folds is not given"
                    if self.num_folds is None
                    else f"there are {self.num_folds}"
                )
                + "; pass a --num_folds of at least that"
            )
        for name, default in (
            ("streaming", False), ("num_folds", None), ("shots", None), ("imbalance_factor", 1.0),
        ):  # fmt: skip
            if self.stored_rows is not None and getattr(self, name) != default:
                raise UserError(
                    f"--{name} cannot be combined with --stored_rows, which hf-cifar update passes; leave "
                    "it out"
                )
        for name in ("num_folds", "group_column_name"):
            if self.streaming and getattr(self, name) is not None:
                raise UserError(
                    f"--{name} needs every row before training, and a stream is not read in advance; leave "
                    f"out --{name} or --streaming"
                )
        if self.streaming and (self.imbalance_factor != 1 or self.shots is not None):
            raise UserError(
                "--imbalance_factor and --shots choose rows by class, which a stream does not know; leave "
                "them out, or --streaming"
            )
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

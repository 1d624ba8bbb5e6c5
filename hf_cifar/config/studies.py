"""Options of commands about multiple runs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from hf_cifar.config.deployment import MOVED_DATA
from hf_cifar.config.fields import check_fields, option
from hf_cifar.errors import UserError


@dataclass(frozen=True)
class ReproduceConfig:
    """Where to rerun a run, and on which data."""

    _argument_group_name = "reproduction"

    output_dir: str | None = option(
        None, "Folder of the new run; default: the run's folder plus -reproduced."
    )
    other_data: bool = option(False, "Continue even if rows, labels or pixels have changed.")


@dataclass(frozen=True)
class ListConfig:
    """How to list runs."""

    _argument_group_name = "list"

    json: bool = option(False, "Print a JSON record per line instead of a table.")


@dataclass(frozen=True)
class KFoldConfig:
    """How to cross-validate."""

    _argument_group_name = "cross-validation"

    folds: int = option(
        5, "Number of folds; each run validates on one of them, and trains on the others.", low=2
    )
    distill_into: str | None = option(
        None,
        "Then combine the folds into an ensemble, and distil it into this student, in OUTPUT_DIR/student: a "
        "model, or a recipe or YAML file with options that replace those of the folds.",
    )

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class SearchConfig:
    """What to search, how, and for how long."""

    _argument_group_name = "search"

    n_trials: int | None = option(
        None,
        "Number of trials, of all processes together; default: 30, or as many as --time_limit allows, or the "
        "complete grid.",
        low=1,
    )
    time_limit: str | None = option(
        None,
        "Time, such as 30m or 1h30m, after which no trial starts and the running one stops at a checkpoint; "
        "then the winner is trained again.",
    )
    sampler: Literal["tpe", "random", "grid"] = option(
        "tpe",
        "tpe: tree-structured Parzen estimator, which learns from earlier trials; random: random values; "
        "grid: every combination of the lists of --space.",
    )
    prune: bool = option(
        True,
        "Stop a trial whose metric on validation is worse than the median of the others at the same point.",
    )
    space: str | None = option(
        None,
        "YAML file with a range {low: X, high: X, log: true} or a list of choices for each option to search; "
        "default: learning rate, weight decay and a few others, depending on what is trained.",
    )
    storage: str | None = option(
        None,
        "Database URL, for example postgresql+psycopg://USER@HOST/NAME; default: the file "
        "OUTPUT_DIR/journal.log.",
        saved=False, public=False,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_fields(self)
        if self.time_limit is not None:
            seconds_of(self.time_limit)

    @property
    def seconds(self) -> float | None:
        """The time limit in seconds."""
        return None if self.time_limit is None else seconds_of(self.time_limit)


def seconds_of(limit: str) -> float:
    """Return a time such as 90, 90s, 30m or 1h30m in seconds. Raises: UserError for anything else."""
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", limit.strip().lower())
    hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0)
    total = 3600 * hours + 60 * minutes + seconds
    if not total:
        raise UserError(
            f"--time_limit is {limit!r}; it takes a time above 0, such as 90s, 30m or 1h30m"
        )
    return total


@dataclass(frozen=True)
class CombineConfig:
    """How to combine finished runs."""

    _argument_group_name = "combination"

    output_dir: str = option("", "Folder of the combined run.")
    method: Literal["ensemble", "uniform_soup", "greedy_soup"] = option(
        "ensemble",
        "ensemble: the mean of the runs' probabilities; uniform_soup: one network with the mean of their "
        "weights; greedy_soup: the same, of only those runs that do not lower the accuracy on validation, "
        "added best first.",
    )
    views: Literal["image", "flip", "crops", "auto"] = option(
        "image",
        "Views of each image to average over. image: only the image; flip: also its mirror image; crops: "
        "also five crops; auto: the best of these on validation.",
    )
    do_predict: bool = option(False, "Also evaluate the combined run on test.")
    per_device_eval_batch_size: int = option(64, "Images per batch.", low=1)
    use_cpu: bool = option(False, "Compute on the CPU.")
    dataset_name: str | None = option(None, MOVED_DATA)

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.output_dir:
            raise UserError("--output_dir is missing; pass a new folder for the combined run")


@dataclass(frozen=True)
class UpdateConfig:
    """How to continue a run with new data."""

    _argument_group_name = "update"

    replay: int = option(
        500,
        "Number of the run's training rows, equally many of each class, to store and train on together with "
        "the new ones; 0 for none.",
        low=0,
    )
    compare_anew: bool = option(
        False,
        "Also train anew on the new rows and all rows of the run, from the model that the run started from, "
        "in OUTPUT_DIR/anew, and compare. If the run is itself an update, its rows are its own data and the "
        "rows that it had stored.",
    )
    old_data: str | None = option(None, MOVED_DATA)

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class DriftConfig:
    """Which images to compare with those of a run, and how."""

    _argument_group_name = "drift"

    dataset_config_name: str | None = option(
        None, "Configuration of DATA, if it has more than one."
    )
    image_column_name: str | None = option(
        None, "Image column of DATA; default: found by its type or name."
    )
    split: str | None = option(None, "Split of DATA to compare; default: all splits together.")
    alpha: float = option(
        0.05,
        "Largest probability of a false alarm, of both tests together.",
        low=0.001,
        high=0.5,
    )
    num_images: int = option(
        2000,
        "Largest number of images of the run, and of DATA, to compare; if there are more, that many are "
        "drawn with a fixed seed.",
        low=20,
        high=10_000,
    )
    output_dir: str | None = option(
        None,
        "New folder for the page drift.html and its numbers, drift.json; default: neither is written.",
    )
    gallery_size: int = option(
        24, "Number of images on the page, those least like the run's images; 0 for none.", low=0
    )
    dataset_name: str | None = option(None, MOVED_DATA)
    use_cpu: bool = option(False, "Compute on the CPU even if there is a GPU.")

    def __post_init__(self) -> None:
        check_fields(self)

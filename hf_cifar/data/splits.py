"""Train and validation, never test: the splits that a run may look at."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from datasets import Dataset

from hf_cifar.config.data import DataConfig
from hf_cifar.data.columns import class_counts, class_label, label_array
from hf_cifar.data.sources import load_source
from hf_cifar.data.split import Split, find_faults, render_rows, subset
from hf_cifar.data.stratify import stratified, subsample
from hf_cifar.data.streams import Stream, gather, load_streams, num_rows, require_every_class
from hf_cifar.errors import UserError

logger = logging.getLogger(__name__)
VALIDATION_NAMES = ("validation", "valid", "val", "dev", "eval")


@dataclass(frozen=True, eq=False)
class Splits:
    """What training may see. There is no test split here; see `load_test_split`."""

    train: Split | Stream
    validation: Split

    @property
    def id2label(self) -> dict[int, str]:
        return self.train.id2label

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several labels, or none."""
        return self.validation.labels.ndim == 2

    @functools.cached_property
    def hash(self) -> str:
        """Identifies the split: SHA-256 over the row ids, labels and label counts of both parts; of a stream,
        over how many images it has, and which share of them, by which seed, trains."""
        digest = hashlib.sha256()
        for split in (self.train, self.validation):
            if isinstance(split, Stream):
                header = [split.source_split, len(split), split.held_out, split.end, split.seed]
                digest.update(json.dumps([*header, list(self.id2label.values())]).encode())
                continue
            counts = class_counts(split.labels, len(self.id2label)).tolist()
            header = [split.name, split.source_split, counts, list(self.id2label.values())]
            digest.update(json.dumps(header).encode())
            digest.update(split.row_ids.astype("<i8").tobytes())
            digest.update(split.labels.astype("<i8").tobytes())
        return digest.hexdigest()


@functools.lru_cache(maxsize=1)
def load_splits(config: DataConfig) -> Splits:
    """Train and validation, seeded and stratified; the data set's own validation split if it has one.

    The last result is kept: asking twice costs nothing.
    Raises: UserError for data that cannot be trained on.
    """
    if config.streaming:
        return _load_streamed_splits(config)
    source = load_source(config)
    train_name = _train_name(source)
    train = source[train_name]
    labels = label_array(train)
    names = class_label(train.features["label"]).names
    _require_classes(names, config)
    _require_every_class(labels, names, "image", train_name)
    own = _own_validation(source)
    if own is not None:
        validation = _split("validation", source[own], own, np.arange(len(source[own])))
        train_ids = np.arange(len(train))
    else:
        train_ids, validation_ids = stratified(
            labels, config.train_val_split, names, config.split_seed, train_name
        )
        validation = _split("validation", train, train_name, validation_ids)
    train = subsample(
        _split("train", train, train_name, train_ids),
        config.max_train_samples, config.split_seed, "--max_train_samples",
    )  # fmt: skip
    validation = subsample(
        validation, config.max_eval_samples, config.split_seed, "--max_eval_samples"
    )
    splits = Splits(_as_asked(train, config), _as_asked(validation, config))
    _require_every_class(splits.train.labels, names, "readable image", train_name)
    return splits


def _require_every_class(labels: np.ndarray, names: list[str], what: str, where: str) -> None:
    counts = class_counts(labels, len(names))
    missing = [name for name, count in zip(names, counts, strict=True) if not count]
    if missing:
        raise UserError(
            f"class {missing[0]!r} has no {what} in {where} ({len(missing)} of {len(names)} classes are "
            "missing); add images or drop its name"
        )


def _as_asked(split: Split, config: DataConfig) -> Split:
    """The split with the limit on its images' size, and with --on_bad_image skip without those that cannot be
    read."""
    split = replace(split, max_pixels=config.max_image_pixels)
    if config.on_bad_image == "error":
        return split
    faults = find_faults(split, config.pixel_store)
    if not faults:
        return split
    bad = np.array(list(faults))
    kept = np.setdiff1d(np.arange(len(split)), bad)
    if not len(kept):
        raise UserError(f"no image of {split.name} can be read: {next(iter(faults.values()))}")
    logger.warning(
        "%s: %s of %s images cannot be read and are left out, %s",
        split.name, f"{len(bad):,}", f"{len(split):,}", render_rows([(split, faults)]),
    )  # fmt: skip
    return replace(subset(split, kept), skipped=split.row_ids[bad])


def _load_streamed_splits(config: DataConfig) -> Splits:
    """As `load_splits`, of a data set of which only validation is read here."""
    source = load_streams(config)
    train_name = _train_name(source)
    train = source[train_name]
    _require_classes(train.features["label"].names, config)
    own = _own_validation(source)
    limit, held_out, seed = config.max_eval_samples, config.train_val_split, config.split_seed
    if own is not None:
        held_out = 0.0
        rows, row_ids = gather(own, source[own], limit)
    elif limit is None:
        raise UserError(
            f"{config.dataset_name} has no validation split, and a stream is not read to the end for one; "
            "pass --max_eval_samples, say 5000, to hold out that many of its first images"
        )
    else:
        rows, row_ids = gather(train_name, train, limit, held_out, seed)
    require_every_class(rows, "validation")
    size, most, end = num_rows(train, train_name), config.max_train_samples, 1.0
    num_images = most if size is None else round(size * (1 - held_out))
    if size is not None and most is not None and most < num_images:
        end = held_out + (1 - held_out) * most / num_images
        num_images = most
    return Splits(
        train=Stream(
            "train", train_name, train, num_images, held_out, end, seed, config.max_image_pixels
        ),
        validation=Split("validation", rows, row_ids, own or train_name, config.max_image_pixels),
    )


def _require_classes(names: Sequence[str], config: DataConfig) -> None:
    if len(names) < 2:
        raise UserError(
            f"{config.dataset_name} has {len(names)} class; a classifier needs two or more"
        )


def _own_validation(source: Mapping) -> str | None:
    return next((name for name in VALIDATION_NAMES if name in source), None)


@functools.lru_cache(maxsize=1)
def load_test_split(config: DataConfig) -> Split:
    """The test split, labelled. For the final evaluation alone: nothing that is tuned may read it.

    Before, it may only be asked whether its images can be read, and whether train holds them too.

    Raises: UserError if the data set has no labelled test split.
    """
    require_test_split(config)
    if config.streaming:
        rows, row_ids = gather("test", load_streams(config)["test"], config.max_eval_samples)
        return Split("test", rows, row_ids, "test", config.max_image_pixels)
    source = load_source(config)
    test = _split("test", source["test"], "test", np.arange(len(source["test"])))
    test = subsample(test, config.max_eval_samples, config.split_seed, "--max_eval_samples")
    return _as_asked(test, config)


def require_test_split(config: DataConfig) -> None:
    """Raises: UserError if the data set has no labelled test split."""
    source = load_streams(config) if config.streaming else load_source(config)
    if config.streaming and "test" in source:
        first = next(iter(source["test"]), {"label": None})
        if first["label"] in (None, -1):
            source = {name: rows for name, rows in source.items() if name != "test"}
    if "test" not in source:
        raise UserError(
            f"data set {config.dataset_name} has no labelled test split, only {list(source)}; leave out "
            "--do_predict and --check_leakage, or evaluate with --split validation"
        )


def _train_name(source: Mapping) -> str:
    if "train" in source:
        return "train"
    # A lone split is to be trained on, whatever its name, unless the name says that it is not.
    if len(source) == 1 and not {"test", *VALIDATION_NAMES}.intersection(source):
        return next(iter(source))
    raise UserError(
        f"no train split among {list(source)}; name one of them train, or pass its folder alone"
    )


def _split(name: str, rows: Dataset, source_split: str, row_ids: Sequence[int]) -> Split:
    row_ids = np.asarray(row_ids, dtype=np.int64)
    if len(row_ids) < len(rows):
        rows = rows.select(row_ids)
    return Split(name, rows, row_ids, source_split)

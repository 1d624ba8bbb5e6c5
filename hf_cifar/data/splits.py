"""Open a data set once and split it into train and validation; test is kept for the final evaluation."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, IterableDataset

from hf_cifar.config.data import FULL_RANGE, DataConfig, ValueRange
from hf_cifar.data.columns import standard_split
from hf_cifar.data.images import find_value_range, read_encoded
from hf_cifar.data.labels import (
    SHOWN_CLASSES,
    class_counts,
    class_label,
    is_hidden,
    label_array,
    with_known_classes,
)
from hf_cifar.data.pixels import Pixels
from hf_cifar.data.sources import Source, announced, open_data_set, read_source
from hf_cifar.data.split import Split, UnreadableImages, readable, with_images
from hf_cifar.data.stored import COPY, StoredRows, stored_split, without_known_splits
from hf_cifar.data.stratify import assign_folds, few_shot, long_tail, stratified, subsample
from hf_cifar.data.streams import (
    Stream,
    collect,
    load_streams,
    num_rows,
    require_every_class,
)
from hf_cifar.errors import UserError
from hf_cifar.text import listed

if TYPE_CHECKING:  # mistakes in data are found without importing torch
    import torch

    from hf_cifar.transforms.preprocessing import Preprocessing

logger = logging.getLogger(__name__)
# Training images examined for more than 8 bits; of a stream, the first ones.
IMAGES_FOR_RANGE, STREAMED_FOR_RANGE = 500, 64
# The name of the split of all images of train, each predicted by a model that was not trained on it.
OUT_OF_FOLD = "out_of_fold"
VALIDATION_NAMES = ("validation", "valid", "val", "dev", "eval")


@dataclass(frozen=True, eq=False)
class Splits:
    """The splits that training may see. Test is not among them; see `load_test_split`."""

    train: Split | Stream
    validation: Split

    @property
    def id2label(self) -> dict[int, str]:
        return self.train.id2label

    @property
    def multi_label(self) -> bool:
        """True if an image may have multiple labels, or none."""
        return self.validation.labels.ndim == 2

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of the row ids, labels and label counts of both parts; for a stream, of its number of
        images and of the shares and the seed that determine which images train."""
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


class DataSource:
    """A data set that is opened once: pass it on instead of loading the data again.

    Its images are freed together with it and the splits made from it. own: the data set itself, without
    stored rows, if it is open already.
    """

    def __init__(self, config: DataConfig, own: Source | None = None) -> None:
        self.config, self._own = config, own
        self._pixels: dict[str, Pixels] = {}

    def sharing(self, config: DataConfig) -> DataSource:
        """Return the same data divided by other options; both share the decoded images.

        config: may differ from that of this source only in the options that choose rows.
        """
        other = DataSource(config)
        other._pixels = self._pixels
        # Cached properties of this source, which those options do not change.
        if not config.streaming:
            vars(other)["_source"] = self._source
            vars(other)["stored"] = self.stored
            vars(other)["value_range"] = self.value_range
        return other

    @functools.cached_property
    def splits(self) -> Splits:
        """Train and validation, see `load_splits`."""
        return _streamed_splits(self) if self.config.streaming else _splits(self)

    @functools.cached_property
    def test_split(self) -> Split:
        """Test, for the final evaluation only, see `load_test_split`."""
        return _test_split(self)

    @functools.cached_property
    def folded_split(self) -> Split:
        """All images that folds divide: the source's own train."""
        return _whole_split(OUT_OF_FOLD, self.pixels(_train_name(self.rows)))

    @functools.cached_property
    def rows(self) -> Mapping[str, Dataset | IterableDataset]:
        """All rows by the source's own splits, with columns image (encoded) and label."""
        return load_streams(self.config) if self.config.streaming else self._source.splits

    @functools.cached_property
    def stored(self) -> StoredRows | None:
        """The rows of earlier data that are added; None without --stored_rows."""
        path = self.config.stored_rows
        return None if path is None else StoredRows.load(path)

    @functools.cached_property
    def _source(self) -> Source:
        stored = self.stored
        known = () if stored is None else stored.class_names
        source = self._own or read_source(self.config, known)
        if stored is None:
            return source
        splits = without_known_splits(source.splits, stored.note["copies"])
        joined = stored.joined(splits, _train_name(splits), _own_validation(splits))
        return replace(source, splits=joined)

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """What the source is, as plain values: a line about it, images by split, and what is left out, by
        reason; empty for a stream, which is not counted."""
        if self.config.streaming:
            return {}
        stored = {}
        if self.stored is not None:
            stored = {
                "num_own": {split: num_own_rows(own) for split, own in self.rows.items()},
                "stored": {
                    **self.stored.note,
                    "copies": {
                        split: len(rows) for split, rows in self.stored.note["copies"].items()
                    },
                    "num_train": len(self.stored.of("train")),
                },
            }
        return stored | {
            "description": self._source.description,
            "num_images": {split: len(rows) for split, rows in self.rows.items()},
            "left_out": self._source.left_out,
            "rows_left_out": self._source.rows_left_out,
        }

    def pixels(self, source_split: str) -> Pixels:
        """The images of one of the source's own splits, shared by all splits made from it."""
        if source_split not in self._pixels:
            self._pixels[source_split] = self.pixels_of(source_split, self.rows[source_split])
        return self._pixels[source_split]

    def pixels_of(
        self, source_split: str, rows: Dataset, row_ids: np.ndarray | None = None
    ) -> Pixels:
        """The images of some rows, read as the options say."""
        limit = self.config.max_image_pixels
        return Pixels(source_split, rows, row_ids, limit, self.value_range)

    @functools.cached_property
    def value_range(self) -> ValueRange | None:
        """The values of images of more than 8 bits that become black and white: of --value_range, or found
        in the source's own train split. None for the full range of their type, or without such images.

        The rows are the same in every process, for every split of train, and when a run resumes.
        """
        if self.config.value_range is not None:
            return requested_range(self.config)
        return range_of_rows(self.rows[_train_name(self.rows)], self.config)


def num_own_rows(rows: Dataset) -> int:
    """Return the number of the data set's own rows, which come before the stored ones."""
    return int(np.count_nonzero(np.isin(stored_split(rows), ("", COPY))))


def _own_places(rows: Dataset) -> np.ndarray:
    """Return the places of the rows of a data set itself that are used, sorted."""
    return np.flatnonzero(stored_split(rows) == "")


def range_of_rows(rows: Dataset | IterableDataset, config: DataConfig) -> ValueRange | None:
    """Find the range of some of the images, see `find_value_range`."""
    if isinstance(rows, IterableDataset):
        first = islice(rows, STREAMED_FOR_RANGE)
        cells = ({"bytes": read_encoded(row["image"])} for row in first)
    else:
        places = np.linspace(0, len(rows) - 1, min(len(rows), IMAGES_FOR_RANGE))
        cells = (rows[int(place)]["image"] for place in places.round())
    return find_value_range(cells, config.max_image_pixels)


def requested_range(config: DataConfig) -> ValueRange | None:
    """Return the range of --value_range; None if it is not given, or the full range of the images' type."""
    requested = config.value_range
    return None if requested in (None, FULL_RANGE) else ValueRange.parse(requested)


def load_splits(config: DataConfig) -> Splits:
    """Load train and validation: a seeded, stratified split, or the data set's own validation if it has one.

    Each call loads the data set again; a `DataSource` loads it once.
    Raises: UserError for data that cannot be trained on.
    """
    return DataSource(config).splits


def load_test_split(config: DataConfig) -> Split:
    """Load the labelled test split, for the final evaluation only: nothing may be tuned on it.

    Before that, only two checks may read it: are its images readable, and does train contain them.

    Raises: UserError if the data set has no labelled test split.
    """
    return DataSource(config).test_split


def prepare_splits(
    splits: Splits,
    preprocessing: Preprocessing,
    config: DataConfig,
    device: torch.device | None = None,
) -> Splits:
    """Return the splits with their images for a model, decoded in one pass, see `readable`.

    With --check_images used, training images are decoded, and found to be unreadable, during training.
    Raises: UserError for unreadable images, or a class that loses its last image with them.
    """
    kind = config.pixel_store
    validation = with_images(splits.validation, preprocessing, kind=kind, device=device)
    if not isinstance(splits.train, Split):
        return Splits(splits.train, *readable(validation, on_bad_image=config.on_bad_image))
    lazy = config.check_images == "used"
    train = with_images(
        splits.train, preprocessing, augmented=True, kind=kind, lazy=lazy, device=device
    )
    if lazy:
        try:
            return Splits(train, *readable(validation, on_bad_image=config.on_bad_image))
        except UnreadableImages:
            logger.warning("a validation image cannot be read; checking the training images")
    train, validation = readable(train, validation, on_bad_image=config.on_bad_image)
    # A class may have had no images before: an update keeps the classes of its run.
    names = list(splits.id2label.values())
    absent = class_counts(splits.train.labels, len(names)) == 0
    require_every_class_of(train.labels, names, train.source_split, absent)
    return Splits(train, validation)


def load_other_split(config: DataConfig, name: str, class_names: Sequence[str]) -> Split:
    """Load validation or test of data on which a model was not trained, with the classes of the model.

    Classes are matched by name; some may have no images. A data set without splits is loaded whole.
    Raises: UserError for classes that the model does not know, or a data set without such a split.
    """
    found: Mapping[str, Dataset | IterableDataset]
    found = (
        load_streams(config)
        if config.streaming
        else announced(open_data_set(config, known=class_names), config).splits
    )
    source_split = _other_split(found, name, config)
    given, row_ids = found[source_split], None
    if isinstance(given, IterableDataset):
        rows, row_ids = collect(source_split, given, config.max_eval_samples)
    else:
        rows = standard_split(given, source_split, config)
    if not len(rows) or is_hidden(rows):
        raise UserError(
            f"split {source_split} of {config.dataset_name} has no {'labels' if len(rows) else 'images'}; "
            "pass another --dataset_name or --split"
        )
    rows = with_known_classes(rows, class_names, source_split)
    limit, values = config.max_image_pixels, requested_range(config)
    whole = _whole_split(name, Pixels(source_split, rows, row_ids, limit, values))
    _state_absent(whole, f"{source_split} of {config.dataset_name}")
    return _sampled(whole, "max_eval_samples", config)


def _state_absent(split: Split, where: str) -> None:
    """Log the classes of which a split has no images: no metric is about them."""
    names = list(split.id2label.values())
    counts = class_counts(split.labels, len(names))
    if absent := [name for name, count in zip(names, counts, strict=True) if not count]:
        logger.info(
            "%s of %s classes have no images in %s: %s", f"{len(absent):,}", f"{len(names):,}", where,
            listed(absent, SHOWN_CLASSES),
        )  # fmt: skip


def is_named(split: Split) -> bool:
    """True if the source itself calls it validation or test; False for a part of train, or a source without
    splits."""
    return split.source_split in ("test", *VALIDATION_NAMES)


def _other_split(found: Mapping, name: str, config: DataConfig) -> str:
    """Name of the split to evaluate: the one of that name, or the only one of a source without splits."""
    named = {
        each: next((own for own in names if own in found), None)
        for each, names in (("validation", VALIDATION_NAMES), ("test", ("test",)))
    }
    chosen, other = named.pop(name), *named
    if chosen is not None:
        return chosen
    if len(found) == 1 and named[other] is None:
        return next(iter(found))
    advice = f"--split {other}" if named[other] else "--dataset_name with only those to evaluate"
    raise UserError(f"{config.dataset_name} has no {name} split, only {list(found)}; pass {advice}")


def _splits(source: DataSource) -> Splits:
    config, rows = source.config, source.rows
    train_name = _train_name(rows)
    train = source.pixels(train_name)
    own_rows = _own_places(train.rows)
    labels = label_array(train.rows)[own_rows]
    names = class_label(train.rows.features["label"]).names
    _require_classes(names, config)
    own = _own_validation(rows)
    if own is not None and config.num_folds is None:
        validation = _whole_split("validation", source.pixels(own))
        train_rows = own_rows
    else:
        parts = _divide(source, own_rows, labels, names, train_name)
        train_rows, validation_rows = (own_rows[part] for part in parts)
        validation = Split("validation", train, validation_rows)
    train_split = long_tail(
        Split("train", train, train_rows), config.imbalance_factor, config.split_seed
    )
    train_split = few_shot(train_split, config.shots, config.split_seed)
    train_split = _sampled(train_split, "max_train_samples", config)
    validation = _sampled(validation, "max_eval_samples", config)
    return Splits(_with_stored(train_split), _with_stored(validation))


def _divide(
    source: DataSource, own_rows: np.ndarray, labels: np.ndarray, names: list[str], split: str
) -> tuple[np.ndarray, np.ndarray]:
    """Divide rows of train into two sorted arrays of places among them: train and validation."""
    config, rows = source.config, source.rows[split].select(own_rows)
    groups = None if config.group_column_name is None else _groups_of(rows, config)
    if config.num_folds is None and groups is None:
        return stratified(labels, config.train_val_split, names, config.split_seed, split)
    # With whole groups, validation is one fold of about its size.
    num_folds = config.num_folds or max(2, round(1 / config.train_val_split))
    number = config.fold or (1 if config.num_folds is None else None)
    if number is None:
        raise UserError(
            f"--num_folds {num_folds} needs --fold, the number of the fold to validate on, from 1 to "
            f"{num_folds}; hf-cifar kfold --folds {num_folds} runs all folds"
        )
    num_units = len(rows) if groups is None else len(np.unique(groups))
    if config.num_folds is None:
        num_folds = min(num_folds, num_units)
    if num_folds > num_units or num_units < 2:
        units = "images" if groups is None else f"groups in column {config.group_column_name!r}"
        raise UserError(
            f"{split} has {num_units:,} {units}, too few for {num_folds} folds; pass fewer folds, or add data"
        )
    if config.num_folds and _own_validation(source.rows):
        logger.warning(
            "the folds divide %s; the data set's own validation split is not used", split
        )
    fold_of = assign_folds(labels, num_folds, config.split_seed, groups)
    in_fold = fold_of == number - 1
    if groups is not None:
        logger.info(
            "validation: %s of %s groups of column %r, %s of %s images",
            f"{len(np.unique(groups[in_fold])):,}", f"{num_units:,}", config.group_column_name,
            f"{np.count_nonzero(in_fold):,}", f"{len(rows):,}",
        )  # fmt: skip
    return np.flatnonzero(~in_fold), np.flatnonzero(in_fold)


def _groups_of(rows: Dataset, config: DataConfig) -> np.ndarray:
    """Return the number of each row's group [N]; a row without one is a group of its own."""
    values = rows["group"][:]
    missing = [position for position, value in enumerate(values) if value in (None, "")]
    if missing:
        logger.warning(
            "%s of %s images have no value in column %r; each of them is a group of its own",
            f"{len(missing):,}", f"{len(values):,}", config.group_column_name,
        )  # fmt: skip
    numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
    groups = np.array([numbers[value] for value in values])
    groups[missing] = len(numbers) + np.arange(len(missing))
    return groups


def _test_split(source: DataSource) -> Split:
    require_test_split(source)
    config = source.config
    if config.streaming:
        rows, row_ids = collect("test", source.rows["test"], config.max_eval_samples)
        return _whole_split("test", source.pixels_of("test", rows, row_ids))
    test = _whole_split("test", source.pixels("test"))
    test = _with_stored(_sampled(test, "max_eval_samples", config))
    _state_absent(test, "test")
    return test


def _whole_split(name: str, pixels: Pixels) -> Split:
    """Return all rows of a source's own split, without stored ones."""
    return Split(name, pixels, _own_places(pixels.rows))


def _with_stored(split: Split) -> Split:
    """Append the stored rows of a split to those chosen from the data set."""
    stored = np.flatnonzero(stored_split(split.pixels.rows) == split.name)
    return replace(split, positions=np.concatenate([split.positions, stored]))


def _sampled(split: Split, limit: str, config: DataConfig) -> Split:
    return subsample(split, getattr(config, limit), config.split_seed, f"--{limit}")


def require_every_class_of(
    labels: np.ndarray, names: list[str], where: str, absent: np.ndarray | None = None
) -> None:
    """Raises: UserError if a class has no images. absent: True for those that need none, [K]."""
    counts = class_counts(labels, len(names))
    if absent is not None:
        counts = counts + absent
    missing = [name for name, count in zip(names, counts, strict=True) if not count]
    if missing:
        raise UserError(
            f"class {missing[0]!r} has no readable image in {where} ({len(missing)} of {len(names)} classes "
            "are missing); add images or remove the class"
        )


def _streamed_splits(source: DataSource) -> Splits:
    """Make the splits of a streamed data set; only validation is read here."""
    config, streams = source.config, source.rows
    train_name = _train_name(streams)
    train = streams[train_name]
    _require_classes(train.features["label"].names, config)
    own = _own_validation(streams)
    limit, held_out, seed = config.max_eval_samples, config.train_val_split, config.split_seed
    if own is not None:
        held_out = 0.0
        rows, row_ids = collect(own, streams[own], limit)
    elif limit is None:
        raise UserError(
            f"{config.dataset_name} has no validation split, and drawing one would read the whole stream; "
            "pass --max_eval_samples 5000, for example, to hold out that many of its first images"
        )
    else:
        rows, row_ids = collect(train_name, train, limit, held_out, seed)
    require_every_class(rows, "validation")
    size, most, end = num_rows(train, train_name), config.max_train_samples, 1.0
    num_images = most
    if size is not None:
        num_images = round(size * (1 - held_out))
        if most is not None and most < num_images:
            end = held_out + (1 - held_out) * most / num_images
            num_images = most
    return Splits(
        train=Stream(
            "train", train_name, train, num_images, held_out, end, seed,
            config.max_image_pixels, source.value_range,
        ),
        validation=_whole_split("validation", source.pixels_of(own or train_name, rows, row_ids)),
    )  # fmt: skip


def _require_classes(names: Sequence[str], config: DataConfig) -> None:
    if len(names) < 2:
        raise UserError(
            f"{config.dataset_name} has {len(names)} class; a classifier needs at least two"
        )


def _own_validation(source: Mapping) -> str | None:
    return next((name for name in VALIDATION_NAMES if name in source), None)


def require_test_split(source: DataSource) -> None:
    """Raises: UserError if the data set has no labelled test split."""
    rows = source.rows
    if source.config.streaming and "test" in rows:
        first = next(iter(rows["test"]), {"label": None})
        if first["label"] in (None, -1):
            rows = {name: each for name, each in rows.items() if name != "test"}
    if "test" not in rows:
        raise UserError(
            f"data set {source.config.dataset_name} has no labelled test split, only {list(rows)}; add one, "
            "such as a folder test/ with the classes, or leave out what reads it: --do_predict, "
            "--check_leakage, --split test"
        )


def _train_name(source: Mapping) -> str:
    if "train" in source:
        return "train"
    # A single split is train, unless its name says otherwise.
    if len(source) == 1 and not {"test", *VALIDATION_NAMES}.intersection(source):
        return next(iter(source))
    raise UserError(
        f"no train split among {list(source)}; rename one to train, or pass only its folder"
    )

"""Train and validation, never test: the splits that a run may look at."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import psutil
from datasets import Dataset
from tqdm.auto import tqdm

from hf_cifar.config.data import MAX_IMAGE_PIXELS, DataConfig
from hf_cifar.data.disk_cache import (
    content_key,
    load_array,
    one_process_at_a_time,
    save_array,
)
from hf_cifar.data.images import decode_cell, decode_cells
from hf_cifar.data.multilabel import (
    class_counts,
    class_label,
    fewest_images,
    label_array,
    stratified_choice,
)
from hf_cifar.data.sources import load_source
from hf_cifar.data.streams import (
    Stream,
    gather,
    load_streams,
    num_rows,
    require_every_class,
)
from hf_cifar.errors import UserError
from hf_cifar.text import render_numbers

logger = logging.getLogger(__name__)
VALIDATION_NAMES = ("validation", "valid", "val", "dev", "eval")
# Share of the free memory that the decoded images of a split may take.
MEMORY_SHARE = 0.25


def memory_to_spare() -> int:
    """Bytes of memory that this process may fill with the decoded images of one split."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(psutil.virtual_memory().available * MEMORY_SHARE / processes)


@dataclass(frozen=True, eq=False)
class Split:
    """Some rows of one split of a data set."""

    name: str
    rows: Dataset  # columns: image (encoded), label
    row_ids: np.ndarray  # [N] int64, position of each row in the data set's own split
    source_split: str  # the data set's split that row_ids count in
    max_pixels: int = MAX_IMAGE_PIXELS  # an image of more cannot be read
    # Row ids of what --on_bad_image skip has left out; where there are any, all that is here can be read.
    skipped: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self.row_ids)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """[N] int64 class ids; of multi-label data [N, K] uint8, 1 for each class of an image."""
        return label_array(self.rows)

    @property
    def id2label(self) -> dict[int, str]:
        return dict(enumerate(class_label(self.rows.features["label"]).names))

    def describe_row(self, position: int) -> str:
        """How error messages name a row: by the data set's own split and row number, and its file."""
        row = f"{self.source_split} row {self.row_ids[position]}"
        path = (self.rows[int(position)]["image"] or {}).get("path")
        return f"{row} ({path})" if path and os.path.exists(path) else row

    def decode(self, position: int) -> np.ndarray:
        """One image, [H, W, 3] uint8. Raises: UserError that names the row."""
        try:
            return decode_cell(self.rows[int(position)]["image"], self.max_pixels)
        except UserError as error:
            raise UserError(f"{self.describe_row(position)}: {error}") from None

    @functools.cached_property
    def images(self) -> np.ndarray | list[np.ndarray] | None:
        """All images, decoded once: uint8 [N, H, W, 3]; a list of [H, W, 3] if they differ in size.

        None if they take more memory than there is to spare: then they are decoded as they are needed.
        What has one size is kept on disk for the next run, see `disk_cache`.
        Raises: UnreadableImages that names the row of each image that cannot be read.
        """
        budget = memory_to_spare()
        try:
            first = self.decode(0)
        except UserError:
            return self._collect(budget)  # to find the others
        if first.nbytes * len(self) > budget:
            return None
        with one_process_at_a_time(self.content_key):
            images = load_array(self.content_key)
            if images is None:
                images = self._collect(budget)
                if isinstance(images, np.ndarray):
                    save_array(self.content_key, images)
        return images

    @functools.cached_property
    def content_key(self) -> str:
        """SHA-256 of the encoded images, see `disk_cache`."""
        return content_key(self.rows)

    @functools.cached_property
    def pixel_hash(self) -> str | None:
        """SHA-256 of all decoded images and their shapes, in order; None if they do not fit into memory."""
        if self.images is None:
            return None
        digest = hashlib.sha256()
        for image in self.images:
            digest.update(f"{image.shape} ".encode())
            digest.update(np.ascontiguousarray(image))
        return digest.hexdigest()

    def _collect(self, budget: int) -> np.ndarray | list[np.ndarray] | None:
        """Decode every image into one array, or into a list from the first that has another size."""
        images: np.ndarray | list[np.ndarray] | None = None
        for position, image in enumerate(self.decode_all()):
            budget -= image.nbytes
            if budget < 0:
                return None
            if images is None:
                images = np.empty((len(self), *image.shape), np.uint8)
            if isinstance(images, np.ndarray) and image.shape != images.shape[1:]:
                images = list(images[:position])
            if isinstance(images, np.ndarray):
                images[position] = image
            else:
                images.append(image)
        return images

    def decode_all(self) -> Iterator[np.ndarray]:
        """Every image in order, decoded on all cores, with a progress bar on a terminal.

        Raises: UnreadableImages, once all the others are decoded too.
        """
        faults: dict[int, str] = {}
        for position, image in enumerate(self._attempts()):
            if isinstance(image, UserError):
                faults[position] = str(image)
            elif not faults:
                yield image
        if faults:
            raise UnreadableImages([(self, faults)])

    def faults(self) -> dict[int, str]:
        """What is wrong with each image that cannot be read, by position. Decodes all and keeps none."""
        attempts = enumerate(self._attempts())
        return {position: str(each) for position, each in attempts if isinstance(each, UserError)}

    def _attempts(self) -> Iterator[np.ndarray | UserError]:
        with tqdm(
            total=len(self), desc=f"decoding {self.name}", disable=None, leave=False
        ) as progress:
            for start in range(0, len(self), 1024):
                cells = self.rows[start : start + 1024]["image"]
                for image in decode_cells(cells, self.max_pixels):
                    progress.update()
                    yield image


class UnreadableImages(UserError):
    """found: some splits, each with what is wrong with images of it that cannot be read, by position."""

    def __init__(self, found: Sequence[tuple[Split, dict[int, str]]]) -> None:
        self.found = found
        split, faults = found[0]
        position = min(faults)
        first = f"{split.describe_row(position)}: {faults[position]}"
        count = sum(len(faults) for _, faults in found)
        if count == 1:
            message = f"{first}; mend or remove it"
        else:
            rows = _render_rows(found)
            message = (
                f"{count:,} images cannot be read, {rows}; the first: {first}; mend or remove them"
            )
        super().__init__(f"{message}, or pass --on_bad_image skip")


def _render_rows(found: Sequence[tuple[Split, dict[int, str]]]) -> str:
    """Row ids by the data set's own splits: `train rows 3, 17-19, validation rows 2`."""
    ids: dict[str, list[int]] = {}
    for split, faults in found:
        ids.setdefault(split.source_split, []).extend(split.row_ids[list(faults)].tolist())
    return ", ".join(f"{name} rows {render_numbers(rows)}" for name, rows in ids.items())


@functools.lru_cache(maxsize=4)
def find_faults(split: Split, pixel_store: str = "auto") -> dict[int, str]:
    """What is wrong with each image that cannot be read, by position. Which they are is kept on disk.

    pixel_store: unless it is "streamed", the images stay in memory if they fit, see `Split.images`.
    """
    if len(split.skipped):
        return {}
    key = f"{split.content_key}-unreadable-{split.max_pixels}"
    with one_process_at_a_time(key):
        positions = load_array(key)
        if positions is None:
            try:
                held = pixel_store != "streamed" and split.images is not None
                faults = {} if held else split.faults()
            except UnreadableImages as error:
                ((_, faults),) = error.found
            save_array(key, np.array(list(faults), np.int64))
            return faults
    # Asked again: a disk may have failed them then.
    faults = subset(split, positions).faults()
    return {int(positions[position]): fault for position, fault in faults.items()}


def require_readable(*splits: Split | Stream, pixel_store: str = "auto") -> None:
    """Decode every image, but for those of a stream, which is not read beforehand.

    Raises: UserError that names the row of each image that cannot be read.
    """
    parts = [split for split in splits if isinstance(split, Split)]
    found = [(split, find_faults(split, pixel_store)) for split in parts]
    found = [(split, faults) for split, faults in found if faults]
    if found:
        raise UnreadableImages(found)


def subset(split: Split, positions: np.ndarray) -> Split:
    """Some rows of a split, by position."""
    return replace(split, rows=split.rows.select(positions), row_ids=split.row_ids[positions])


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
        train_ids, validation_ids = _stratified(
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
        split.name, f"{len(bad):,}", f"{len(split):,}", _render_rows([(split, faults)]),
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


def subsample(split: Split, limit: int | None, seed: int, flag: str = "limit") -> Split:
    """At most `limit` rows, stratified, in their original order."""
    if limit is None or limit >= len(split):
        return split
    present = np.count_nonzero(class_counts(split.labels, len(split.id2label)))
    if limit < present:
        raise UserError(
            f"{flag} {limit} is less than the {present} classes of {split.name}; use more"
        )
    kept = _stratified_choice(split.labels, limit, seed)
    return subset(split, kept)


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


def _stratified(
    labels: np.ndarray, share: float, names: list[str], seed: int, split: str
) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of the two parts, sorted; each class gives its share to the second."""
    counts = class_counts(labels, len(names))
    # Of labels that share their images, a rare one may stay in train.
    if len(labels) < 2 or (labels.ndim == 1 and counts.min() < 2):
        raise UserError(
            f"class {names[counts.argmin()]!r} has one image in {split}; train and validation need one each"
        )
    # At least one validation image a class, and one left for training.
    fewest = len(names) if labels.ndim == 1 else min(fewest_images(labels), len(labels) // 2)
    size = min(max(round(len(labels) * share), fewest), len(labels) - fewest)
    second = _stratified_choice(labels, size, seed, spare=1)
    return np.setdiff1d(np.arange(len(labels)), second), second


def _stratified_choice(labels: np.ndarray, size: int, seed: int, spare: int = 0) -> np.ndarray:
    """`size` row numbers, sorted, with every class present in proportion (largest remainder, at least one).

    spare: how many rows of each class are left over, at least.
    """
    if labels.ndim == 2:
        return stratified_choice(labels, size, seed, spare)
    generator = np.random.default_rng(seed)
    classes, counts = np.unique(labels, return_counts=True)
    exact = counts * size / len(labels)
    take = np.clip(np.floor(exact).astype(int), 1, counts - spare)
    order = np.argsort(-(exact - np.floor(exact)), kind="stable")
    while take.sum() != size:
        step = 1 if take.sum() < size else -1
        for i in order if step > 0 else order[::-1]:
            if take.sum() == size:
                break
            if (step > 0 and take[i] < counts[i] - spare) or (step < 0 and take[i] > 1):
                take[i] += step
    chosen = [
        generator.permutation(np.flatnonzero(labels == c))[:n]
        for c, n in zip(classes, take, strict=True)
    ]
    return np.sort(np.concatenate(chosen))

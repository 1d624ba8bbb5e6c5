"""The rows of a finished run that an update stores: some to train on again, and all to evaluate on again."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from hf_cifar.config.run import RunConfig
from hf_cifar.config.studies import UpdateConfig
from hf_cifar.data.images import read_cell
from hf_cifar.data.labels import SHOWN_CLASSES, class_counts, with_classes_after
from hf_cifar.data.pixels import Pixels
from hf_cifar.data.split import Split, subset, without_rows
from hf_cifar.data.stored import StoredRows, stored_split, write_stored
from hf_cifar.data.stratify import equal_rows
from hf_cifar.data.streams import Stream
from hf_cifar.errors import UserError
from hf_cifar.evaluation.predictions import Predictions
from hf_cifar.hub.origin import public_name
from hf_cifar.run_data import open_data, used_splits
from hf_cifar.runs.folder import RunFolder
from hf_cifar.text import enumerated, listed

logger = logging.getLogger(__name__)
FLAG = "--old_data"


def classes_of(run: RunFolder) -> list[str]:
    """Return the names of the classes of a run's model, in the order of their ids."""
    return list(Predictions.load(run.path, "validation").id2label.values())


def earlier_splits(run: RunFolder, own: UpdateConfig, *, with_test: bool) -> list[Split]:
    """Return the train and validation splits of a run, and test if the update evaluates it and there is one.

    If the data of an update can no longer be read, these are the rows that it has stored.
    Raises: UserError for any other run whose data cannot be read.
    """
    try:
        source = open_data(run, own.old_data, FLAG)
    except UserError as error:
        if own.old_data is not None or not run.stored_path.is_file():
            raise
        return splits_of_stored(run, str(error))
    splits = used_splits(run, source)
    if isinstance(splits.train, Stream):
        if own.replay or own.compare_anew:
            raise UserError(
                f"{run.path} has read a stream, whose rows cannot be drawn again; pass --replay 0, without "
                "--compare_anew"
            )
        return [splits.validation]
    found = [splits.train, splits.validation]
    if with_test and "test" in source.rows:
        skipped = run.facts().get("skipped_rows", {}).get("test", [])
        found.append(without_rows(source.test_split, skipped))
    return found


def splits_of_stored(run: RunFolder, why: str) -> list[Split]:
    """Return the stored rows of an update whose own data cannot be read, with the ids they have there."""
    stored, names, found = StoredRows.load(run.stored_path), classes_of(run), []
    for name in ("train", "validation", "test"):
        rows = with_classes_after(stored.of(name).with_format(None), names, name)
        if len(rows):
            ids = stored_offset(run.facts(), name, stored) + np.arange(len(rows))
            pixels = Pixels(name, rows, ids, run.data().max_image_pixels)
            found.append(Split(name, pixels, np.arange(len(rows))))
    counts = np.sum([counts_of(each) for each in found], axis=0)
    absent = [name for name, count in zip(names, counts, strict=True) if not count]
    logger.warning(
        "%s; only the %s rows that %s has stored are used%s", why, f"{len(stored.rows):,}", run.path,
        f", and none of {listed(absent, SHOWN_CLASSES)}" if absent else "",
    )  # fmt: skip
    return found


def counts_of(split: Split) -> np.ndarray:
    """Return the number of rows of each class, [K]."""
    return class_counts(split.labels, len(split.id2label))


def stored_offset(facts: dict[str, Any], split: str, stored: StoredRows) -> int:
    """Return the id that the first stored row of a split has in an update, by its run.json."""
    homes = facts["source_splits"]
    home = homes.get(split, split)
    shares_home = split == "validation" and home == homes["train"]
    return facts["source"]["num_own"].get(home, 0) + shares_home * len(stored.of("train"))


def store_rows(
    run: RunFolder, config: RunConfig, own: UpdateConfig, *, anew: bool = False
) -> StoredRows:
    """Store the rows of a run for an update in its folder, unless they are there; return them.

    anew: store all training rows, for training anew, and files by name only.
    Raises: UserError for a folder with rows of another update, or data that cannot be read.
    """
    folder = RunFolder(config.train.output_dir)
    note = {
        "run": public_name(str(run.path)),
        "split_hash": run.facts().get("split_hash"),
        "replay": "all" if anew else own.replay,
        "seed": config.data.split_seed,
        "do_predict": config.train.do_predict,
    }
    if folder.stored_path.is_file():
        stored = StoredRows.load(folder.stored_path)
        if dict(stored.note) != note:
            names = {name for name in note if note[name] != stored.note.get(name)}
            raise UserError(
                f"{folder.path} holds an update with another {enumerated(sorted(names))}; pass another "
                "--output_dir"
            )
        return stored
    splits = earlier_splits(run, own, with_test=config.train.do_predict)
    if not anew:
        splits = [replayed(each, own.replay, config.data.split_seed) for each in splits]
    write_stored(folder.stored_path, splits, classes_of(run), note, embeds=not anew)
    return StoredRows.load(folder.stored_path)


def replayed(split: Split, size: int, seed: int) -> Split:
    """Return the rows of a split to store: of train, up to `size` ones; all others."""
    if split.name != "train":
        return split
    return subset(split, equal_rows(split.labels, size, seed))


def count_copies(train: Split, stored: StoredRows) -> int:
    """Count the images of new training rows that are also stored validation or test images, byte for byte."""
    held_out = {
        content
        for split in ("validation", "test")
        for content in _contents(stored.of(split).with_format(None))
    }
    sizes = set(map(len, held_out))
    new = train.rows.select(np.flatnonzero(stored_split(train.rows) == ""))
    return sum(content in held_out for content in _contents(new, sizes))


def _contents(rows: Dataset, sizes: set[int] | None = None) -> Iterator[bytes]:
    """Yield the encoded images of rows that can be read; of these sizes in bytes, if given."""
    for batch in rows.select_columns(["image"]).iter(100):
        for cell in batch["image"]:
            with contextlib.suppress(UserError, OSError):
                content = cell["bytes"]
                size = len(content) if content else os.path.getsize(cell["path"])
                if sizes is None or size in sizes:
                    yield read_cell(cell)["bytes"]


def describe_rows(names: Sequence[str], counts: np.ndarray) -> str:
    """Format the number of rows of each class."""
    pairs = zip(names, counts.tolist(), strict=True)
    return listed([f"{name} ({count:,})" for name, count in pairs], SHOWN_CLASSES)

"""The rows of a finished run that an update stores: some to train on again, and all to evaluate on again."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from hf_cifar.config.run import RunConfig
from hf_cifar.config.studies import UpdateConfig
from hf_cifar.data.images import read_encoded
from hf_cifar.data.labels import SHOWN_CLASSES, class_counts, with_classes_after
from hf_cifar.data.pixels import Pixels
from hf_cifar.data.split import Split, subset, without_rows
from hf_cifar.data.stored import StoredRows, write_stored
from hf_cifar.data.stratify import equal_rows
from hf_cifar.data.streams import Stream
from hf_cifar.errors import UserError
from hf_cifar.evaluation.predictions import Predictions
from hf_cifar.hub.origin import public_name
from hf_cifar.run_data import open_data, used_splits
from hf_cifar.runs.folder import RunFolder
from hf_cifar.runs.lock import refuse_in_use
from hf_cifar.text import enumerated, listed

logger = logging.getLogger(__name__)
FLAG = "--old_data"


def classes_of(run: RunFolder) -> list[str]:
    """Return the names of the classes of a run's model, in the order of their ids."""
    return list(Predictions.load(run.path, "validation").id2label.values())


@dataclass(frozen=True, eq=False)
class EarlierRows:
    """The rows of a finished run. own: where its data are, and how many rows are wanted. with_test: the
    update evaluates test."""

    run: RunFolder
    own: UpdateConfig
    with_test: bool

    @functools.cached_property
    def splits(self) -> list[Split]:
        """Train and validation, and test if it is wanted and there is one; opened once.

        If the data of an update can no longer be read, these are the rows that it has stored.
        Raises: UserError for any other run whose data cannot be read.
        """
        run, own = self.run, self.own
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
                    f"{run.path} has read a stream, whose rows cannot be drawn again; pass --replay 0, "
                    "without --compare_anew"
                )
            return [splits.validation]
        found = [splits.train, splits.validation]
        if self.with_test and "test" in source.rows:
            skipped = run.metrics().get("test", {}).get("skipped_rows", [])
            found.append(without_rows(source.test_split, skipped))
        return found

    def trained_on(self, stored: StoredRows) -> Dataset:
        """Return the rows that the run was trained on; those that are stored if its data cannot be read."""
        with contextlib.suppress(UserError):
            for split in self.splits:
                if split.name == "train":
                    return split.rows
        return stored.of("train")


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


def store_rows(earlier: EarlierRows, config: RunConfig, *, anew: bool = False) -> None:
    """Store the rows of a run for an update in its folder, unless they are there.

    anew: store all training rows, for training anew, and files by name only. Rows of another update that has
    not begun to train are replaced.
    Raises: UserError for a folder with rows of another update, or data that cannot be read.
    """
    run, own, folder = earlier.run, earlier.own, RunFolder(config.train.output_dir)
    note = {
        "run": public_name(str(run.path)),
        "split_hash": run.facts().get("split_hash"),
        "replay": "all" if anew else own.replay,
        "seed": config.data.split_seed,
        "do_predict": config.train.do_predict,
    }
    if folder.stored_path.is_file() and is_stored(folder, note):
        return
    splits = earlier.splits
    if not anew:
        splits = [replayed(each, own.replay, config.data.split_seed) for each in splits]
    write_stored(folder.stored_path, splits, classes_of(run), note, embeds=not anew)


def is_stored(folder: RunFolder, note: dict[str, Any]) -> bool:
    """Return True if a folder holds the rows of this update; False if it holds others and no run.

    Raises: UserError for other rows with a run, also one that another process is about to begin.
    """
    try:
        found = dict(StoredRows.load(folder.stored_path).note)
    except UserError:
        if folder.has_run:
            raise
        return False
    if found == note:
        return True
    refuse_in_use(folder.path)
    if folder.has_run:
        names = enumerated(sorted(name for name in note if note[name] != found.get(name)))
        raise UserError(
            f"{folder.path} holds an update with another {names}; pass another --output_dir"
        )
    return False


def replayed(split: Split, size: int, seed: int) -> Split:
    """Return the rows of a split to store: of train, up to `size` ones; all others."""
    if split.name != "train":
        return split
    return subset(split, equal_rows(split.labels, size, seed))


def count_copies(rows: Dataset, others: Dataset) -> int:
    """Count the rows whose image is also among others, byte for byte. Those that cannot be read count as
    different."""
    sizes = {size for size, _ in _sizes(rows)} & {size for size, _ in _sizes(others)}
    known = set(_digests(others, sizes))
    return sum(digest in known for digest in _digests(rows, sizes))


def _sizes(rows: Dataset) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number of bytes of each encoded image, and its cell; no empty ones."""
    for batch in rows.select_columns(["image"]).with_format(None).iter(100):
        for cell in batch["image"]:
            content, path = (cell or {}).get("bytes"), (cell or {}).get("path") or ""
            with contextlib.suppress(OSError):
                yield len(content) if content else os.path.getsize(path), cell


def _digests(rows: Dataset, sizes: set[int]) -> Iterator[bytes]:
    """Yield the SHA-256 of the encoded images of these sizes that can be read."""
    for size, cell in _sizes(rows):
        if size in sizes:
            with contextlib.suppress(OSError):
                yield hashlib.sha256(read_encoded(cell)).digest()


def describe_rows(names: Sequence[str], counts: np.ndarray) -> str:
    """Format the number of rows of each class."""
    pairs = zip(names, counts.tolist(), strict=True)
    return listed([f"{name} ({count:,})" for name, count in pairs], SHOWN_CLASSES)

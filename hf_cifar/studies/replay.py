"""The rows of a finished run that an update stores: some to train on again, and all to evaluate on again."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_cifar.config.run import RunConfig
from hf_cifar.config.studies import UpdateConfig
from hf_cifar.data.folders import Source
from hf_cifar.data.labels import SHOWN_CLASSES, class_counts, named_labels, with_classes_after
from hf_cifar.data.pixels import Pixels
from hf_cifar.data.sources import read_source
from hf_cifar.data.split import Split, subset, without_rows
from hf_cifar.data.splits import DataSource
from hf_cifar.data.stored import HASH, StoredRows, image_hashes, write_stored
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
    """The rows of a finished run, and the new data. config: of the update. own: where the run's data are, and
    how many rows to store."""

    run: RunFolder
    config: RunConfig
    own: UpdateConfig

    @functools.cached_property
    def new(self) -> Source:
        """The new data, without rows of the run. Raises: UserError for data that cannot be read."""
        return read_source(self.config.data, classes_of(self.run))

    @functools.cached_property
    def source(self) -> DataSource | None:
        """The data of the run; None if they can no longer be read and the run, an update, has stored rows.

        Raises: UserError for any other run whose data cannot be read.
        """
        run, own = self.run, self.own
        try:
            return open_data(run, own.old_data, FLAG)
        except UserError as error:
            if own.old_data is None and self.config.data.dataset_name == run.data().dataset_name:
                raise UserError(
                    f"{error}; put new images in a folder of their own, and pass it as --dataset_name"
                ) from None
            if own.old_data is not None or not run.stored_path.is_file():
                raise
            logger.warning("%s; only the rows that %s has stored are used", error, run.path)
            return None

    @functools.cached_property
    def splits(self) -> list[Split]:
        """Train and validation, and test if it is wanted and there is one."""
        run, own, source = self.run, self.own, self.source
        if source is None:
            return splits_of_stored(run)
        splits = used_splits(run, source)
        if isinstance(splits.train, Stream):
            if own.replay or own.compare_anew:
                raise UserError(
                    f"{run.path} was trained on a stream, whose rows cannot be read again; pass --replay 0, "
                    "and leave out --compare_anew"
                )
            return [splits.validation]
        found = [splits.train, splits.validation]
        if self.config.train.do_predict and "test" in source.rows:
            skipped = run.metrics().get("test", {}).get("skipped_rows", [])
            found.append(without_rows(source.test_split, skipped))
        return found

    @functools.cached_property
    def labels(self) -> dict[int, Any]:
        """Names of the labels of the run's images, in any split, by the hash of the image."""
        source, rows = self.source, [split.rows for split in self.splits]
        if source is not None and not source.config.streaming:
            # Also the images that the run has left out, and those of test even if it is not evaluated.
            rows = [source.splits.train.rows, source.splits.validation.rows]
            with contextlib.suppress(UserError):
                rows.append(source.test_split.rows)
        return {
            image: label
            for each in rows
            for image, label in zip(image_hashes(each).tolist(), named_labels(each), strict=True)
            if image
        }

    @functools.cached_property
    def known(self) -> np.ndarray:
        """Hashes of the run's images, and of those of the runs before it."""
        found = np.fromiter(self.labels, HASH, len(self.labels))
        if self.run.stored_path.is_file():
            found = np.concatenate([found, StoredRows.load(self.run.stored_path).known])
        return found

    @functools.cached_property
    def copies(self) -> dict[str, list[int]]:
        """The rows of the new data, by split, whose images the run has already, byte for byte."""
        found, num_relabelled = {}, 0
        for name, rows in self.new.splits.items():
            hashes = image_hashes(rows)
            places = np.flatnonzero(np.isin(hashes, self.known))
            found[name] = places.tolist()
            labels = named_labels(rows)
            num_relabelled += sum(
                labels[place] != self.labels.get(hashes[place], labels[place]) for place in places
            )
        train, data = next(iter(found)), self.config.data.dataset_name
        if len(found[train]) == len(self.new.splits[train]):
            raise UserError(
                f"{self.run.path} already has all {len(found[train]):,} training images of {data}, so there "
                "is nothing to add; pass new images"
            )
        if num_relabelled:
            logger.warning(
                "%s images of %s have another label than in %s, which has them already; an update does not "
                "correct labels", f"{num_relabelled:,}", data, self.run.path,
            )  # fmt: skip
        return found


def splits_of_stored(run: RunFolder) -> list[Split]:
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
    if absent:
        logger.warning("%s has stored no rows of %s", run.path, listed(absent, SHOWN_CLASSES))
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
    """Store the rows of a run that an update needs, in the update's folder, unless they are there already.

    anew: store all training rows, for training anew, and only the names of image files. Rows of another
    update that has not begun to train are replaced.
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
    note["copies"] = earlier.copies
    if not anew:
        splits = [replayed(each, own.replay, config.data.split_seed) for each in splits]
    write_stored(folder.stored_path, splits, classes_of(run), note, earlier.known, embeds=not anew)


def is_stored(folder: RunFolder, note: dict[str, Any]) -> bool:
    """Return True if a folder holds this update with its rows; False if it holds no run.

    Raises: UserError for a run with other rows, also if another process is about to begin it.
    """
    if not folder.has_run:
        refuse_in_use(folder.path)
        if not folder.has_run:
            return False
    found = StoredRows.load(folder.stored_path).note
    if changed := sorted(name for name in note if note[name] != found.get(name)):
        raise UserError(
            f"{folder.path} holds another update (different {enumerated(changed)}); pass another --output_dir"
        )
    return True


def replayed(split: Split, size: int, seed: int) -> Split:
    """Return the rows of a split to store: up to `size` of train, and all of another split."""
    if split.name != "train":
        return split
    return subset(split, equal_rows(split.labels, size, seed))


def describe_rows(names: Sequence[str], counts: np.ndarray) -> str:
    """Format the number of rows of each class."""
    pairs = zip(names, counts.tolist(), strict=True)
    return listed([f"{name} ({count:,})" for name, count in pairs], SHOWN_CLASSES)

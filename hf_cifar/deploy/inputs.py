"""Inputs of a network with their labels, of a part of a run's data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from hf_cifar.config.objects import require_object
from hf_cifar.data.split import Split, trained_rows, without_rows
from hf_cifar.data.splits import DataSource, Splits
from hf_cifar.data.stratify import representative_rows
from hf_cifar.data.streams import Stream
from hf_cifar.errors import UserError
from hf_cifar.preprocessor import Preprocessor
from hf_cifar.runs.folder import RunFolder

BATCH = 50  # images that are in memory at their full size


@dataclass(frozen=True)
class Inputs:
    """pixel_values: float32 [N, 3, h, w], normalised. labels: int [N], or float32 [N, K] of multiple
    labels."""

    pixel_values: np.ndarray
    labels: np.ndarray


def open_data(run: RunFolder, dataset_name: str | None = None) -> DataSource:
    """Open the data of a run. dataset_name: where they are now, if they have moved.

    Raises: UserError for data that are missing, were a Python object, or have changed: images that the run
    trained on could then be in validation.
    """
    data = run.data()
    if dataset_name is not None:
        data = dataclasses.replace(data, dataset_name=dataset_name)
    require_object(data.dataset_name, "data set")
    source, recorded = DataSource(data), run.facts().get("split_hash")
    try:
        found = source.splits.hash
    except UserError as error:
        if dataset_name is not None:
            raise
        raise UserError(
            f"{error}; if the data has moved, pass its place as --dataset_name"
        ) from None
    if recorded is not None and found != recorded:
        raise UserError(
            f"{data.dataset_name} does not hold the data of {run.path}, or it has changed; "
            "restore it, or pass the folder where the data is now as --dataset_name"
        )
    return source


def used_splits(run: RunFolder, source: DataSource) -> Splits:
    """Return the splits of a run without the rows that it left out, unreadable and doubted ones."""
    facts, splits = run.facts(), source.splits
    skipped = facts.get("skipped_rows", {}).get("validation", [])
    validation = without_rows(splits.validation, skipped)
    if isinstance(splits.train, Stream):
        return dataclasses.replace(splits, validation=validation)
    return dataclasses.replace(
        splits, train=trained_rows(splits.train, facts), validation=validation
    )


def images_of(split: Split | Stream, count: int) -> Iterator[tuple[np.ndarray, np.ndarray | int]]:
    """Yield up to `count` images [H, W, 3] uint8 of a split with their labels, stratified, or the first ones
    of a stream.

    Raises: UserError that names the row of an unreadable image.
    """
    if isinstance(split, Stream):
        return islice(split.read(epoch=0), count)
    rows = representative_rows(split.labels, count, seed=0)
    return ((split.decode(row), split.labels[row]) for row in rows.tolist())


def inputs_of(split: Split | Stream, count: int, preprocessor: Preprocessor) -> Inputs:
    """Return the inputs of up to `count` images of a split, stratified, or of the first ones of a stream.

    Raises: UserError that names the row of an unreadable image.
    """
    examples, pixel_values, labels = images_of(split, count), [], []
    while batch := list(islice(examples, BATCH)):
        images, found = zip(*batch, strict=True)
        pixel_values.append(preprocessor(list(images)).numpy().astype(np.float32, copy=False))
        labels.extend(found)
    stacked = np.stack(labels) if np.ndim(labels[0]) else np.array(labels)
    return Inputs(
        np.concatenate(pixel_values),
        stacked.astype(np.float32 if stacked.ndim == 2 else np.int64),
    )

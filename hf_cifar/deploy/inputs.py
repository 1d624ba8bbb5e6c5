"""Inputs of a network with their labels, of a part of a run's data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from hf_cifar.data.split import Split
from hf_cifar.data.stratify import representative_rows
from hf_cifar.data.streams import Stream
from hf_cifar.preprocessor import Preprocessor

BATCH = 50  # images that are in memory at their full size


@dataclass(frozen=True)
class Inputs:
    """pixel_values: float32 [N, 3, h, w], normalised. labels: int [N], or float32 [N, K] of multiple
    labels."""

    pixel_values: np.ndarray
    labels: np.ndarray


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

"""Inputs of a network with their labels, of a part of a split."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np

from hf_cifar.data.split import Split
from hf_cifar.data.stratify import representative_rows
from hf_cifar.data.streams import Stream
from hf_cifar.preprocessor import Preprocessor


@dataclass(frozen=True)
class Inputs:
    """pixel_values: float32 [N, 3, h, w], normalised. labels: int [N], or float [N, K] of multiple labels."""

    pixel_values: np.ndarray
    labels: np.ndarray


def inputs_of(split: Split | Stream, count: int, preprocessor: Preprocessor) -> Inputs:
    """Return the inputs of up to `count` images of a split, stratified, or of the first ones of a stream."""
    if isinstance(split, Stream):
        images, found = zip(*islice(split.read(epoch=0), count), strict=True)
        labels = np.array(found)
    else:
        rows = representative_rows(split.labels, count, seed=0)
        images = [split.pixels.decode(position) for position in split.positions[rows].tolist()]
        labels = split.labels[rows]
    return Inputs(preprocessor(list(images)).numpy().astype(np.float32), labels)

"""Several classes an image, or none: label columns that hold lists, the array for them, and their division.

An empty list is an image of no class; a missing one is a mistake.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, LargeList, List, Value

from hf_cifar.errors import UserError
from hf_cifar.text import one_line


def holds_lists(feature: Any) -> bool:
    """Whether a column's cells are lists."""
    return isinstance(feature, (List, LargeList))


def class_label(feature: Any) -> Any:
    """What a label column holds, alone or in lists: a ClassLabel, once columns are standard."""
    return feature.feature if holds_lists(feature) else feature


def label_array(rows: Dataset) -> np.ndarray:
    """The standard label column: class ids [N] int64; of lists [N, K] uint8, 1 for each class of an image."""
    feature = rows.features["label"]
    if holds_lists(feature):
        return indicators(_column(rows), feature.feature.num_classes)
    return np.asarray(rows["label"][:], dtype=np.int64)


def class_counts(labels: np.ndarray, num_labels: int) -> np.ndarray:
    """Images of each class [K]. labels: as `label_array` gives them."""
    if labels.ndim == 2:
        return labels.sum(axis=0, dtype=np.int64)
    return np.bincount(labels, minlength=num_labels)


def indicators(column: pyarrow.ChunkedArray, num_labels: int) -> np.ndarray:
    """Lists of class ids as [N, K] uint8, 1 for each class of a list."""
    positions, ids = _flat(column)
    array = np.zeros((len(column), num_labels), np.uint8)
    array[positions, ids.to_numpy()] = 1
    return array


def entries(rows: Dataset) -> list:
    """The different entries of a column of lists."""
    return pc.list_flatten(_column(rows)).unique().to_pylist()


def list_class_names(rows: Dataset, split: str) -> list[str]:
    """Names of the classes: declared by the data set, else the strings that occur in train, sorted.

    Raises: UserError for lists of anything but class labels or strings. Integers could as well be 0 and 1,
    one for each class.
    """
    feature = rows.features["label"]
    if isinstance(feature.feature, ClassLabel):
        return feature.feature.names
    if feature.feature not in (Value("string"), Value("large_string")):
        raise UserError(
            f"the label column holds {feature}; it must hold class labels, strings or integers, or lists of "
            "class labels or strings: cast it to List(ClassLabel(names=[...]))"
        )
    _, values = _present(rows, split)
    names = sorted(values.unique().to_pylist())
    check_class_names(names)
    return names


def check_class_names(names: list[str]) -> None:
    """Raises: UserError for a name without a letter, or two that differ by white space alone."""
    known: dict[str, str] = {}
    for name in names:
        plain = one_line(name)
        if not plain:
            raise UserError(f"a label is {name!r}; give it a name, or remove its rows")
        if plain in known:
            raise UserError(
                f"labels {known[plain]!r} and {name!r} differ by white space alone; make them one"
            )
        known[plain] = name


def with_label_lists(rows: Dataset, names: list[str], split: str) -> Dataset:
    """The rows with lists of class labels. Raises: UserError that names the row of a label that is none."""
    feature = rows.features["label"]
    if not holds_lists(feature):
        raise UserError(
            f"split {split} labels its images by {feature}, but the first split by lists"
        )
    declared = isinstance(feature.feature, ClassLabel)
    if declared and feature.feature.names != names:
        raise UserError(
            f"split {split} names its classes {feature.feature.names}, but the first split {names}"
        )
    positions, values = _present(rows, split)
    if declared:
        ids = values.to_numpy()
    else:
        index = {name: i for i, name in enumerate(names)}
        ids = np.array([index.get(value, -1) for value in values.to_pylist()], np.int64)
    wrong = np.flatnonzero((ids < 0) | (ids >= len(names)))
    if len(wrong):
        raise UserError(
            f"{split} row {positions[wrong[0]]}: label {values[wrong[0]].as_py()!r} is not one of the "
            f"{len(names)} classes"
        )
    if declared:
        return rows
    ends = np.searchsorted(positions, np.arange(len(rows)), side="right")
    lists = [part.tolist() for part in np.split(ids, ends[:-1])]
    return rows.remove_columns("label").add_column(
        "label", lists, feature=List(ClassLabel(names=names))
    )


def fewest_images(labels: np.ndarray) -> int:
    """As many images as hold one label for each class, on average. labels [N, K]."""
    return math.ceil(labels.shape[1] / max(1.0, labels.sum(axis=1).mean()))


def stratified_choice(labels: np.ndarray, size: int, seed: int, spare: int = 0) -> np.ndarray:
    """`size` row numbers of labels [N, K], sorted: of each class its share, and at least one, as far as whole
    images allow it.

    spare: how many rows of each class are left over, before any is chosen.

    Source: Sechidis, Tsoumakas and Vlahavas, On the Stratification of Multi-Label Data, 2011.
    """
    num_rows, labels = len(labels), labels.astype(np.int64)
    counts = labels.sum(axis=0)
    # Of those left over and those chosen: the images, and the labels of each class, that are still wanted.
    chosen = np.minimum(np.maximum(counts * size / num_rows, 1), np.maximum(counts - spare, 0))
    wanted = np.stack([counts - chosen, chosen])
    room = np.array([num_rows - size, size])
    part = np.full(num_rows, -1)
    shuffled = np.random.default_rng(seed).permutation(num_rows)

    def place(row: int, need: np.ndarray) -> None:
        """Into the part that needs the row more; of equals, the one with more room."""
        first, second = zip(need, room, strict=True)
        into = int(room[1] > 0 and (room[0] == 0 or second > first))
        part[row] = into
        room[into] -= 1
        wanted[into] -= labels[row]

    while True:
        waiting = shuffled[part[shuffled] < 0]
        left = labels[waiting].sum(axis=0)
        if not left.any():
            break
        rarest = np.where(left > 0, left, num_rows + 1).argmin()
        for row in waiting[labels[waiting, rarest] > 0]:
            place(row, wanted[:, rarest])
    for row in waiting:  # those without a label
        place(row, room)
    return np.flatnonzero(part == 1)


def _column(rows: Dataset) -> pyarrow.ChunkedArray:
    return rows.select_columns(["label"]).with_format("arrow")[:]["label"]


def _flat(column: pyarrow.ChunkedArray) -> tuple[np.ndarray, pyarrow.ChunkedArray]:
    """Every entry of a column of lists [M], and its row [M]."""
    lengths = pc.list_value_length(column).to_numpy()
    return np.repeat(np.arange(len(column)), lengths), pc.list_flatten(column)


def _present(rows: Dataset, split: str) -> tuple[np.ndarray, pyarrow.ChunkedArray]:
    """`_flat` of the label column. Raises: UserError that names the row of a missing list or entry."""
    column = _column(rows)
    if column.null_count:
        row = np.flatnonzero(column.is_null().to_numpy())[0]
        raise UserError(
            f"{split} row {row}: the labels are missing; an image without labels has an empty list"
        )
    positions, values = _flat(column)
    if values.null_count:
        row = positions[np.flatnonzero(values.is_null().to_numpy())[0]]
        raise UserError(f"{split} row {row}: a label is missing")
    return positions, values

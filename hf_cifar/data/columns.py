"""Find the image and label columns by type and standardize them. A label is one class or a list of classes.

An empty list means that the image has no class; a missing list is an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

import datasets
import numpy as np
import pyarrow
import pyarrow.compute as pc
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    LargeList,
    List,
    Value,
)

from hf_cifar.config.data import DataConfig
from hf_cifar.errors import UserError
from hf_cifar.text import one_line

Rows = TypeVar("Rows", Dataset, IterableDataset)


def holds_lists(feature: Any) -> bool:
    """True if a column's cells are lists."""
    return isinstance(feature, (List, LargeList))


def class_label(feature: Any) -> Any:
    """The type of a label, alone or inside a list; always a ClassLabel after `standard_columns`."""
    return feature.feature if holds_lists(feature) else feature


def label_array(rows: Dataset) -> np.ndarray:
    """Read the standard label column: class ids [N] int64; for lists [N, K] uint8, 1 for each class."""
    feature = rows.features["label"]
    if holds_lists(feature):
        return indicators(_column(rows), feature.feature.num_classes)
    return np.asarray(rows["label"][:], dtype=np.int64)


def class_counts(labels: np.ndarray, num_labels: int) -> np.ndarray:
    """Count the images of each class [K]. labels: as `label_array` returns them."""
    if labels.ndim == 2:
        return labels.sum(axis=0, dtype=np.int64)
    return np.bincount(labels, minlength=num_labels)


def indicators(column: pyarrow.ChunkedArray, num_labels: int) -> np.ndarray:
    """Convert lists of class ids to [N, K] uint8, 1 for each class of a list."""
    positions, ids = _flat(column)
    array = np.zeros((len(column), num_labels), np.uint8)
    array[positions, ids.to_numpy()] = 1
    return array


def entries(rows: Dataset) -> list:
    """The distinct entries of a label column of lists."""
    return pc.list_flatten(_column(rows)).unique().to_pylist()


def list_class_names(rows: Dataset, split: str) -> list[str]:
    """Names of the classes: declared by the data set, else the strings that occur in train, sorted.

    Raises: UserError for lists of other types. Integers are ambiguous: they could be class ids, or a 0 or 1
    for each class.
    """
    feature = rows.features["label"]
    if isinstance(feature.feature, ClassLabel):
        return feature.feature.names
    if feature.feature not in (Value("string"), Value("large_string")):
        raise UserError(
            f"the type of the label column is {feature}; it must be class labels, strings or integers, or "
            "lists of class labels or strings: cast it to List(ClassLabel(names=[...]))"
        )
    _, values = _present(rows, split)
    names = sorted(values.unique().to_pylist())
    check_class_names(names)
    return names


def check_class_names(names: list[str]) -> None:
    """Raises: UserError for an empty name, or two names that differ only in white space."""
    known: dict[str, str] = {}
    for name in names:
        plain = one_line(name)
        if not plain:
            raise UserError(f"a label is {name!r}, which is empty; name it, or remove its rows")
        if plain in known:
            raise UserError(
                f"labels {known[plain]!r} and {name!r} differ only in white space; merge or rename them"
            )
        known[plain] = name


def with_label_lists(rows: Dataset, names: list[str], split: str) -> Dataset:
    """Convert labels to lists of class labels. Raises: UserError that names the row of an unknown label."""
    feature = rows.features["label"]
    if not holds_lists(feature):
        raise UserError(
            f"the labels of split {split} are {feature}, but those of the first split are lists"
        )
    declared = isinstance(feature.feature, ClassLabel)
    if declared and feature.feature.names != names:
        raise UserError(
            f"split {split} has the classes {feature.feature.names}, but the first split has {names}"
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


def _column(rows: Dataset) -> pyarrow.ChunkedArray:
    return rows.select_columns(["label"]).with_format("arrow")[:]["label"]


def _flat(column: pyarrow.ChunkedArray) -> tuple[np.ndarray, pyarrow.ChunkedArray]:
    """Flatten a column of lists to the entries [M] and the row [M] of each."""
    lengths = pc.list_value_length(column).to_numpy()
    return np.repeat(np.arange(len(column)), lengths), pc.list_flatten(column)


def _present(rows: Dataset, split: str) -> tuple[np.ndarray, pyarrow.ChunkedArray]:
    """Return `_flat` of the label column. Raises: UserError that names the row of a missing list or entry."""
    column = _column(rows)
    if column.null_count:
        row = np.flatnonzero(column.is_null().to_numpy())[0]
        raise UserError(
            f"{split} row {row}: the list of labels is missing; use an empty list for an image without labels"
        )
    positions, values = _flat(column)
    if values.null_count:
        row = positions[np.flatnonzero(values.is_null().to_numpy())[0]]
        raise UserError(f"{split} row {row}: a label is missing")
    return positions, values


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """Hide the progress bars of `datasets` for work that takes an instant."""
    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def standard_columns(splits: DatasetDict, config: DataConfig) -> DatasetDict:
    """Find the image and label columns by type, rename them, and make the labels class labels."""
    features = next(iter(splits.values())).features
    image, label = image_and_label(features, config)
    class_names, with_class_labels = _class_names, _with_class_labels
    if holds_lists(features[label]):
        class_names, with_class_labels = list_class_names, with_label_lists
    standard = {}
    names = None
    for split, rows in splits.items():
        rows = with_standard_names(rows, split, image, label)
        with quiet_datasets():
            rows = rows.cast_column("image", Image(decode=False))
        if split not in ("train", "validation") and _is_hidden(rows):
            continue  # such a split can be neither trained on nor evaluated
        if names is None:
            names = class_names(rows, split)
        standard[split] = with_class_labels(rows, names, split)
    return DatasetDict(standard)


def _is_hidden(rows: Dataset) -> bool:
    """True if no row of a split has a label."""
    values = entries(rows) if holds_lists(rows.features["label"]) else rows.unique("label")
    return set(values) <= {-1, None}


def image_and_label(features: Features, config: DataConfig) -> tuple[str, str]:
    """Names of the image and the label column. Raises: UserError if they cannot be identified."""
    image = _find_column(features, Image, config.image_column_name, "image")
    label = _find_column(features, ClassLabel, config.label_column_name, "label")
    if image == label:
        raise UserError(
            f"column {image!r} cannot be both image and label; pass another --label_column_name"
        )
    return image, label


def with_standard_names(rows: Rows, split: str, image: str, label: str) -> Rows:
    """Select the two columns, as `image` and `label`. Raises: UserError if the split lacks one."""
    if image not in rows.features or label not in rows.features:
        raise UserError(f"split {split} has columns {list(rows.features)}, not {image} and {label}")
    rows = rows.select_columns([image, label])
    if (image, label) != ("image", "label"):
        # Through temporary names, in case the two columns swap names.
        rows = rows.rename_columns({image: "_image", label: "_label"})
        rows = rows.rename_columns({"_image": "image", "_label": "label"})
    return rows


def _find_column(features: Features, kind: type, requested: str | None, role: str) -> str:
    flag = f"--{role}_column_name"
    if requested is not None:
        if requested not in features:
            raise UserError(
                f"no column {requested!r} in {list(features)}; pass {flag} with one of them"
            )
        if role == "image" and not isinstance(features[requested], Image):
            raise UserError(
                f"column {requested!r} holds {features[requested]}, not images; pass another {flag}"
            )
        return requested
    found = [name for name, feature in features.items() if isinstance(feature, kind)]
    if not found and role == "label":  # fall back to lists of class labels
        found = [
            name for name, feature in features.items() if isinstance(class_label(feature), kind)
        ]
    if len(found) > 1:
        raise UserError(f"multiple {role} columns: {found}; choose one with {flag}")
    if not found:
        word, advice = (
            ("an image column", "")
            if role == "image"
            else ("a class label column", ", or put images into one folder per class")
        )
        raise UserError(f"none of the columns {list(features)} is {word}; pass {flag}{advice}")
    return found[0]


def _class_names(rows: Dataset, split: str) -> list[str]:
    """Names of the classes: declared by the data set, else the values that occur in train, sorted."""
    feature = rows.features["label"]
    if isinstance(feature, ClassLabel):
        return feature.names
    if not isinstance(feature, Value):
        raise UserError(
            f"the type of the label column is {feature}; it must be class labels, strings or integers"
        )
    values = rows.unique("label")
    for value in values:
        if value is None or value != value or str(value).strip() == "":
            raise UserError(f"{_row_of(rows, value, split)}: the label is missing")
    if not all(isinstance(value, (str, int)) for value in values):
        raise UserError(
            f"the type of the label column is {feature.dtype}; it must be class labels, strings or integers"
        )
    names = sorted(values)
    if not isinstance(names[0], str) and names[0] < 0:
        raise UserError(
            f"{_row_of(rows, names[0], split)}: label {names[0]} is negative, which usually means that it is "
            "missing; remove such rows, or turn the labels into names"
        )
    names = [str(name) for name in names]
    check_class_names(names)
    return names


def _row_of(rows: Dataset, value: Any, split: str) -> str:
    labels = rows["label"][:]
    return f"{split} row {next(i for i, v in enumerate(labels) if v == value or (value != value and v != v))}"


def _with_class_labels(rows: Dataset, names: list[str], split: str) -> Dataset:
    feature = rows.features["label"]
    if isinstance(feature, ClassLabel):
        if feature.names != names:
            raise UserError(
                f"split {split} has the classes {feature.names}, but the first split has {names}"
            )
        ids = rows["label"][:]
    else:
        index = {name: i for i, name in enumerate(names)}
        values = rows["label"][:]
        ids = [index.get(str(value)) for value in values]
        if None in ids:
            row = ids.index(None)
            raise UserError(
                f"{split} row {row}: label {values[row]!r} is not one of the {len(names)} classes"
            )
    for row, value in enumerate(ids):
        if not isinstance(value, int) or not 0 <= value < len(names):
            raise UserError(
                f"{split} row {row}: label {value!r} is not one of the {len(names)} classes"
            )
    if isinstance(feature, ClassLabel):
        return rows
    with quiet_datasets():
        rows = rows.remove_columns("label").add_column("label", ids)
        return rows.cast_column("label", ClassLabel(names=names))

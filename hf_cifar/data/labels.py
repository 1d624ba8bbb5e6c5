"""Labels of a data set: read from any kind of column, matched to the classes by name, written as class ids.

A label is one class or a list of classes. An empty list means that the image has no class; a missing list is
an error.
"""

from __future__ import annotations

import logging
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, LargeList, List, Value

from hf_cifar.errors import UserError
from hf_cifar.text import listed, one_line

logger = logging.getLogger(__name__)
# Names of label columns, in any case.
LABEL_NAMES = {"label", "labels", "class", "target", "category"}
SHOWN_CLASSES = 20  # of a list in a message


def holds_lists(feature: Any) -> bool:
    """True if a column's cells are lists."""
    return isinstance(feature, (List, LargeList))


def class_label(feature: Any) -> Any:
    """The type of a label, alone or inside a list; always a ClassLabel after `standard_columns`."""
    return feature.feature if holds_lists(feature) else feature


def named_labels(rows: Dataset) -> list[Any]:
    """Return the name of each row's label, or the set of its names; None where the label is hidden."""
    names, labels = class_label(rows.features["label"]).names, rows.with_format(None)["label"][:]
    return [
        frozenset(names[k] for k in label)
        if isinstance(label, list)
        else None
        if label is None or label < 0
        else names[label]
        for label in labels
    ]


def label_array(rows: Dataset) -> np.ndarray:
    """Read the standard label column: class ids [N] int64; for lists [N, K] uint8, 1 for each class."""
    feature = rows.features["label"]
    if holds_lists(feature):
        return indicators(_column(rows), feature.feature.num_classes)
    return _column(rows).to_numpy().astype(np.int64)


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


def is_hidden(rows: Dataset) -> bool:
    """True if no row has a label."""
    column = _column(rows)
    if holds_lists(rows.features["label"]):
        column = pc.list_flatten(column)
    return set(column.unique().to_pylist()) <= {-1, None}


def with_classes(splits: Mapping[str, Dataset], known: Sequence[str] = ()) -> dict[str, Dataset]:
    """Make the labels of every split ids of the same classes: those that have images in the first split, then
    the other `known` ones of a model.

    Classes are matched by name, whatever their order in a split. Those of the first split's ClassLabel keep
    their order, others are sorted; classes without images are left out, and named in a log line.
    Raises: UserError for a label that is missing, or whose class the first split has no image of.
    """
    (first, rows), *_ = splits.items()
    found = _Labels.read(rows, first).with_case_of(known, first)
    check_class_names(found.names)
    counts = np.bincount(found.ids, minlength=len(found.names))
    names = [name for name, count in zip(found.names, counts, strict=True) if count]
    names += [name for name in known if name not in names]
    labels = {first: found}
    for split in list(splits)[1:]:
        if holds_lists(splits[split].features["label"]) != found.lists:
            feature = splits[split].features["label"]
            kind = "lists" if found.lists else "not lists"
            raise UserError(
                f"the labels of split {split} are {feature}, but those of the first split are {kind}"
            )
        labels[split] = _Labels.read(splits[split], split).with_case_of(known, split)
    for split, own in labels.items():
        _refuse_unknown(own, names, split, first)
    empty = sorted(set(found.names) - set(names), key=found.names.index)
    if empty:
        logger.warning(
            "%s of %s classes have no images and are left out: %s",
            f"{len(empty):,}", f"{len(counts):,}", listed(empty, SHOWN_CLASSES),
        )  # fmt: skip
    return {split: own.write(splits[split], names) for split, own in labels.items()}


def label_names(rows: Dataset, split: str) -> list[str]:
    """Names of the classes: those of a ClassLabel, in its order, or the distinct labels, sorted.

    Raises: UserError that names the row of a missing or impossible label.
    """
    return _Labels.read(rows, split).names


def with_known_classes(
    rows: Dataset,
    names: Sequence[str],
    split: str,
    advice: str = "remove or rename the others, or pass another --dataset_name or --label_column_name",
) -> Dataset:
    """Make the labels of other data ids of the classes that a model knows, matched by name.

    advice: what to do about unknown classes. Raises: UserError that lists the classes that the model does not
    know, for a missing label.
    """
    found = _Labels.read(rows, split)
    counts = np.bincount(found.ids, minlength=len(found.names))
    known = set(names)
    found = found.with_case_of(names, split)
    unknown = [
        f"{shown} ({count:,} image{'' if count == 1 else 's'})"
        for name, shown, count in zip(found.names, found.shown, counts, strict=True)
        if count and name not in known
    ]
    if unknown:
        raise UserError(
            f"the model does not know {len(unknown)} of the {np.count_nonzero(counts)} classes of {split}: "
            f"{listed(unknown, SHOWN_CLASSES)}; it knows {listed(names, SHOWN_CLASSES)}: {advice}"
        )
    return found.write(rows, list(names))


def with_classes_after(rows: Dataset, names: Sequence[str], split: str) -> Dataset:
    """Make the labels of new data ids of the classes `names`, matched by name, and of the new classes, which
    come after these in the order of the data."""
    found = _Labels.read(rows, split).with_case_of(names, split)
    return found.write(rows, list(dict.fromkeys([*names, *found.names])))


def form_of(name: str) -> str:
    """Return a name in composed Unicode (NFC) and without capitals."""
    return unicodedata.normalize("NFC", name).casefold()


def names_by_form(names: Sequence[str]) -> dict[str, str]:
    """Index names by their forms; those that share one are left out."""
    forms = Counter(map(form_of, names))
    return {form_of(name): name for name in names if forms[form_of(name)] == 1}


def _with_case_of(known: Sequence[str], names: list[str], split: str) -> list[str]:
    """Replace names that the model knows with other capitals or in another Unicode form, and log them."""
    by_form, found = names_by_form(known), []
    for name in names:
        same = by_form.get(form_of(name), name)
        if name in known or same in names:
            same = name
        elif same != name:
            logger.info("class %s of %s is read as %s of the model", name, split, same)
        found.append(same)
    return found


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


@dataclass(frozen=True)
class _Labels:
    """The labels of a split as it has them.

    names: of its classes. shown: the same for messages. positions, ids [M]: row and class of each label.
    """

    names: list[str]
    shown: list[str]
    positions: np.ndarray
    ids: np.ndarray
    lists: bool

    @classmethod
    def read(cls, rows: Dataset, split: str) -> _Labels:
        """Read the column `label`. Raises: UserError that names the row of a missing or impossible label."""
        feature, column = rows.features["label"], _column(rows)
        lists = holds_lists(feature)
        if lists:
            positions, values = _entries(column, split)
        else:
            positions, values = np.arange(len(column)), column
        kind = class_label(feature)
        if isinstance(kind, ClassLabel):
            ids = pc.fill_null(values, -1).to_numpy()
            wrong = np.flatnonzero((ids < 0) | (ids >= len(kind.names)))
            if len(wrong):
                raise UserError(
                    f"{split} row {positions[wrong[0]]}: label {values[wrong[0]].as_py()} is not one of the "
                    f"{len(kind.names)} classes"
                )
            return cls(kind.names, [repr(name) for name in kind.names], positions, ids, lists)
        _check_type(feature)
        encoded = pc.dictionary_encode(values).combine_chunks()
        distinct, codes = encoded.dictionary.to_pylist(), encoded.indices
        codes = pc.fill_null(codes, len(distinct)).to_numpy(zero_copy_only=False)
        if values.null_count:
            distinct.append(None)
        _check_values(distinct, codes, positions, split)
        order = sorted(range(len(distinct)), key=distinct.__getitem__)
        rank = np.empty(len(distinct), np.int64)
        rank[order] = np.arange(len(distinct))
        distinct = [distinct[i] for i in order]
        names = [str(int(v) if isinstance(v, float) else v) for v in distinct]
        return cls(names, [repr(value) for value in distinct], positions, rank[codes], lists)

    def with_case_of(self, known: Sequence[str], split: str) -> _Labels:
        """Return the labels with the names that a model knows for these classes."""
        return replace(self, names=_with_case_of(known, self.names, split)) if known else self

    def write(self, rows: Dataset, names: list[str]) -> Dataset:
        """Replace the column by ids of the classes `names`, which contain every class that has labels."""
        feature = rows.features["label"]
        kind = class_label(feature)
        if isinstance(kind, ClassLabel) and kind.names == names:
            return rows
        index = {name: i for i, name in enumerate(names)}
        ids = np.array([index.get(name, -1) for name in self.names], np.int64)[self.ids]
        new: Any = ClassLabel(names=names)
        column: Any = ids
        if self.lists:
            ends = np.searchsorted(self.positions, np.arange(len(rows)), side="right")
            offsets = np.concatenate([[0], ends]).astype(np.int32)
            column, new = pyarrow.ListArray.from_arrays(offsets, ids), List(new)
        return rows.remove_columns("label").add_column("label", column, feature=new)


def _column(rows: Dataset) -> pyarrow.ChunkedArray:
    return rows.select_columns(["label"]).with_format("arrow")[:]["label"]


def _flat(column: pyarrow.ChunkedArray) -> tuple[np.ndarray, pyarrow.ChunkedArray]:
    """Flatten a column of lists to the entries [M] and the row [M] of each."""
    lengths = pc.list_value_length(column).to_numpy()
    return np.repeat(np.arange(len(column)), lengths), pc.list_flatten(column)


def _entries(column: pyarrow.ChunkedArray, split: str) -> tuple[np.ndarray, pyarrow.ChunkedArray]:
    """Return `_flat` of a label column. Raises: UserError that names the row of a missing list or entry."""
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


def may_be_labels(feature: Any) -> bool:
    """True for a column of strings, integers, booleans or floats, or of lists of strings.

    Lists of integers are ambiguous: they could be class ids, or a 0 or 1 for each class.
    """
    kind = class_label(feature)
    if isinstance(kind, ClassLabel):
        return True
    if not isinstance(kind, Value):
        return False
    texts = kind.dtype in ("string", "large_string")
    numbers = kind.dtype in ("bool", "null") or kind.dtype.startswith(("int", "uint", "float"))
    return texts or (numbers and not holds_lists(feature))


def _check_type(feature: Any) -> None:
    """Raises: UserError for a column that cannot hold labels."""
    if not may_be_labels(feature):
        lists = holds_lists(feature)
        raise UserError(
            f"the type of the label column is {feature}; it must be class labels, strings or integers"
            + (
                ", or lists of class labels or strings: cast it to List(ClassLabel(names=[...]))"
                * lists
            )
        )


def _check_values(
    distinct: list[Any], codes: np.ndarray, positions: np.ndarray, split: str
) -> None:
    """Raises: UserError that names the first row of a value that is not a label."""
    for code, value in enumerate(distinct):
        if value is None or value != value or str(value).strip() == "":
            problem = "the label is missing"
        elif isinstance(value, float) and not value.is_integer():
            problem = (
                f"label {value} is not a whole number; round it, or turn the labels into names"
            )
        elif isinstance(value, (int, float)) and value < 0:
            problem = (
                f"label {value} is negative, which usually means that it is missing; remove such rows, or "
                "turn the labels into names"
            )
        else:
            continue
        raise UserError(f"{split} row {positions[np.argmax(codes == code)]}: {problem}")


def _refuse_unknown(labels: _Labels, names: list[str], split: str, first: str) -> None:
    """Raises: UserError that names the classes of a split that the first split has no image of."""
    known = set(names)
    lacking = np.array([name not in known for name in labels.names])
    wrong = np.flatnonzero(lacking[labels.ids])
    if not len(wrong):
        return
    found = [labels.shown[i] for i in np.unique(labels.ids[wrong])]
    also = f" ({len(found)} such classes: {listed(found, SHOWN_CLASSES)})" if found[1:] else ""
    raise UserError(
        f"{split} row {labels.positions[wrong[0]]}: label {labels.shown[labels.ids[wrong[0]]]} is not one of "
        f"the {len(names)} classes that have images in {first}{also}; add images of it to {first}, or remove "
        "its rows"
    )

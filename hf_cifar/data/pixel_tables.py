"""Tables that hold the pixels of images themselves: a column for each pixel, or all of them in one text."""

from __future__ import annotations

import csv
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pyarrow
from datasets import Dataset, DatasetDict
from datasets.table import InMemoryTable
from pyarrow import csv as pyarrow_csv
from pyarrow import parquet

from hf_cifar.config.data import DataConfig
from hf_cifar.data.layout import ORDER, split_roles
from hf_cifar.data.listing import File
from hf_cifar.errors import UserError
from hf_cifar.text import listed, one_line

FEWEST_PIXELS = 64
SPLIT_COLUMN_NAMES = {"partition", "set", "split", "subset", "usage"}
KAGGLE_SPLITS = {
    "PublicTest": "validation",
    "PrivateTest": "test",
}  # of the public and private leaderboard
csv.field_size_limit(2**24)


def is_pixel_table(path: str) -> bool:
    """True for a CSV or Parquet file with the pixels of one image in each row."""
    try:
        rows = _first_rows(path)
    except (OSError, ValueError, StopIteration, csv.Error, pyarrow.ArrowException):
        return False
    if len(rows) < 2 or not rows[0] or len(rows[0]) != len(rows[1]):
        return False
    return _pixel_text(rows) is not None or len(_pixel_columns(rows)) >= FEWEST_PIXELS


def _first_rows(path: str) -> list[list[str]]:
    """The header and the first row, or the first two rows."""
    if path.lower().endswith(".parquet"):
        file = parquet.ParquetFile(path)
        first = next(file.iter_batches(batch_size=1)).to_pylist()[0]
        return [
            list(first),
            [str(c) if isinstance(c, (int, float, str)) else "" for c in first.values()],
        ]
    with open(path, encoding="utf-8-sig", newline="") as text:
        return list(itertools.islice(csv.reader(text), 2))


def _read_table(path: str, rows: list[list[str]]) -> pyarrow.Table:
    if path.lower().endswith(".parquet"):
        return parquet.read_table(path)
    has_header = not all(re.fullmatch(r"[\d.]+", cell.strip()) for cell in rows[0])
    return pyarrow_csv.read_csv(
        path,
        pyarrow_csv.ReadOptions(autogenerate_column_names=not has_header, block_size=2**24),
        convert_options=pyarrow_csv.ConvertOptions(strings_can_be_null=False),
    )


def read_pixel_tables(files: Sequence[File], config: DataConfig) -> DatasetDict:
    """Read tables of pixels as splits: a single one, or those that are named as splits.

    The pixels become lists in the column `pixels`. Raises: UserError for a table that cannot be read, or
    multiple ones that are not named as splits.
    """
    stems = {file.name.rpartition("/")[2].rpartition(".")[0]: file for file in files}
    roles = split_roles(stems) if len(files) > 1 else dict.fromkeys(stems, "train")
    if len(stems) < len(files) or len(set(roles.values())) < len(files):
        raise UserError(
            f"multiple tables of pixels: {listed(file.name for file in files)}; name them train.csv and "
            "test.csv, or pass one of them as --dataset_name"
        )
    found = {role: _read(stems[stem].path, config) for stem, role in roles.items()}
    if len(found) == 1:
        found = _by_column(found["train"], files[0].name)
    return DatasetDict(
        {
            split: Dataset(InMemoryTable(found[split]))
            for split in sorted(found, key=lambda name: (*ORDER, name).index(name))
        }
    )


def _pixel_columns(rows: list[list[str]]) -> list[int]:
    """The columns that make a square image: those whose names differ in numbers only, as pixel0, pixel1."""
    groups: dict[str, list[int]] = defaultdict(list)
    for i, name in enumerate(rows[0]):
        groups[re.sub(r"\d+", "#", name.strip())].append(i)
    columns = max(groups.values(), key=len)
    if not _is_square(len(columns)) and _is_square(len(columns) - 1):
        columns = columns[1:]  # without a header, the label comes first
    is_number = all(re.fullmatch(r"\s*\d+(\.\d*)?\s*", rows[1][i]) for i in columns)
    return columns if is_number and _is_square(len(columns)) else []


def _is_square(count: int) -> bool:
    """True for N x N pixels, grey or in three colours."""
    grey = math.isqrt(count) ** 2 == count
    return count > 0 and (grey or (count % 3 == 0 and math.isqrt(count // 3) ** 2 == count // 3))


def _pixel_text(rows: list[list[str]]) -> int | None:
    """The column whose text is a list of pixels, None if there is none."""
    for i, cell in enumerate(rows[1]):
        numbers = cell.replace(",", " ").strip("[] ").split()
        if len(numbers) >= FEWEST_PIXELS and all(number.isdecimal() for number in numbers):
            return i if _is_square(len(numbers)) else None
    return None


def _read(path: str, config: DataConfig) -> pyarrow.Table:
    rows = _first_rows(path)
    try:
        table = _read_table(path, rows)
        text = _pixel_text(rows)
        columns = [text] if text is not None else _pixel_columns(rows)
        if text is not None:
            cells = (
                str(cell).replace(",", " ").strip("[] ").split()
                for cell in table.column(text).to_pylist()
            )
            pixels = np.array([np.array(cell, dtype=np.int32) for cell in cells])
        else:
            pixels = np.stack([table.column(i).to_numpy() for i in columns], axis=1)
    except (OSError, ValueError, TypeError, pyarrow.ArrowException) as error:
        raise UserError(
            f"{one_line(path)} cannot be read as a table of pixels: {one_line(error, 200)}; fix it"
        ) from None
    if pixels.dtype.kind in "iu" and pixels.min() >= 0 and pixels.max() <= 255:
        pixels = pixels.astype(np.uint8)
    offsets = np.arange(len(pixels) + 1) * pixels.shape[1]
    others = {
        table.column_names[i].strip(): table.column(i)
        for i in range(table.num_columns)
        if i not in set(columns)
    }
    labels = [name for name in others if name.lower() not in SPLIT_COLUMN_NAMES]
    if len(labels) == 1 and config.label_column_name is None:
        others["label"] = others.pop(labels[0])
    lists = pyarrow.ListArray.from_arrays(
        pyarrow.array(offsets, pyarrow.int32()), pyarrow.array(pixels.ravel())
    )
    return pyarrow.table({"pixels": lists, **others})


def _by_column(table: pyarrow.Table, name: str) -> dict[str, pyarrow.Table]:
    """Divide a table by a column that names splits. Raises: UserError if only some of its values do."""
    column = next((c for c in table.column_names if c.lower() in SPLIT_COLUMN_NAMES), None)
    if column is None:
        return {"train": table}
    values = sorted(map(str, set(table.column(column).to_pylist())))
    roles = split_roles(values) | {v: KAGGLE_SPLITS[v] for v in values if v in KAGGLE_SPLITS}
    if len(set(roles.values())) < len(values):
        raise UserError(
            f"the values of column {column!r} of {name} are not all names of splits: "
            f"{listed(map(repr, values), 8)}; use train, validation and test, or remove it"
        )
    rows = table.column(column).to_pylist()
    return {
        role: table.take(np.flatnonzero([str(row) == value for row in rows])).drop_columns([column])
        for value, role in roles.items()
    }

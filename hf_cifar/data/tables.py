"""Tables of paths and labels beside images: CSV, TSV, JSON lines or Parquet, and metadata files.

The columns are found by their content: one names images of the listing, another one labels them.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import math
import os
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet, types

from hf_cifar.config.data import DataConfig
from hf_cifar.data.labels import LABEL_NAMES, check_class_names
from hf_cifar.data.layout import ORDER, SPLIT_WORDS, Layout, split_roles, words_of
from hf_cifar.data.listing import TABLE_SUFFIXES, File, Listing, composed, image_suffixes, suffix_of
from hf_cifar.errors import UserError
from hf_cifar.text import listed, nearest_hint, one_line

METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
PATH_NAMES = {
    "file", "file_name", "file_path", "filename", "filepath", "id", "image", "image_id", "image_name",
    "image_path", "img", "img_path", "name", "path",
}  # fmt: skip
SPLIT_COLUMN_NAMES = {"partition", "phase", "set", "split", "subset", "usage"}
# Columns that can only name splits, whatever their values.
DIVIDING = {
    "is_test",
    "is_train",
    "is_training",
    "is_val",
    "is_valid",
    "is_validation",
    "partition",
    "split",
}
DELIMITERS = (",", ";", "\t", "|")
SPREADSHEETS = (".xlsx", ".xls", ".ods", ".numbers")
SAMPLE = 300  # rows that decide whether a table fits
MAX_NAMES = 3  # in a line


class NoTable(UserError):
    """A file that is not a table of images and labels."""


@dataclass(frozen=True)
class Table:
    """Named columns of equal length; a cell is text, a number, a bool, a list or None.

    paths: of its files.
    """

    name: str
    folder: str
    columns: dict[str, list[Any]]
    paths: frozenset[str]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))


def candidates(listing: Listing, depth: int | None = None) -> list[File]:
    """The files that may be tables of paths. depth: at most this many folders below the root."""
    return [
        file
        for file in listing.others
        if suffix_of(file.name) in TABLE_SUFFIXES
        and posixpath.basename(file.name).lower() not in METADATA_NAMES
        and (depth is None or file.name.count("/") <= depth)
    ]


def metadata_files(listing: Listing) -> list[File]:
    """The metadata files, as `datasets` knows them."""
    return [f for f in listing.others if posixpath.basename(f.name).lower() in METADATA_NAMES]


def read_table_layout(
    listing: Listing,
    path: str,
    config: DataConfig,
    *,
    requested: bool = False,
    folder_of: Mapping[File, str] | None = None,
    known: Sequence[str] = (),
) -> Layout:
    """Read the images and labels that a table names.

    requested: the user named the table, so that two rows that name an image are enough. folder_of: the class
    folders of the images, which decide between columns that could be labels. known: classes of which there
    may be only one.
    Raises: NoTable if no column names images; UserError for a table whose meaning is ambiguous.
    """
    table = read_table(path)
    if "top_k" in table.columns and not requested:
        raise NoTable(f"{one_line(path)} holds predictions")
    names = _Names(listing, table)
    column = _path_column(table, names, config.image_column_name, requested)
    if column is not None and column.lower() not in PATH_NAMES and names.matches(column):
        table = _without_header(table)
        column = _path_column(table, names, None, requested)
    if column is None:
        if folder_of is None:
            _refuse_missing_images(listing, table)
        raise NoTable(
            f"no column of {table.name} names images in {one_line(listing.root)} "
            f"(columns: {listed(table.columns, 8)}){_called(listing)}; pass --image_column_name"
        )
    values = [_text(value) for value in table.columns[column]]
    files = names.resolve(values)
    folders = None if folder_of is None else [file and folder_of.get(file) for file in files]
    path_columns = {column, *names.same_files(table, column, files)}
    return _layout(listing, table, path_columns, files, values, config, folders, known)


def _refuse_missing_images(listing: Listing, table: Table) -> None:
    """Raises: UserError for a table of images that do not exist."""
    for name, cells in table.columns.items():
        names = [_text(cell) for cell in cells] if _is_plain(cells) else []
        if names and sum(suffix_of(each) in image_suffixes() for each in names) > len(names) / 2:
            raise UserError(
                f"none of the {len(names):,} images in column {name!r} of {table.name} is in "
                f"{one_line(listing.root)}, such as {listed(names, MAX_NAMES)}; fix the paths, or pass "
                "the folder of the images as --dataset_name and the table as --labels_file"
            )


def join_tables(listing: Listing, tables: dict[str, Layout]) -> Layout | None:
    """Join tables that are named as splits, such as train.csv and test.csv; None if they are not.

    Raises: UserError for an image that is in two of them.
    """
    stems = {posixpath.splitext(posixpath.basename(name))[0]: name for name in tables}
    if len(stems) < len(tables):  # train/_classes.csv and test/_classes.csv
        stems = {posixpath.basename(posixpath.dirname(name)): name for name in tables}
    roles = split_roles(stems)
    if len(set(roles.values())) < len(tables) or "train" not in roles.values():
        return None
    names = {role: stems[stem] for stem, role in roles.items()}
    names = {split: names[split] for split in ORDER if split in names}
    splits: dict[str, list] = {}
    used: set[File] = set()
    for split, name in names.items():
        splits[split] = sorted(row for rows in tables[name].splits.values() for row in rows)
        files = {file for file, _ in splits[split]}
        if twice := used & files:
            raise UserError(
                f"{one_line(min(twice).name)} is in {name} and in another table; choose one of "
                f"{listed(names.values())} with --labels_file"
            )
        used |= files
    lists = {name: isinstance(splits[split][0][1], tuple) for split, name in names.items()}
    if len(set(lists.values())) > 1:
        raise UserError(
            f"{listed(name for name in lists if lists[name])} has lists of labels, and "
            f"{listed(name for name in lists if not lists[name])} one label for each image; write them alike"
        )
    joined = " and ".join(names.values())
    left_out = listing.all_left_out({file.path for file in listing.others if file.name in tables})
    left_out[f"not in {joined}"] += len(set(listing.images) - used)
    rows_left_out = sum((table.rows_left_out for table in tables.values()), Counter())
    notes = [note for table in tables.values() for note in table.notes]
    first = tables[names["train"]]
    group_of = {file: group for table in tables.values() for file, group in table.group_of.items()}
    return Layout(
        splits, _class_names(splits, joined), f"column {first.label_column!r} of {joined}", left_out,
        rows_left_out, names, first.image_column, first.label_column, notes, first.group_column, group_of,
    )  # fmt: skip


def read_metadata_layout(
    listing: Listing, config: DataConfig, *, by_name: bool = False
) -> Layout | None:
    """Read the images and labels that metadata files name, each for its own folder; None without labels.

    by_name: only a column that is requested, or that is called label or the like, counts as labels.
    """
    columns: dict[str, list[Any]] = {}
    files: list[File | None] = []
    values: list[str] = []
    by_path = {file.name: file for file in listing.images}
    path_columns = set()
    for file in metadata_files(listing):
        table = read_table(file.path)
        own = [c for c in table.columns if c == "file_name" or c.endswith("_file_name")]
        if len(own) != 1:
            raise UserError(
                f"{one_line(file.path)} has the columns {listed(table.columns, 8)}; one column must be "
                "file_name, with the paths of the images"
            )
        path_columns.add(own[0])
        folder = posixpath.dirname(file.name)
        for value in map(_text, table.columns[own[0]]):
            name = posixpath.normpath(posixpath.join(folder, composed(value.replace("\\", "/"))))
            files.append(by_path.get(name))
            values.append(posixpath.join(folder, value))
        for name in {*columns, *table.columns}:
            before = columns.setdefault(name, [None] * (len(files) - len(table)))
            before += table.columns.get(name, [None] * len(table))
    names = sorted({posixpath.basename(file.name) for file in metadata_files(listing)})
    paths = frozenset(file.path for file in metadata_files(listing))
    table = Table(" and ".join(names), listing.root, columns, paths)
    if by_name and _label_by_name(table, path_columns, config) is None:
        return None
    return _layout(listing, table, path_columns, files, values, config)


def read_table(path: str) -> Table:
    """Read a table. Raises: NoTable for a file that is not one, or holds images itself."""
    name, suffix = os.path.basename(path), suffix_of(path)
    try:
        if suffix == ".parquet":
            columns = _read_parquet(path)
        elif suffix in (".jsonl", ".ndjson"):
            columns = _read_json_lines(Path(path).read_bytes())
        elif suffix == ".json":
            columns = _read_json(Path(path).read_bytes())
        elif suffix in SPREADSHEETS:
            raise NoTable("is a spreadsheet; save it as CSV")
        else:
            columns = _read_delimited(Path(path).read_bytes(), suffix)
    except NoTable as error:
        raise NoTable(f"{one_line(path)} {error}") from None
    except (OSError, ValueError, csv.Error, pyarrow.ArrowException) as error:
        raise NoTable(f"{one_line(path)} cannot be read as a table: {one_line(error)}") from None
    whole = os.path.abspath(path)
    table = Table(name, os.path.dirname(whole), columns, frozenset([whole]))
    if not len(table):
        raise NoTable(f"{one_line(path)} has no rows")
    return table


def holds_images(path: str) -> bool:
    """True for a Parquet file with a column of encoded images."""
    try:
        schema = parquet.read_schema(path)
    except (OSError, pyarrow.ArrowException):
        return False
    return any(_is_binary(each.type) for each in schema)


def _is_binary(kind: pyarrow.DataType) -> bool:
    if types.is_struct(kind):
        return any(_is_binary(each.type) for each in kind)
    return types.is_binary(kind) or types.is_large_binary(kind)


def _read_parquet(path: str) -> dict[str, list[Any]]:
    if holds_images(path):
        raise NoTable("holds images itself, not their paths")
    return parquet.read_table(path).to_pydict()


def _read_json_lines(content: bytes) -> dict[str, list[Any]]:
    return _json_columns(
        [json.loads(line) for line in _decode(content).split("\n") if line.strip()]
    )


def _read_json(content: bytes) -> dict[str, list[Any]]:
    """Read a list of objects, an object of columns, or one of names and labels."""
    found = json.loads(_decode(content))
    if isinstance(found, list):
        return _json_columns(found)
    cells = list(found.values()) if isinstance(found, dict) else []
    if cells and all(isinstance(cell, (str, int)) for cell in cells):
        return {"file": list(found), "label": cells}
    raise NoTable(
        'is not a list of objects such as {"file": "1.png", "label": "cat"}; write the names of the '
        "images and their labels into a CSV"
    )


def _json_columns(rows: list[Any]) -> dict[str, list[Any]]:
    if not all(isinstance(row, dict) for row in rows):
        raise NoTable("has rows that are not JSON objects")
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _read_delimited(content: bytes, suffix: str) -> dict[str, list[Any]]:
    text = _decode(content)
    if declared := re.match(r"sep=(.)\r?\n", text):  # for Excel
        text = text[declared.end() :]
    delimiters = [*("\t" * (suffix == ".tsv")), *DELIMITERS, *(" " * (suffix in (".txt", ".lst")))]
    delimiter = max(delimiters, key=lambda each: _regularity(text, each))
    rows = [row for row in _cells(text, delimiter) if any(cell.strip() for cell in row)]
    if not rows:
        return {}
    width = len(rows[0])
    header: dict[str, None] = {}
    for number, cell in enumerate(rows[0], 1):
        name = cell.strip() or f"column {number}"
        header[name if name not in header else f"{name} ({number})"] = None
    for number, row in enumerate(rows, 1):
        if any(cell.strip() for cell in row[width:]):
            raise NoTable(
                f"has {len(row)} fields in row {number}, but {width} in the first; put text that contains "
                f"{delimiter!r} in quotes"
            )
    body = [[cell.strip() for cell in row[:width]] + [""] * (width - len(row)) for row in rows[1:]]
    return {name: [row[i] for row in body] for i, name in enumerate(header)}


def _decode(content: bytes) -> str:
    """Decode text with or without a byte order mark; text that is not Unicode is read as Windows-1252."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", "replace")


def _cells(text: str, delimiter: str) -> Iterable[list[str]]:
    return csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=delimiter != "\t"
    )


def _regularity(text: str, delimiter: str) -> tuple[bool, int]:
    """How well a delimiter explains the first lines: all of one width above 1, and that width."""
    head = "\n".join(text.splitlines()[:50])
    try:
        widths = Counter(len(row) for row in _cells(head, delimiter) if row)
    except csv.Error:
        return False, 0
    width = max(widths, key=lambda each: widths[each], default=0)
    return len(widths) == 1 and width > 1, width if width > 1 else 0


def _called(listing: Listing) -> str:
    """Show names of images, for a table that has others, such as 1 for 001.jpg."""
    names = [file.name for file in listing.images]
    return f"; images are called {listed(sorted(names), MAX_NAMES)}" if names else ""


def _without_header(table: Table) -> Table:
    """Return the table with its header as the first row."""
    columns = {}
    for number, (head, cells) in enumerate(table.columns.items(), 1):
        own = f"column {number}"  # what `_read_delimited` calls an empty cell
        first = "" if head == own else head.removesuffix(f" ({number})")
        columns[own] = [first, *cells]
    return replace(table, columns=columns)


def _text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "" if value is None else str(value).strip()


class _Names:
    """Finds the images that the cells of a table name."""

    def __init__(self, listing: Listing, table: Table) -> None:
        self.listing, self.table = listing, table
        self.by_name = {file.name: file for file in listing.images}
        # By file name, and by folder and name; with the suffix of the file and without it.
        self.ends: dict[str, list[File]] = defaultdict(list)
        for file in listing.images:
            path = file.name.casefold()
            for end in {path, posixpath.splitext(path)[0]}:
                parts = end.split("/")
                self.ends[parts[-1]].append(file)
                if len(parts) > 1:
                    self.ends["/".join(parts[-2:])].append(file)
        inside = os.path.relpath(table.folder, listing.root).replace(os.sep, "/")
        self.inside = "" if inside == "." or inside.startswith("..") else composed(inside)

    def matches(self, value: str, stripped: int = 0) -> list[File]:
        """The images that a cell may name. stripped: leading folders to ignore."""
        if not value:
            return []
        path = composed(value.replace("\\", "/"))
        if not stripped:
            whole = os.path.join(self.table.folder, path)
            exact = self.by_name.get(posixpath.normpath(posixpath.join(self.inside, path)))
            exact = exact or self.by_name.get(posixpath.normpath(path))
            if exact is None and posixpath.isabs(path):
                exact = self.by_name.get(os.path.relpath(path, self.listing.root))
            if exact is None and "/" in path and os.path.isfile(whole):
                exact = File(os.path.abspath(whole), os.path.abspath(whole))
            if exact is not None:
                return [exact]
        parts = [part for part in path.split("/") if part not in ("", ".", "..")][stripped:]
        if not parts:
            return []
        tail = "/".join(parts).casefold()
        if exact := self.by_name.get("/".join(parts)):
            return [exact]
        near = self.ends.get("/".join(parts[-2:]).casefold(), ())
        found = [file for file in near if _ends_with(file, tail)]
        whole_names = [f for f in found if f"/{f.name.casefold()}".endswith(f"/{tail}")]
        found = whole_names or found
        if len(found) > 1:
            same_case = [f for f in found if "/".join(parts) in f.name]
            found = same_case or found
        return found

    def resolve(self, values: Sequence[str]) -> list[File | None]:
        """The image of each cell, None if there is none.

        Leading folders that do not exist here are ignored if all rows have as many. Raises: UserError for
        names that fit images of multiple folders equally well.
        """
        sample = _sample(values)
        depth = max((value.replace("\\", "/").count("/") for value in sample), default=0)
        stripped = max(range(depth + 1), key=lambda n: (self.num_found(sample, n), -n))
        found = [self.matches(value, stripped) for value in values]
        unclear = [files for files in found if len(files) > 1]
        if not unclear:
            return [files[0] if files else None for files in found]
        votes = Counter(posixpath.dirname(file.name) for files in found for file in files)
        wanted = next(
            (
                SPLIT_WORDS[word]
                for word in words_of(Path(self.table.name).stem)
                if word in SPLIT_WORDS
            ),
            "train",
        )
        most = max(votes.values())

        def rank(folder: str) -> tuple[bool, int]:
            parts = folder.split("/")
            named = any(split_roles([part]).get(part) == wanted for part in parts)
            return named and votes[folder] >= most / 2, votes[folder]

        def best(files: list[File]) -> File | None:
            if not files:
                return None
            ranked = sorted(files, key=lambda f: rank(posixpath.dirname(f.name)), reverse=True)
            ranks = [rank(posixpath.dirname(file.name)) for file in ranked]
            if len(ranked) > 1 and ranks[0] == ranks[1]:
                raise UserError(
                    f"{self.table.name} names images that exist twice, such as {ranked[0].name} and "
                    f"{ranked[1].name}; write the folder into the table, or pass only one of the folders"
                )
            return ranked[0]

        return [best(files) for files in found]

    def num_found(self, values: Iterable[str], stripped: int) -> int:
        """Count the different images that cells name."""
        found = (self.matches(value, stripped) for value in values)
        return len({files[0] for files in found if files})

    def share_found(self, values: Sequence[str]) -> tuple[int, float]:
        """How many different images a sample of cells names, and the share of the cells that name one."""
        sample = _sample(values)
        depth = max((value.replace("\\", "/").count("/") for value in sample), default=0)
        num, stripped = max((self.num_found(sample, n), -n) for n in range(depth + 1))
        hits = sum(bool(self.matches(value, -stripped)) for value in sample)
        return num, hits / max(len(sample), 1)

    def same_files(self, table: Table, column: str, files: list[File | None]) -> list[str]:
        """The other columns that name the same images, such as an id beside a path."""
        rows = [i for i, file in enumerate(files) if file is not None][:SAMPLE]
        return [
            other
            for other, cells in table.columns.items()
            if other != column
            and _is_plain(cells)
            and rows
            and all(files[i] in self.matches(_text(cells[i])) for i in rows)
        ]


def _sample(values: Sequence[str]) -> list[str]:
    step = max(1, len(values) // SAMPLE)
    return list(values[::step][:SAMPLE])


def _ends_with(file: File, tail: str) -> bool:
    """True if a path ends with these folders and name; the suffix may be missing."""
    name = f"/{file.name.casefold()}"
    return name.endswith(f"/{tail}") or posixpath.splitext(name)[0].endswith(f"/{tail}")


def _is_plain(cells: Iterable[Any]) -> bool:
    return all(cell is None or isinstance(cell, (str, int, float)) for cell in cells)


def _holds_lists(cells: Iterable[Any]) -> bool:
    """True for lists of text; a single label may stand for a list of one."""
    return all(
        all(isinstance(each, str) for each in cell)
        if isinstance(cell, list)
        else cell is None or isinstance(cell, str)
        for cell in cells
    )


def _path_column(table: Table, names: _Names, requested: str | None, explicit: bool) -> str | None:
    """Find the column that names images; None if there is none."""
    if requested is not None:
        if requested in table.columns:
            return requested
        raise NoTable(
            f"no column {requested!r} in {table.name}, only {listed(table.columns, 8)}"
            f"{nearest_hint(requested, table.columns)}; pass --image_column_name with one of them"
        )
    scores = {}
    for name, cells in table.columns.items():
        if _is_plain(cells):
            num, share = names.share_found([_text(cell) for cell in cells])
            if num > 1 and (explicit or share >= 0.5):
                scores[name] = num
    if not scores:
        return None
    most = max(scores.values())
    best = [name for name, num in scores.items() if num == most]
    known = [name for name in best if name.lower().replace(" ", "_") in PATH_NAMES]
    found = known or best
    if len(found) > 1:
        first = names.resolve([_text(cell) for cell in table.columns[found[0]]])
        others = set(found[1:]) - set(names.same_files(table, found[0], first))
        if others:
            raise UserError(
                f"multiple columns of {table.name} name images: {listed(found)}; choose one with "
                "--image_column_name"
            )
    return found[0]


def _layout(
    listing: Listing,
    table: Table,
    path_columns: set[str],
    files: list[File | None],
    values: list[str],
    config: DataConfig,
    folders: list[str | None] | None = None,
    known: Sequence[str] = (),
) -> Layout:
    """Put the rows of a table into splits. Raises: UserError for labels that are ambiguous."""
    notes: list[str] = []
    split_column = _split_column(table, path_columns, config)
    groups = _groups(table, config)
    rest = path_columns | {name for name in (split_column, config.group_column_name) if name}
    label_column, labels = _labels(table, rest, config, notes, folders)
    missing = [value for value, file in zip(values, files, strict=True) if file is None]
    if len(missing) == len(files):
        raise UserError(
            f"none of the {len(files):,} images that {table.name} names is in {one_line(listing.root)}, "
            f"such as {listed(missing, MAX_NAMES)}{_called(listing)}"
        )
    if missing:
        notes.append(
            f"{table.name}: left out {len(missing):,} of {len(files):,} rows that name no image: "
            f"{listed(missing, MAX_NAMES)}"
        )
    unlabelled = [
        value for value, file, label in zip(values, files, labels, strict=True)
        if file is not None and label is None
    ]  # fmt: skip
    if unlabelled:
        notes.append(
            f"{table.name}: left out {len(unlabelled):,} of {len(files):,} rows without a label: "
            f"{listed(unlabelled, MAX_NAMES)}"
        )
    rows: dict[File, tuple[int, Any]] = {}
    repeated = 0
    for number, (file, label) in enumerate(zip(files, labels, strict=True)):
        if file is None or label is None:
            continue
        before = rows.setdefault(file, (number, label))
        repeated += before[0] != number
        if before[1] != label:
            raise UserError(
                f"{table.name} gives {one_line(file.name)} two labels, {before[1]!r} in row "
                f"{before[0] + 1} and {label!r} in row {number + 1}; fix it, or for multiple labels per "
                "image see metadata.jsonl in docs/data.md"
            )
    if repeated:
        notes.append(
            f"{table.name}: left out {repeated:,} of {len(files):,} rows that repeat an image"
        )
    if not rows:
        raise UserError(f"{table.name} has no row with an image and a label")
    split_of, split_names = _splits(table, split_column, rows, config.folders)
    splits: dict[str, list] = {
        split: sorted((f, label) for f, (_, label) in rows.items() if split_of[f] == split)
        for split in ORDER
        if split in split_of.values()
    }
    class_names = _class_names(splits, table.name, known)
    notes += _alike(class_names)
    left_out = listing.all_left_out(table.paths)
    left_out[f"not in {table.name}"] += len(set(listing.images) - set(rows))
    rows_left_out = Counter(
        {
            "naming no image": len(missing),
            "without a label": len(unlabelled),
            "repeating an image": repeated,
        }
    )
    return Layout(
        splits, class_names, f"column {label_column!r} of {table.name}", left_out, rows_left_out,
        split_names, config.image_column_name or "_image", label_column, notes, config.group_column_name,
        {file: groups[row] for file, (row, _) in rows.items()} if groups else {},
    )  # fmt: skip


def _groups(table: Table, config: DataConfig) -> list[str]:
    """Return the group of each row; empty if none are requested. Raises: NoTable without the column."""
    requested = config.group_column_name
    if requested is None:
        return []
    if requested not in table.columns:
        raise NoTable(
            f"no column {requested!r} in {table.name}, only {listed(table.columns, 8)}"
            f"{nearest_hint(requested, table.columns)}; pass --group_column_name with one of them"
        )
    return [_text(cell) for cell in table.columns[requested]]


def _split_column(table: Table, taken: set[str], config: DataConfig) -> str | None:
    """Find the column that names splits by its values. Raises: UserError if only some of them are splits."""
    for name, cells in table.columns.items():
        is_label = name == config.label_column_name or name.lower() in LABEL_NAMES
        if name in taken or is_label or not _is_plain(cells):
            continue
        values = set(map(_text, cells))
        roles = split_roles(values)
        if len(roles) == len(values) and "train" in roles.values():
            return name
        if name.lower() in DIVIDING or (roles and name.lower() in SPLIT_COLUMN_NAMES):
            raise UserError(
                f"the values of column {name!r} of {table.name} are not all names of splits: "
                f"{listed(sorted(map(repr, values)), 8)}; use train, validation and test, or "
                "rename it"
            )
    return None


def _splits(
    table: Table, split_column: str | None, rows: dict[File, tuple[int, Any]], folders: str
) -> tuple[dict[File, str], dict[str, str]]:
    """Return the split of each image, and the original name of each split: by a column, else by the folders.

    Raises: UserError if only some of the folders are splits. folders: classes if none is.
    """
    if split_column is not None:
        cells = list(map(_text, table.columns[split_column]))
        roles, mark = split_roles(set(cells)), ""
        names = {file: cells[row] for file, (row, _) in rows.items()}
    else:
        tops = top_folders([file.name for file in rows])
        roles, mark = {} if folders == "classes" else split_roles(set(tops)), "/"
        names = dict(zip(rows, tops, strict=True))
    if not roles:
        return dict.fromkeys(rows, "train"), {}
    others = sorted(set(names.values()) - set(roles))
    if others and set(roles.values()) == {"train"}:
        return dict.fromkeys(rows, "train"), {}
    if others:
        raise UserError(
            f"{table.name} names images in {listed(f'{name}/' for name in sorted(roles))} and in "
            f"{listed(f'{name}/' for name in others)}; add a column split with train, validation or test to "
            "it, or pass --folders classes to train on all of them"
        )
    return {file: roles[name] for file, name in names.items()}, {
        roles[name]: f"{name}{mark}"
        for name in sorted(set(names.values()), key=lambda n: ORDER.index(roles[n]))
    }


def top_folders(names: list[str]) -> list[str]:
    """The first folder of each name, below those that all share, but not below one named as a split."""
    tops = [name.split("/", 1) for name in names]
    while all(len(parts) == 2 for parts in tops):
        first = {parts[0] for parts in tops}
        if len(first) > 1 or split_roles(first):
            return [parts[0] for parts in tops]
        tops = [parts[1].split("/", 1) for parts in tops]
    return [parts[0] if len(parts) == 2 else "" for parts in tops]


def _label_by_name(table: Table, taken: set[str], config: DataConfig) -> str | None:
    """The label column by its name: the requested one, or label, labels, class, target or category."""
    requested = config.label_column_name
    if requested is not None:
        if requested in table.columns:
            return requested
        raise NoTable(
            f"no column {requested!r} in {table.name}, only {listed(table.columns, 8)}"
            f"{nearest_hint(requested, table.columns)}; pass --label_column_name with one of them"
        )
    named = [
        name for name in table.columns
        if name.lower() in LABEL_NAMES and name not in taken
        and (_is_plain(table.columns[name]) or _holds_lists(table.columns[name]))
    ]  # fmt: skip
    return named[0] if len(named) == 1 else None


def _labels(
    table: Table,
    taken: set[str],
    config: DataConfig,
    notes: list[str],
    folders: list[str | None] | None,
) -> tuple[str, list[Any]]:
    """Find the labels: the column's name and the class of each row, None where it is missing.

    folders: the class folder of each row's image, if there are such folders.
    Raises: UserError if no column, or more than one, could be the labels; beside class folders, NoTable if
    none could.
    """
    column = _label_by_name(table, taken, config)
    others = [name for name in table.columns if name not in taken]
    if column is None:
        if one_hot := _one_hot(table, others):
            return one_hot
        found = [name for name in others if _could_be_labels(table.columns[name])]
        if (
            folders is None
            and not found
            and len(others) == 1
            and _is_plain(table.columns[others[0]])
        ):
            found = others
        if folders is not None:
            agreeing = [
                name for name in found if agree(zip(folders, table.columns[name], strict=True))
            ]
            found = agreeing[:1] or found
        if not found:
            error = UserError if folders is None else NoTable
            raise error(
                f"none of the columns {listed(table.columns, 8)} of {table.name} labels its images; pass "
                "--label_column_name"
            )
        if len(found) > 1:
            raise UserError(
                f"the label column of {table.name} is ambiguous: {listed(found, 8)} could be labels; "
                "choose one with --label_column_name"
            )
        column = found[0]
    if config.label_column_name is None and len(others) > 1:
        rest = listed((name for name in others if name != column), 8)
        notes.append(f"{table.name}: the labels are in column {column!r}; not used: {rest}")
    return column, _label_cells(table.columns[column])


def agree(pairs: Iterable[tuple[Any, Any]]) -> bool:
    """True if left and right values correspond one to one; pairs with None do not count."""
    distinct = {pair for pair in pairs if None not in pair}
    return len({a for a, _ in distinct}) == len(distinct) == len({b for _, b in distinct})


def _label_cells(cells: list[Any]) -> list[Any]:
    """Return labels as text, 1.0 as 1 if all are whole; lists as tuples; None where one is missing."""
    cells = _parsed_lists(cells)
    if any(isinstance(cell, list) for cell in cells):
        return [
            tuple(map(_text, cell)) if isinstance(cell, list)
            else None if _is_missing(cell) else (_text(cell),)
            for cell in cells
        ]  # fmt: skip
    present = [cell for cell in cells if not _is_missing(cell)]
    whole = bool(present) and all(_is_whole(cell) for cell in present)
    if present and not whole and all(_is_fraction(cell) or _is_whole(cell) for cell in present):
        fraction = next(cell for cell in present if _is_fraction(cell))
        raise UserError(
            f"the labels are numbers such as {fraction}, not classes; pass --label_column_name"
        )
    return [
        None if _is_missing(cell) else str(int(float(cell))) if whole else _text(cell)
        for cell in cells
    ]


def _parsed_lists(cells: list[Any]) -> list[Any]:
    """Parse text such as "['cat', 'dog']", as pandas writes lists; other cells stay as they are."""
    texts = [cell for cell in cells if not _is_missing(cell)]
    if not texts or not all(
        isinstance(text, str) and text.startswith("[") and text.endswith("]") for text in texts
    ):
        return cells
    try:
        lists = [None if _is_missing(cell) else ast.literal_eval(cell) for cell in cells]
    except (ValueError, SyntaxError):
        return cells
    return lists


def _is_missing(cell: Any) -> bool:
    return cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell))


def _is_whole(cell: Any) -> bool:
    """True for 3.0, as a number or as text."""
    if isinstance(cell, str):
        return cell.endswith(".0") and cell[:-2].removeprefix("-").isdecimal()
    return isinstance(cell, float) and cell.is_integer()


def _is_fraction(cell: Any) -> bool:
    """True for 0.37, as a number or as text."""
    if isinstance(cell, str):
        return re.fullmatch(r"-?\d*\.\d+(e-?\d+)?", cell) is not None and not _is_whole(cell)
    return isinstance(cell, float) and not cell.is_integer()


def _could_be_labels(cells: list[Any]) -> bool:
    """True for a column with at least two distinct values, which occur twice each on average."""
    if not _is_plain(cells):
        return False
    present = [cell for cell in cells if not _is_missing(cell)]
    if any(_is_fraction(cell) for cell in present):
        return False
    return 2 <= len(set(present)) <= max(2, len(present) // 2)


def _one_hot(table: Table, columns: list[str]) -> tuple[str, list[Any]] | None:
    """Read one column of 0 and 1 for each class, with exactly one 1 in each row."""
    if len(columns) < 2:
        return None
    numbers = []
    for name in columns:
        texts = [_text(cell) for cell in table.columns[name]]
        if not set(texts) <= {"0", "1", "0.0", "1.0"}:
            return None
        numbers.append([text.startswith("1") for text in texts])
    rows = list(zip(*numbers, strict=True))
    if any(sum(row) > 1 for row in rows):
        raise UserError(
            f"the columns {listed(columns, 8)} of {table.name} are 0 or 1, and in some rows more than one "
            "is 1; choose one with --label_column_name, or see multiple labels per image in "
            "docs/data.md"
        )
    if any(sum(row) != 1 for row in rows):
        return None
    return "label", [columns[row.index(True)] for row in rows]


def _alike(names: list[str]) -> list[str]:
    """Note the classes that differ only in upper and lower case."""
    found = defaultdict(list)
    for name in names:
        found[name.casefold()].append(name)
    return [
        f"classes {' and '.join(map(repr, same))} differ only in upper and lower case; they are separate "
        "classes, so spell them alike if they are one"
        for same in found.values()
        if len(same) > 1
    ]


def _class_names(splits: dict[str, list], table: str, known: Sequence[str] = ()) -> list[str]:
    """The classes that occur in train, in order: numbers by value, else by text; then the `known` ones that
    only other splits have.

    Raises: UserError for another class that train lacks.
    """

    def classes(rows: list) -> Counter[str]:
        counts: Counter[str] = Counter()
        for _, label in rows:
            counts.update(label if isinstance(label, tuple) else (label,))
        return counts

    labelled = [splits["train"]] if "train" in splits else list(splits.values())
    found = sum((classes(rows) for rows in labelled), Counter())
    others: list[str] = []
    for split, rows in splits.items():
        for name, count in sorted(classes(rows).items()):
            if name in known and name not in (*found, *others):
                others.append(name)
            elif name not in (*found, *others):
                raise UserError(
                    f"class {name!r} of {table} is only in {split} ({count:,} images), not in train; "
                    "add training images, or remove its rows"
                )
    if len(found) < 2 and not set(known).issuperset(found):
        raise NoTable(f"{table} has one class, {listed(found)}; a classifier needs two or more")
    check_class_names(list(found))
    if all(name.removeprefix("-").isdecimal() for name in found):
        return sorted(found, key=lambda name: (int(name), name)) + others
    return sorted(found) + others

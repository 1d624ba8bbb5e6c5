"""Rows of earlier data in one Parquet file: encoded images, labels, and the split that each belongs to.

`hf-cifar update` writes it into the folder of a run, so that later runs can train and evaluate on rows of
data that are no longer available.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from hf_cifar.data.columns import quiet_datasets
from hf_cifar.data.images import read_encoded
from hf_cifar.data.labels import class_label, holds_lists, with_classes_after
from hf_cifar.data.split import Split
from hf_cifar.errors import UserError
from hf_cifar.progress import progress
from hf_cifar.text import one_line

# Keys in the metadata of the file.
NOTE, KNOWN = "stored_rows", "known_images"
# Column of a data set with stored rows: the split to which each belongs, "" for the data set's own rows, and
# COPY for those of them that are not used, because the earlier run has the image.
STORED, COPY = "stored", "copy"
HASH = np.dtype("<u8")  # of an image
MOST_ROWS, MOST_BYTES = 1000, 64 * 1024**2  # that are written at once


@dataclass(frozen=True, eq=False)
class StoredRows:
    """Stored rows. rows: columns image (encoded), label, stored (the split), row_id (in the earlier source).

    note: where the rows come from, as plain values; its `copies` are the rows of the new data, by split,
    whose images are known. known: sorted hashes of all images of the earlier run and of the runs before it,
    see `image_hashes`.
    """

    rows: Dataset
    note: Mapping[str, Any]
    known: np.ndarray

    @classmethod
    def load(cls, path: str | Path) -> StoredRows:
        """Read a file. Raises: UserError if it is missing or damaged."""
        path = Path(path).expanduser()
        if not path.is_file():
            raise UserError(
                f"--stored_rows: no file {path}; restore it, or start hf-cifar update again"
            )
        try:
            table = pyarrow.parquet.read_table(path)
            note, known = (table.schema.metadata[key.encode()] for key in (NOTE, KNOWN))
            rows = Dataset(datasets.table.InMemoryTable(table))
            return cls(rows, json.loads(note), np.frombuffer(known, HASH))
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise UserError(
                f"--stored_rows: {path} holds no stored rows ({type(error).__name__}: "
                f"{one_line(error, 200)}); remove it, and start hf-cifar update again"
            ) from None

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of their ids; some may have no rows."""
        return class_label(self.rows.features["label"]).names

    def row_ids(self, split: str) -> np.ndarray:
        """Return the ids of a split's rows in their earlier source, [N]."""
        return self.of(split)["row_id"][:].to_numpy()

    def of(self, split: str) -> Dataset:
        """Return the rows of a split, in arrow format."""
        places = np.flatnonzero(np.array(self.rows[STORED][:]) == split)
        return self.rows.select(places).with_format("arrow")

    def joined(self, splits: DatasetDict, train: str, validation: str | None) -> DatasetDict:
        """Append the rows to the splits of a new data set, and mark its images that the earlier run has. The
        stored classes come first, then the others.

        train, validation: names of the data set's own splits; without a validation split, the stored
        validation rows are appended to train.
        Raises: UserError if only one of the two has multiple labels per image.
        """
        lists = holds_lists(self.rows.features["label"])
        joined = {}
        for name, rows in splits.items():
            if holds_lists(rows.features["label"]) != lists:
                kinds = ("one label", "lists of labels")
                raise UserError(
                    f"split {name} has {kinds[not lists]} per image, but the stored rows have "
                    f"{kinds[lists]}; pass data with the same"
                )
            part = np.full(len(rows), "", object)
            part[self.note["copies"].get(name, [])] = COPY
            rows = with_classes_after(rows, self.class_names, name)
            joined[name] = rows.add_column(STORED, part.tolist(), feature=Value("string"))
        names = class_label(joined[train].features["label"]).names
        known = with_classes_after(self.rows.remove_columns("row_id"), names, "the stored rows")
        part = np.array(self.rows[STORED][:])
        for split in ("train", "validation", "test"):
            home = {"train": train, "validation": validation or train}.get(split, split)
            places = np.flatnonzero(part == split)
            if len(places):
                more = known.select(places)
                given = [joined[home]] if home in joined else []
                joined[home] = datasets.concatenate_datasets([*given, more])
        return DatasetDict(joined)


def without_known_splits(splits: DatasetDict, copies: Mapping[str, list[int]]) -> DatasetDict:
    """Return a new data set without those splits of which the earlier run has all images; train stays."""
    train = next(iter(splits))
    return DatasetDict(
        {
            name: rows
            for name, rows in splits.items()
            if name == train or len(copies.get(name, [])) < len(rows)
        }
    )


def image_hashes(rows: Dataset) -> np.ndarray:
    """Return the first 64 bits of the SHA-256 of each encoded image, [N]; 0 where none can be read."""

    def hash_of(cell: dict[str, Any] | None) -> int:
        try:
            content = read_encoded(cell)
        except OSError:
            content = b""
        return int.from_bytes(hashlib.sha256(content).digest()[:8], "little") if content else 0

    encoded = rows.select_columns(["image"]).with_format(None)
    cells = (cell for batch in encoded.iter(100) for cell in batch["image"])
    shown = progress(cells, "comparing images", len(rows))
    return np.fromiter((hash_of(cell) for cell in shown), HASH, len(rows))


def stored_split(rows: Dataset) -> np.ndarray:
    """Return the split to which each row belongs if it is stored, else "", [N] of strings."""
    if STORED not in rows.features:
        return np.full(len(rows), "")
    return np.array(rows[STORED][:], dtype=object).astype(str)


def write_stored(
    path: Path,
    splits: Sequence[Split],
    class_names: Sequence[str],
    note: Mapping[str, Any],
    known: np.ndarray,
    *,
    embeds: bool = True,
) -> None:
    """Write the rows of splits to a file, which appears only when it is complete.

    note, known: see `StoredRows`. embeds: copy the content of image files; otherwise refer to the files,
    which must then remain.
    Raises: UserError for an image file that cannot be read.
    """
    label = splits[0].pixels.rows.features["label"]
    kind: Any = ClassLabel(names=list(class_names))
    features = Features(
        {
            "image": Image(decode=False),
            "label": datasets.List(kind) if holds_lists(label) else kind,
            STORED: Value("string"),
            "row_id": Value("int64"),
        }
    )
    schema = features.arrow_schema
    own = {NOTE: json.dumps(note), KNOWN: np.unique(known).astype(HASH).tobytes()}
    schema = schema.with_metadata({**schema.metadata, **own})
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with pyarrow.parquet.ParquetWriter(temporary, schema) as writer, quiet_datasets():
            for piece in _pieces(splits, embeds=embeds):
                writer.write_table(pyarrow.Table.from_pylist(piece, schema))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _stored_cell(cell: dict[str, Any], *, embeds: bool) -> dict[str, Any]:
    """Return a cell of an image column as it is stored; an empty cell stays empty, and the run reports it.

    Raises: OSError for a file that cannot be read.
    """
    path = cell.get("path") or None
    if embeds or cell.get("bytes"):
        # The last folder often is the class, and tells files of the same name apart.
        return {
            "bytes": read_encoded(cell) or None,
            "path": path and "/".join(Path(path).parts[-2:]),
        }
    return {"bytes": None, "path": path and os.path.abspath(path)}


def _pieces(splits: Sequence[Split], *, embeds: bool) -> Iterator[list[dict[str, Any]]]:
    """Yield rows in pieces of limited size: Arrow holds at most 2 GB of bytes in one."""
    piece: list[dict[str, Any]] = []
    size, total = 0, sum(map(len, splits))
    places = ((split, place) for split in splits for place in range(len(split)))
    for split, place in progress(places, "storing rows", total):
        row = split.rows[place]
        try:
            cell = _stored_cell(row["image"] or {}, embeds=embeds)
        except OSError as error:
            raise UserError(f"{split.describe_row(place)}: {one_line(error)}") from None
        piece.append(
            {
                "image": cell, "label": row["label"], STORED: split.name,
                "row_id": int(split.row_ids[place]),
            }
        )  # fmt: skip
        size += len(cell["bytes"] or b"")
        if len(piece) >= MOST_ROWS or size >= MOST_BYTES:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece

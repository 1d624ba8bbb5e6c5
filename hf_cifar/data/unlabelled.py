"""The images of a data set in a fixed order; labels are not needed and not read."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.compute as pc
from datasets import Dataset

from hf_cifar.config.data import DataConfig
from hf_cifar.data.columns import data_folder, image_columns
from hf_cifar.data.images import read_encoded
from hf_cifar.data.layout import ORDER
from hf_cifar.data.sources import announced, open_data_set
from hf_cifar.errors import UserError

LISTED_ROWS = 10_000  # whose names and sizes are in memory at the same time
SAMPLED_ROWS = 1000  # whose content counts for the hash


@dataclass(frozen=True, eq=False)
class UnlabelledImages:
    """The images of one split, or of all: column image (encoded).

    roots: how the names of files below a folder begin.
    """

    rows: Dataset
    roots: dict[str, str]

    def __len__(self) -> int:
        return len(self.rows)

    def cells(self, rows: range) -> list[dict[str, Any] | None]:
        """Read the cells of some rows, `{"bytes", "path"}` each. Threads may call it at the same time."""
        return self._column(rows).to_pylist()

    def name(self, cell: dict[str, Any] | None) -> str | None:
        """Return the name of an image: its path below the folder of the data set, or as the column has it."""
        path = (cell or {}).get("path")
        if not path:
            return None
        for root, prefix in self.roots.items():
            if path.startswith(root + os.sep):
                path = prefix + path[len(root) + 1 :]
                break
        return Path(path).as_posix()

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of the names and sizes of all images, in their order, and of the content of 1,000 of them,
        evenly spaced."""
        digest = hashlib.sha256()
        for start in range(0, len(self), LISTED_ROWS):
            for name, size in self._names_and_sizes(
                range(start, min(start + LISTED_ROWS, len(self)))
            ):
                digest.update(f"{name}\0{size}\n".encode("utf-8", "surrogateescape"))
        places = np.linspace(0, len(self) - 1, min(len(self), SAMPLED_ROWS)).round().astype(int)
        for place in places.tolist():
            (cell,) = self.cells(range(place, place + 1))
            try:
                digest.update(hashlib.sha256(read_encoded(cell)).digest())
            except OSError:  # unreadable, as it will be when it is predicted
                digest.update(b"unreadable")
        return digest.hexdigest()

    def _names_and_sizes(self, rows: range) -> Iterator[tuple[str | None, int | None]]:
        """Yield the name and the number of bytes of images, which are not read."""
        for chunk in self._column(rows).chunks:
            sizes = pc.binary_length(pc.struct_field(chunk, "bytes")).to_pylist()
            paths = pc.struct_field(chunk, "path").to_pylist()
            for path, size in zip(paths, sizes, strict=True):
                if size is None and path:
                    with contextlib.suppress(OSError):
                        size = os.stat(path).st_size
                yield self.name({"path": path}), size

    def _column(self, rows: range) -> pyarrow.ChunkedArray:
        return self.rows.with_format("arrow")[rows.start : rows.stop]["image"]


def load_images(config: DataConfig, split: str | None = None) -> UnlabelledImages:
    """Open the images of a split, or of all splits one after another; labels are neither needed nor read.

    Raises: UserError for an unknown data set or split, or without images.
    """
    source = announced(open_data_set(config, labelled=False), config)
    splits = source.splits
    if split is not None and split not in splits:
        raise UserError(
            f"{config.dataset_name} has no split {split}, only {', '.join(splits)}; pass one of them as "
            "--split, or leave it out for all"
        )
    order = sorted(splits, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
    chosen = datasets.DatasetDict(
        {name: splits[name] for name in order if split in (None, name) and len(splits[name])}
    )
    if not chosen:
        raise UserError(f"{config.dataset_name} has no images; pass another --dataset_name")
    found = list(image_columns(chosen, config).values())
    rows = found[0] if len(found) == 1 else datasets.concatenate_datasets(found)
    folder = data_folder(config)
    given = () if folder is None else (str(folder), os.path.abspath(folder))
    return UnlabelledImages(rows, source.roots or dict.fromkeys(given, ""))

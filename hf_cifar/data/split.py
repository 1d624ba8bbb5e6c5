"""A split: some rows of a data set, with their labels and images."""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset

from hf_cifar.data.labels import class_label, label_array
from hf_cifar.data.pixels import SMALL_PIXELS, Form, OtherSize, Pixels, num_threads
from hf_cifar.data.preparation import SplitImages
from hf_cifar.errors import UserError
from hf_cifar.progress import progress
from hf_cifar.text import listed, render_numbers

if TYPE_CHECKING:  # mistakes in data are found without importing torch
    import torch

    from hf_cifar.transforms.preprocessing import Preprocessing

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Split:
    """Some rows of a source's split, by their positions in `pixels`, which other splits may share.

    positions: [N] int64. skipped: ids of the rows left out by --on_bad_image skip. images: for a model, see
    `prepare_split`. doubted: [D, 3] int64, row id, label and suggested label of each row left out by
    --clean_labels; None without it.
    """

    name: str
    pixels: Pixels
    positions: np.ndarray
    skipped: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    images: SplitImages | None = None
    doubted: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.positions)

    @functools.cached_property
    def row_ids(self) -> np.ndarray:
        """[N] int64, the number of each row in the source's own split."""
        return self.pixels.row_ids[self.positions]

    @property
    def source_split(self) -> str:
        """Name of the source's own split that `row_ids` refer to."""
        return self.pixels.source_split

    @functools.cached_property
    def rows(self) -> Dataset:
        """Columns image (encoded) and label."""
        is_whole = np.array_equal(self.positions, np.arange(len(self.pixels)))
        return self.pixels.rows if is_whole else self.pixels.rows.select(self.positions)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """[N] int64 class ids; for multi-label data [N, K] uint8, 1 for each class of an image."""
        return label_array(self.rows)

    @property
    def id2label(self) -> dict[int, str]:
        return dict(enumerate(class_label(self.pixels.rows.features["label"]).names))

    def path_of(self, position: int) -> str | None:
        """Return the path or name of the file of an image, if it has one."""
        return (self.rows[int(position)]["image"] or {}).get("path") or None

    def describe_row(self, position: int) -> str:
        """Identify a row in an error message: the source's own split, the row number, and the file if any."""
        row = f"{self.source_split} row {self.row_ids[position]}"
        path = self.path_of(position)
        return f"{row} ({path})" if path and os.path.exists(path) else row

    def decode(self, position: int) -> np.ndarray:
        """Decode one image, [H, W, 3] uint8. Raises: UserError that names the row."""
        try:
            return self.pixels.decode(int(self.positions[position]))
        except UserError as error:
            raise UserError(f"{self.describe_row(position)}: {error}") from None

    def pictures(self, what: str) -> Iterable[np.ndarray]:
        """Return every image in its own size, in order: small ones of one size as uint8 [N, H, W, 3], from
        the cache if they are there; others one by one, decoded on all cores.

        what: the work that needs them, for its progress.
        Raises: UnreadableImages, for images one by one after all rows have been tried.
        """
        size = self.pixels.common_size
        if size is None or math.prod(size) > SMALL_PIXELS:
            return self._decoded(what)
        prepared = self.pixels.prepared(Form(size))
        try:
            prepared.prepare(self.positions, what)
        except OtherSize:
            return self._decoded(what)
        images, readable = prepared.read(self.positions)
        return images if readable.all() else self._decoded(what)  # which names the unreadable ones

    def _decoded(self, what: str) -> Iterator[np.ndarray]:
        from hf_cifar.threads import map_in_threads  # imports torch

        def attempt(position: int) -> np.ndarray | UserError:
            try:
                return self.pixels.decode(position)
            except UserError as error:
                return error

        faults: dict[int, str] = {}
        images = map_in_threads(attempt, self.positions.tolist(), num_threads())
        for position, image in enumerate(progress(images, what, len(self))):
            if isinstance(image, UserError):
                faults[position] = str(image)
            elif not faults:
                yield image
        if faults:
            raise UnreadableImages([(self, faults)])


class UnreadableImages(UserError):
    """Unreadable images in one or more splits. found: each split with its faults by position."""

    def __init__(self, found: Sequence[tuple[Split, dict[int, str]]]) -> None:
        self.found = found
        split, faults = found[0]
        position = min(faults)
        first = f"{split.describe_row(position)}: {faults[position]}"
        count = sum(len(faults) for _, faults in found)
        if count == 1:
            message = f"{first}; fix or remove it"
        else:
            rows = render_rows(found)
            message = f"{count:,} images cannot be read, {rows}; the first: {first}"
            message += render_files(found, intro="; the others: ", skip=1) + "; fix or remove them"
        super().__init__(f"{message}, or pass --on_bad_image skip")


def render_files(
    found: Sequence[tuple[Split, dict[int, str]]], intro: str, skip: int = 0, shown: int = 8
) -> str:
    """Format the files of these images after `intro`: `: a.jpg, b.jpg`; empty if they have none.

    skip: number of images at the beginning that are left out.
    """
    paths = [split.path_of(position) for split, faults in found for position in sorted(faults)]
    files = [path for path in paths[skip:] if path and os.path.exists(path)]
    return intro + listed(files, shown) if files else ""


def render_rows(found: Sequence[tuple[Split, dict[int, str]]]) -> str:
    """Format row ids by the source's own splits: `train rows 3, 17-19, validation rows 2`."""
    ids: dict[str, list[int]] = {}
    for split, faults in found:
        ids.setdefault(split.source_split, []).extend(split.row_ids[list(faults)].tolist())
    return ", ".join(f"{name} rows {render_numbers(rows)}" for name, rows in ids.items())


def subset(split: Split, positions: np.ndarray) -> Split:
    """Select rows of a split by position."""
    images = None if split.images is None else split.images.select(positions)
    return replace(split, positions=split.positions[positions], images=images)


def without_rows(split: Split, row_ids: Sequence[int]) -> Split:
    """Leave out the rows with these ids, such as those that a run skipped."""
    if not len(row_ids):
        return split
    return subset(split, np.flatnonzero(~np.isin(split.row_ids, row_ids)))


def trained_rows(train: Split, facts: dict[str, Any]) -> Split:
    """Leave out the rows that a run did not train on, by its run.json: unreadable and doubted ones."""
    skipped = facts.get("skipped_rows", {}).get("train", [])
    doubted = (facts.get("doubted_rows") or {"row_ids": []})["row_ids"]
    return without_rows(train, [*skipped, *doubted])


def with_images(
    split: Split,
    preprocessing: Preprocessing,
    *,
    augmented: bool = False,
    kind: str = "auto",
    lazy: bool = False,
    device: torch.device | None = None,
) -> Split:
    """Return a split with its images for a model, not prepared yet. See `SplitImages`."""
    images = SplitImages(
        split.name, split.pixels, split.positions, preprocessing,
        augmented=augmented, kind=kind, lazy=lazy, device=device,
    )  # fmt: skip
    return replace(split, images=images)


def readable(*splits: Split, on_bad_image: str = "error") -> list[Split]:
    """Prepare the images of splits that are still missing, and leave out the unreadable ones.

    Raises: UnreadableImages unless `on_bad_image` is skip; UserError if no image of a split can be read.
    """
    found = []
    for split in splits:
        assert split.images is not None
        split.images.prepare()
        found.append((split, split.images.faults))
    bad = [(split, faults) for split, faults in found if faults]
    if bad and on_bad_image != "skip":
        raise UnreadableImages(bad)
    return [without(split, faults) for split, faults in found]


def without(split: Split, faults: dict[int, str]) -> Split:
    """Leave out unreadable images, and log their rows. Raises: UserError if no image is left."""
    if not faults:
        return split
    bad = np.array(list(faults))
    kept = np.setdiff1d(np.arange(len(split)), bad)
    if not len(kept):
        raise UserError(f"no image of {split.name} can be read: {next(iter(faults.values()))}")
    logger.warning(
        "%s: %s of %s images cannot be read and are left out, %s%s",
        split.name, f"{len(bad):,}", f"{len(split):,}", render_rows([(split, faults)]),
        render_files([(split, faults)], intro=": "),
    )  # fmt: skip
    return replace(subset(split, kept), skipped=split.row_ids[bad])


def prepare_split(
    split: Split,
    preprocessing: Preprocessing,
    *,
    augmented: bool = False,
    kind: str = "auto",
    on_bad_image: str = "error",
    device: torch.device | None = None,
) -> Split:
    """Return a split with its images for a model, prepared, and without the unreadable ones."""
    images = with_images(split, preprocessing, augmented=augmented, kind=kind, device=device)
    return readable(images, on_bad_image=on_bad_image)[0]

"""A split: some rows of a data set, with their labels and images."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from datasets import Dataset

from hf_cifar.data.images import decode_cell
from hf_cifar.data.labels import class_label, label_array
from hf_cifar.data.pixels import SHARED_FRACTION, ImageView, Pixels
from hf_cifar.data.streams import Stream
from hf_cifar.errors import UserError
from hf_cifar.text import render_numbers


@dataclass(frozen=True, eq=False)
class Split:
    """Some rows of a source's split, by their positions in `pixels`, which other splits may share."""

    name: str
    pixels: Pixels
    positions: np.ndarray  # [N] int64
    # Ids of the rows left out by --on_bad_image skip.
    skipped: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    # Tensors made from the images, see `store`.
    tensors: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

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
        return self.pixels.rows if self._is_whole else self.pixels.rows.select(self.positions)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """[N] int64 class ids; for multi-label data [N, K] uint8, 1 for each class of an image."""
        return label_array(self.rows)

    @property
    def id2label(self) -> dict[int, str]:
        return dict(enumerate(class_label(self.pixels.rows.features["label"]).names))

    def describe_row(self, position: int) -> str:
        """Identify a row in an error message: the source's own split, the row number, and the file if any."""
        row = f"{self.source_split} row {self.row_ids[position]}"
        path = (self.rows[int(position)]["image"] or {}).get("path")
        return f"{row} ({path})" if path and os.path.exists(path) else row

    def decode(self, position: int) -> np.ndarray:
        """Decode one image, [H, W, 3] uint8. Raises: UserError that names the row."""
        try:
            return decode_cell(self.rows[int(position)]["image"], self.pixels.max_pixels)
        except UserError as error:
            raise UserError(f"{self.describe_row(position)}: {error}") from None

    @property
    def images(self) -> ImageView | list[np.ndarray] | None:
        """All images, decoded once: a view of uint8 [N, H, W, 3], or a list of [H, W, 3] if sizes differ.

        None if they do not fit into the memory budget; they are then decoded on demand.
        Raises: UnreadableImages that names the row of each unreadable image.
        """
        if self._held is None:
            return None
        pixels, positions = self._held
        if faults := _faults_at(pixels, positions):
            raise UnreadableImages([(self, faults)])
        if isinstance(pixels.images, list):
            return [pixels.images[position] for position in positions]
        return ImageView(pixels, positions)

    @functools.cached_property
    def pixel_hash(self) -> str | None:
        """SHA-256 of all decoded images and their shapes, in order; None if they do not fit into memory."""
        if self.images is None:
            return None
        digest = hashlib.sha256()
        for image in self.images:
            digest.update(f"{image.shape} ".encode())
            digest.update(np.ascontiguousarray(image).data)
        return digest.hexdigest()

    def decode_all(self) -> Iterator[np.ndarray]:
        """Yield every image in order, decoded on all cores, with a progress bar on a terminal.

        Raises: UnreadableImages, after all rows have been tried.
        """
        faults: dict[int, str] = {}
        for position, image in enumerate(self._own_pixels.attempts()):
            if isinstance(image, UserError):
                faults[position] = str(image)
            elif not faults:
                yield image
        if faults:
            raise UnreadableImages([(self, faults)])

    def faults(self, *, hold: bool) -> dict[int, str]:
        """Map the position of each unreadable image to the reason. hold: keep the images in memory if they
        fit."""
        return _faults_at(*((hold and self._held) or self._examined))

    @property
    def decoded(self) -> tuple[Pixels, np.ndarray]:
        """The pixels in which most of this split is decoded already, and its positions in them."""
        own = self.__dict__.get("_own_pixels")
        if own is not None and own.is_examined:
            return own, np.arange(len(self))
        return self.pixels, self.positions

    @functools.cached_property
    def _is_whole(self) -> bool:
        return np.array_equal(self.positions, np.arange(len(self.pixels)))

    @property
    def _decodes_all(self) -> bool:
        return len(self) >= SHARED_FRACTION * len(self.pixels)

    @functools.cached_property
    def _own_pixels(self) -> Pixels:
        """The pixels of these rows only."""
        return self.pixels if self._is_whole else self.pixels.select(self.positions)

    @functools.cached_property
    def _held(self) -> tuple[Pixels, np.ndarray] | None:
        """The pixels that hold the decoded images, and the positions in them; None if they do not fit."""
        if self.pixels.hold(decode=self._decodes_all):
            return self.pixels, self.positions
        return (self._own_pixels, np.arange(len(self))) if self._own_pixels.hold() else None

    @property
    def _examined(self) -> tuple[Pixels, np.ndarray]:
        """The pixels to check for unreadable images, and the positions in them."""
        if self._decodes_all or self.pixels.is_examined:
            return self.pixels, self.positions
        return self._own_pixels, np.arange(len(self))


def _faults_at(pixels: Pixels, positions: np.ndarray) -> dict[int, str]:
    faults = pixels.faults
    found = np.flatnonzero(np.isin(positions, list(faults))).tolist() if faults else []
    return {number: faults[int(positions[number])] for number in found}


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
            message = (
                f"{count:,} images cannot be read, {rows}; the first: {first}; fix or remove them"
            )
        super().__init__(f"{message}, or pass --on_bad_image skip")


def render_rows(found: Sequence[tuple[Split, dict[int, str]]]) -> str:
    """Format row ids by the source's own splits: `train rows 3, 17-19, validation rows 2`."""
    ids: dict[str, list[int]] = {}
    for split, faults in found:
        ids.setdefault(split.source_split, []).extend(split.row_ids[list(faults)].tolist())
    return ", ".join(f"{name} rows {render_numbers(rows)}" for name, rows in ids.items())


def find_faults(split: Split, pixel_store: str = "auto") -> dict[int, str]:
    """Map the position of each unreadable image to the reason. The result is cached on disk for later runs.

    pixel_store: unless "streamed", the images stay in memory if they fit, see `Split.images`.
    """
    return split.faults(hold=pixel_store != "streamed")


def require_readable(*splits: Split | Stream, pixel_store: str = "auto") -> None:
    """Decode every image of the splits; streams are not read in advance.

    Raises: UserError that names the row of each unreadable image.
    """
    parts = [split for split in splits if isinstance(split, Split)]
    found = [(split, find_faults(split, pixel_store)) for split in parts]
    found = [(split, faults) for split, faults in found if faults]
    if found:
        raise UnreadableImages(found)


def subset(split: Split, positions: np.ndarray) -> Split:
    """Select rows of a split by position, reusing what it has decoded already."""
    pixels, own = split.decoded
    return replace(split, pixels=pixels, positions=own[positions])

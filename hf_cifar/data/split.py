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

from hf_cifar.data.columns import class_label, label_array
from hf_cifar.data.images import decode_cell
from hf_cifar.data.pixels import SHARED_FROM, ImageView, Pixels
from hf_cifar.data.streams import Stream
from hf_cifar.errors import UserError
from hf_cifar.text import render_numbers


@dataclass(frozen=True, eq=False)
class Split:
    """Some rows of a source's split, by their positions in `pixels`, which other splits may share."""

    name: str
    pixels: Pixels
    positions: np.ndarray  # [N] int64
    # Row ids that --on_bad_image skip has left out.
    skipped: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    # Tensors made of the images, see `store`.
    tensors: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.positions)

    @functools.cached_property
    def row_ids(self) -> np.ndarray:
        """[N] int64, the number of each row in the source's own split."""
        return self.pixels.row_ids[self.positions]

    @property
    def source_split(self) -> str:
        """The name of the source's own split that `row_ids` count in."""
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
        """A row as error messages name it: the source's own split, the row number, and the file if any."""
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

        None if they take more memory than there is to spare: then they are decoded as they are needed.
        Raises: UnreadableImages that names the row of each image that cannot be read.
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
            digest.update(np.ascontiguousarray(image))
        return digest.hexdigest()

    def decode_all(self) -> Iterator[np.ndarray]:
        """Decode every image in order, on all cores, with a progress bar on a terminal, and keep none.

        Raises: UnreadableImages, once all the others are decoded too.
        """
        faults: dict[int, str] = {}
        for position, image in enumerate(self._alone.attempts()):
            if isinstance(image, UserError):
                faults[position] = str(image)
            elif not faults:
                yield image
        if faults:
            raise UnreadableImages([(self, faults)])

    def faults(self, *, hold: bool) -> dict[int, str]:
        """Why an image cannot be read, by position; hold: have the images in memory, if they fit."""
        return _faults_at(*((hold and self._held) or self._examined))

    @property
    def decoded(self) -> tuple[Pixels, np.ndarray]:
        """The pixels that know the most about the images at this time, and the positions there."""
        alone = self.__dict__.get("_alone")
        if alone is not None and alone.is_examined:
            return alone, np.arange(len(self))
        return self.pixels, self.positions

    @functools.cached_property
    def _is_whole(self) -> bool:
        return np.array_equal(self.positions, np.arange(len(self.pixels)))

    @property
    def _decodes_all(self) -> bool:
        return len(self) >= SHARED_FROM * len(self.pixels)

    @functools.cached_property
    def _alone(self) -> Pixels:
        """The pixels of these rows and no others."""
        return self.pixels if self._is_whole else self.pixels.select(self.positions)

    @functools.cached_property
    def _held(self) -> tuple[Pixels, np.ndarray] | None:
        """The decoded pixels that have the images, and the positions there; None if they do not fit."""
        if self.pixels.hold(decode=self._decodes_all):
            return self.pixels, self.positions
        return (self._alone, np.arange(len(self))) if self._alone.hold() else None

    @property
    def _examined(self) -> tuple[Pixels, np.ndarray]:
        """The pixels whose faults say which images cannot be read, and the positions there."""
        if self._decodes_all or self.pixels.is_examined:
            return self.pixels, self.positions
        return self._alone, np.arange(len(self))


def _faults_at(pixels: Pixels, positions: np.ndarray) -> dict[int, str]:
    faults = pixels.faults
    found = np.flatnonzero(np.isin(positions, list(faults))).tolist() if faults else []
    return {number: faults[int(positions[number])] for number in found}


class UnreadableImages(UserError):
    """Names the unreadable images of some splits. found: each split with its faults by position."""

    def __init__(self, found: Sequence[tuple[Split, dict[int, str]]]) -> None:
        self.found = found
        split, faults = found[0]
        position = min(faults)
        first = f"{split.describe_row(position)}: {faults[position]}"
        count = sum(len(faults) for _, faults in found)
        if count == 1:
            message = f"{first}; mend or remove it"
        else:
            rows = render_rows(found)
            message = (
                f"{count:,} images cannot be read, {rows}; the first: {first}; mend or remove them"
            )
        super().__init__(f"{message}, or pass --on_bad_image skip")


def render_rows(found: Sequence[tuple[Split, dict[int, str]]]) -> str:
    """Format row ids by the source's own splits: `train rows 3, 17-19, validation rows 2`."""
    ids: dict[str, list[int]] = {}
    for split, faults in found:
        ids.setdefault(split.source_split, []).extend(split.row_ids[list(faults)].tolist())
    return ", ".join(f"{name} rows {render_numbers(rows)}" for name, rows in ids.items())


def find_faults(split: Split, pixel_store: str = "auto") -> dict[int, str]:
    """Find the images that cannot be read: why, by position. The next run finds the answer on disk.

    pixel_store: unless it is "streamed", the images stay in memory if they fit, see `Split.images`.
    """
    return split.faults(hold=pixel_store != "streamed")


def require_readable(*splits: Split | Stream, pixel_store: str = "auto") -> None:
    """Decode every image, except those of a stream, which is not read beforehand.

    Raises: UserError that names the row of each image that cannot be read.
    """
    parts = [split for split in splits if isinstance(split, Split)]
    found = [(split, find_faults(split, pixel_store)) for split in parts]
    found = [(split, faults) for split, faults in found if faults]
    if found:
        raise UnreadableImages(found)


def subset(split: Split, positions: np.ndarray) -> Split:
    """Some rows of a split, by position; nothing that the split has decoded is decoded again."""
    pixels, own = split.decoded
    return replace(split, pixels=pixels, positions=own[positions])

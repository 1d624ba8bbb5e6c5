"""The images of a source, decoded once: splits, subsamples, folds and seeds are row numbers into one array.

A split of at least half of a source's images decodes all of them, into an array that every other split of the
source uses too. It stays on disk for later runs, under a key made from the source's images. A smaller split
uses that array if it exists, in memory or on disk, and otherwise decodes only its own rows.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np
import psutil
from datasets import Dataset
from tqdm.auto import tqdm

from hf_cifar.config.data import MAX_IMAGE_PIXELS, ValueRange
from hf_cifar.data.cache import content_key, load_array, one_process_at_a_time, save_array
from hf_cifar.data.images import decode_cell, decode_cells
from hf_cifar.errors import UserError

# Share of the free memory that decoded images may take.
MEMORY_SHARE = 0.25
# A split with a smaller share of its source decodes only its own rows.
SHARED_FRACTION = 0.5
# Takes the place of an unreadable image among images of mixed sizes.
BLANK = np.zeros((0, 0, 3), np.uint8)


def memory_to_spare() -> int:
    """Bytes of memory that this process may use for decoded images."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(psutil.virtual_memory().available * MEMORY_SHARE / processes)


class Pixels:
    """The images of one split of a source, or of some of its rows, decoded on first use.

    rows: columns image (encoded) and label. row_ids: [N] int64, the number of each row in the source's own
    split; all rows in order if not given. max_pixels: larger images count as unreadable. value_range: see
    `decode_image`.
    images: None until `hold`, then uint8 [N, H, W, 3], or a list of [H, W, 3] if sizes differ. An unreadable
    image is blank, and its position is in `faults`. tensors: made from the images, see `store`.
    """

    def __init__(
        self,
        source_split: str,
        rows: Dataset,
        row_ids: np.ndarray | None = None,
        max_pixels: int = MAX_IMAGE_PIXELS,
        value_range: ValueRange | None = None,
    ) -> None:
        self.source_split = source_split
        self.rows = rows
        self.row_ids = np.arange(len(rows)) if row_ids is None else row_ids
        self.max_pixels = max_pixels
        self.value_range = value_range
        self.images: np.ndarray | list[np.ndarray] | None = None
        self.tensors: dict[Hashable, Any] = {}
        self._faults: dict[int, str] | None = None
        self._too_large = False

    def __len__(self) -> int:
        return len(self.row_ids)

    def select(self, positions: np.ndarray) -> Pixels:
        """Select some of the rows, to be decoded on their own."""
        rows, row_ids = self.rows.select(positions), self.row_ids[positions]
        return Pixels(self.source_split, rows, row_ids, self.max_pixels, self.value_range)

    @functools.cached_property
    def key(self) -> str:
        """Cache key: SHA-256 of all encoded images, the limit on their size, and their values' range."""
        key = f"{content_key(self.rows)}-{self.max_pixels}"
        return key if self.value_range is None else f"{key}-values-{self.value_range}"

    def hold(self, *, decode: bool = True) -> bool:
        """Load all images into memory, from the disk cache, or else decode them and cache them.

        Images of mixed sizes are not cached on disk. decode=False: only use what is decoded already.
        Returns False if the images are not available, or exceed the memory budget.
        """
        if self.images is not None or self._too_large:
            return not self._too_large
        budget = memory_to_spare()
        self._too_large = self._bytes_expected() > budget
        if self._too_large:
            return False
        with one_process_at_a_time(self.key):
            faults = self._known_faults()
            images: np.ndarray | list[np.ndarray] | None
            images = load_array(self._array_key(faults or {}))
            if images is None and not decode:
                return False
            if images is None:
                images, faults = self._decode(budget)
                if images is not None:
                    self._keep_faults(faults)
                if isinstance(images, np.ndarray):
                    save_array(self._array_key(faults), images)
        self._too_large = images is None
        if images is not None:
            self.images, self._faults = images, faults or {}
        return images is not None

    @property
    def faults(self) -> dict[int, str]:
        """Map the position of each unreadable image to the reason. Decodes all images if not known yet."""
        if self._faults is None:
            with one_process_at_a_time(self.key):
                faults = self._known_faults()
                if faults is None:
                    faults = self._faults_of(self.attempts())
                    self._keep_faults(faults)
            self._faults = faults
        return self._faults

    @property
    def is_examined(self) -> bool:
        """True once the unreadable images are known."""
        return self._faults is not None

    def attempts(self) -> Iterator[np.ndarray | UserError]:
        """Yield each image in order, or the error for an unreadable one; decoded on all cores, with a
        progress bar on a terminal."""
        with tqdm(
            total=len(self), desc=f"decoding {self.source_split}", disable=None, leave=False
        ) as progress:
            for start in range(0, len(self), 1024):
                cells = self.rows[start : start + 1024]["image"]
                for image in decode_cells(cells, self.max_pixels, self.value_range):
                    progress.update()
                    yield image

    def _bytes_expected(self) -> int:
        """Estimate the bytes of all images from the first; 0 if that one cannot be read."""
        try:
            first = decode_cell(self.rows[0]["image"], self.max_pixels, self.value_range)
            return first.nbytes * len(self)
        except UserError:
            return 0

    def _decode(self, budget: int) -> tuple[np.ndarray | list[np.ndarray] | None, dict[int, str]]:
        """Decode every image into one array, or into a list once an image has another size; None if they take
        more than `budget` bytes."""
        images: np.ndarray | list[np.ndarray] | None = None
        faults: dict[int, str] = {}
        for position, image in enumerate(self.attempts()):
            if isinstance(image, UserError):
                faults[position] = str(image)
                if isinstance(images, list):
                    images.append(BLANK)
                continue
            budget -= image.nbytes
            if budget < 0:
                return None, {}
            if images is None:
                images = np.zeros((len(self), *image.shape), np.uint8)
            if isinstance(images, np.ndarray) and image.shape != images.shape[1:]:
                images = list(images[:position])
            if isinstance(images, np.ndarray):
                images[position] = image
            else:
                images.append(image)
        return [BLANK] * len(self) if images is None else images, faults

    def _array_key(self, faults: dict[int, str]) -> str:
        """Cache key of the array. It includes which images are blank, so that no run takes them for real."""
        if not faults:
            return self.key
        blank = np.array(sorted(faults), np.int64)
        return f"{self.key}-without-{hashlib.sha256(blank.tobytes()).hexdigest()[:16]}"

    def _faults_key(self) -> str:
        return f"{self.key}-unreadable"

    def _keep_faults(self, faults: dict[int, str]) -> None:
        save_array(self._faults_key(), np.array(list(faults), np.int64))

    def _known_faults(self) -> dict[int, str] | None:
        """Return the faults found by an earlier run; None if no run has checked."""
        positions = load_array(self._faults_key())
        if positions is None:
            return None
        # Retry them, because the cause may have been a disk error.
        again = self._faults_of(self.select(positions).attempts())
        return {int(positions[number]): fault for number, fault in again.items()}

    @staticmethod
    def _faults_of(attempts: Iterator[np.ndarray | UserError]) -> dict[int, str]:
        return {i: str(each) for i, each in enumerate(attempts) if isinstance(each, UserError)}


class ImageView(Sequence):
    """Selected images of a shared array. An integer gives a view [H, W, 3]; a slice or list gives a copy."""

    def __init__(self, pixels: Pixels, positions: np.ndarray) -> None:
        assert isinstance(pixels.images, np.ndarray)  # held, and of one size
        self.pixels = pixels
        self.array = pixels.images
        self.positions = positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: Any) -> Any:
        return self.array[self.positions[index]]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:] if dtype is None else self[:].astype(dtype)

"""The images of a source, decoded once: splits, subsamples, folds, seeds and later runs use the same files.

`Pixels` has the encoded images of one of a source's own splits. `Prepared` has them as the model needs them,
uint8 in one size, in a file of the cache whose name is made from the source's images and that form. Any rows
can be prepared at any time: in a pass before training, or by the loader when they are first used.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import math
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from datasets import Dataset

from hf_cifar.config.data import MAX_IMAGE_PIXELS, ValueRange
from hf_cifar.data.cache import cache_folder, content_key, make_room, one_process_at_a_time
from hf_cifar.data.images import decode_cell
from hf_cifar.data.pixel_file import MISSING, READABLE, STORED, UNREADABLE, PixelFile
from hf_cifar.errors import UserError
from hf_cifar.platform import num_cores
from hf_cifar.progress import Progress

if TYPE_CHECKING:  # mistakes in data are found without importing torch
    from hf_cifar.transforms.preprocessing import Preprocessing

logger = logging.getLogger(__name__)
# Images that all have the same size of at most this many pixels are stored in that size, for every model.
SMALL_PIXELS = 64 * 64
NUM_SURVEYED = 32  # images that are decoded to learn the size of all
TASK = 32  # images per task of a thread
MAX_THREADS = 16


class OtherSize(Exception):
    """An image does not have the size that all others seemed to have."""


class Form(NamedTuple):
    """How images are stored: in their own size, the same for all, or in a view of them.

    size: (height, width). view: the preprocessing whose `view` is stored; None for unchanged images.
    """

    size: tuple[int, int]
    view: Preprocessing | None = None

    @property
    def row_bytes(self) -> int:
        return 3 * self.size[0] * self.size[1]

    def render(self, image: np.ndarray) -> np.ndarray:
        """Convert a decoded image [H, W, 3] uint8. Raises: OtherSize."""
        if self.view is not None:
            return self.view.view_image(image)
        if image.shape[:2] != self.size:
            raise OtherSize
        return image


class Pixels:
    """The encoded images of one of a source's own splits.

    rows: columns image (encoded) and label. row_ids: [N] int64, the number of each row in the source's own
    split; all rows in order if not given. max_pixels: larger images count as unreadable. value_range: of
    images of more than 8 bits, see `decode_image`. tensors: made from all of the images, see `store`.
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
        self.tensors: dict[Hashable, Any] = {}
        self._prepared: dict[tuple[Form, bool], Prepared] = {}
        self._mixed = False

    def __len__(self) -> int:
        return len(self.row_ids)

    @functools.cached_property
    def key(self) -> str:
        """Cache key of all images, see `key_of`."""
        return self.key_of(self.rows)

    def key_of(self, rows: Dataset) -> str:
        """Cache key: SHA-256 of some encoded images, the limit on their size, and their values' range."""
        key = f"{content_key(rows)}-{self.max_pixels}"
        return key if self.value_range is None else f"{key}-values-{self.value_range}"

    def decode(self, position: int) -> np.ndarray:
        """Decode one image, [H, W, 3] uint8. Raises: UserError if it cannot be read."""
        return self.decode_cell(self.rows[position]["image"])

    def decode_cell(self, cell: dict | None) -> np.ndarray:
        """Decode one cell of the image column, [H, W, 3] uint8. Raises: UserError if it cannot be read."""
        return decode_cell(cell, self.max_pixels, self.value_range)

    @functools.cached_property
    def common_size(self) -> tuple[int, int] | None:
        """(height, width) of all images, judged by a few spread over all rows; None if they differ."""
        sizes = set()
        for position in np.linspace(0, len(self) - 1, min(NUM_SURVEYED, len(self))).astype(int):
            with contextlib.suppress(UserError):
                sizes.add(self.decode(int(position)).shape[:2])
        return sizes.pop() if len(sizes) == 1 else None

    def form(
        self, preprocessing: Preprocessing, *, augmented: bool, exact_size: bool = True
    ) -> Form:
        """Choose how to store the images for a model: small images of one size as they are, else a view.

        augmented: for training, with a margin for random crops. exact_size: False for rows that are prepared
        one by one, when an image of another size would come too late.
        """
        view = preprocessing.stored(augmented=augmented)
        size = None if self._mixed or not exact_size else self.common_size
        if size is not None and math.prod(size) <= max(SMALL_PIXELS, math.prod(view.size)):
            return Form(size)
        return Form(view.size, view)

    def prepared(self, form: Form, *, stores: bool = True) -> Prepared:
        """Return the images in a form. stores: keep them in a file; False to decode them at each use."""
        key = form, stores
        if key not in self._prepared:
            self._prepared[key] = Prepared(self, form, stores=stores)
        return self._prepared[key]

    def reject(self, form: Form) -> None:
        """Remember that the images differ in size, so that `form` never takes this form again."""
        self._mixed = True
        self._prepared = {key: each for key, each in self._prepared.items() if key[0] != form}


class Prepared:
    """The images of a source in one form, [N, height, width, 3] uint8, in a file that later runs continue.

    Positions are those of `Pixels`. Without a file (`stores` is False, or the disk is full), an
    image is decoded at each use.
    """

    def __init__(self, pixels: Pixels, form: Form, *, stores: bool = True) -> None:
        self.pixels, self.form = pixels, form
        self._retried = False
        self._stores = stores
        self._temporary: weakref.finalize | None = None
        # Why a row is unreadable, as far as this process has tried.
        self.reasons: dict[int, str] = {}
        digest = hashlib.sha256(f"{pixels.key} {form} {stores}".encode()).hexdigest()
        self._file = self._open(digest)

    def _open(self, name: str) -> PixelFile:
        """Open the file in the cache, or else a temporary one."""
        try:
            folder = cache_folder()
            folder.mkdir(parents=True, exist_ok=True)
            with one_process_at_a_time(name):
                return PixelFile(folder / name, len(self.pixels), self.form.size)
        except OSError as error:
            logger.warning("cannot cache in %s for later runs: %s", cache_folder(), error)
            folder = Path(tempfile.mkdtemp(prefix="hf_cifar-"))
            self._temporary = weakref.finalize(self, _remove, folder, os.getpid())
            return PixelFile(folder / name, len(self.pixels), self.form.size)

    def missing(self, positions: np.ndarray) -> np.ndarray:
        """Return those of the positions [B] that have not been decoded yet."""
        return positions[self._file.states(positions) == MISSING]

    def unreadable(self, positions: np.ndarray) -> dict[int, str]:
        """Map those of the positions that are known to be unreadable to the reason."""
        bad = positions[self._file.states(positions) == UNREADABLE].tolist()
        return {position: self.reasons.get(position, "") for position in bad}

    def seconds(self, positions: np.ndarray) -> float:
        """Estimate the time to prepare those of the positions [B] that are missing, on all cores."""
        missing = self.missing(positions)
        if not len(missing):
            return 0.0
        start, chosen = time.perf_counter(), missing[:: max(1, len(missing) // 8)][:8]
        for position in chosen:
            self._render(int(position), keep=False)
        return (time.perf_counter() - start) / len(chosen) * len(missing) / num_threads()

    def num_bytes(self, positions: np.ndarray) -> int:
        """Bytes on the disk that the missing ones of the positions will take."""
        return len(self.missing(positions)) * self.form.row_bytes if self._stores else 0

    def prepare(self, positions: np.ndarray, what: str) -> None:
        """Decode those of the positions [B] that are missing, on all cores, and show the progress of `what`.

        Rows that an earlier run could not read are tried again, because the cause may have been the disk.
        Raises: OtherSize.
        """
        with one_process_at_a_time(self._file.path.name):
            wanted = positions[np.isin(self._file.states(positions), self._open_states())]
            self._retried = True
            if not len(wanted):
                return
            if self._stores:
                make_room(cache_folder(), len(wanted) * self.form.row_bytes)
            with Progress(what, len(wanted)) as shown:
                for count in self._in_threads(np.sort(wanted)):
                    shown.update(count)

    def _open_states(self) -> tuple[int, ...]:
        return (MISSING,) if self._retried else (MISSING, UNREADABLE)

    def _in_threads(self, positions: np.ndarray) -> Iterator[int]:
        """Decode positions on all cores; yields the number of images after each task."""
        from hf_cifar.threads import map_in_threads  # imports torch

        def work(task: np.ndarray) -> int:
            cells = self.pixels.rows[task]["image"]
            for position, cell in zip(task.tolist(), cells, strict=True):
                self._render(position, cell)
            return len(task)

        tasks = [positions[start : start + TASK] for start in range(0, len(positions), TASK)]
        return map_in_threads(work, tasks, num_threads())

    def _render(
        self, position: int, cell: dict | None = None, *, keep: bool = True
    ) -> np.ndarray | None:
        """Decode one image into the form; return None, and record it, if it is unreadable. keep: store it."""
        try:
            cell = self.pixels.rows[position]["image"] if cell is None else cell
            image = self.form.render(self.pixels.decode_cell(cell))
        except UserError as error:
            self.reasons[position] = str(error)
            self._file.mark(position, UNREADABLE)
            return None
        if keep and not self._stores:
            self._file.mark(position, READABLE)
        elif keep:
            try:
                self._file.write(position, image)
            except OSError as error:
                self._stores = False
                logger.warning("%s; the other images are decoded at each use", error)
                self._file.mark(position, READABLE)
        return image

    def read(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the images [B, height, width, 3] at positions [B], and a mask [B] of the readable ones.

        Images that are not in the file are decoded.
        """
        images, stored = self._file.read(positions)
        for number in np.flatnonzero(~stored):
            position = int(positions[number])
            known_bad = (
                position in self.reasons and self._file.states(positions[[number]])[0] == UNREADABLE
            )
            image = None if known_bad else self._render(position)
            if image is not None:
                images[number], stored[number] = image, True
        return images, stored

    def pixel_hash(self, positions: np.ndarray) -> str | None:
        """SHA-256 of the form and the stored images' checksums, in order; None if some are not stored."""
        if not (self._file.states(positions) == STORED).all():
            return None
        header = f"{self.form.size} {self.form.view} ".encode()
        return hashlib.sha256(header + self._file.checksums(positions).tobytes()).hexdigest()


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # not in a loader's worker
        shutil.rmtree(folder, ignore_errors=True)


def num_threads() -> int:
    """Number of threads that decode: the cores of this process."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MAX_THREADS, num_cores() // processes))

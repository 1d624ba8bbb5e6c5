"""A split: some rows of a data set, their labels, and their images, decoded once."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import psutil
from datasets import Dataset
from tqdm.auto import tqdm

from hf_cifar.config.data import MAX_IMAGE_PIXELS
from hf_cifar.data.cache import content_key, load_array, one_process_at_a_time, save_array
from hf_cifar.data.columns import class_label, label_array
from hf_cifar.data.images import decode_cell, decode_cells
from hf_cifar.data.streams import Stream
from hf_cifar.errors import UserError
from hf_cifar.text import render_numbers

# Share of the free memory that the decoded images of a split may take.
MEMORY_SHARE = 0.25


def memory_to_spare() -> int:
    """Bytes of memory that this process may fill with the decoded images of one split."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(psutil.virtual_memory().available * MEMORY_SHARE / processes)


@dataclass(frozen=True, eq=False)
class Split:
    """Some rows of one split of a data set."""

    name: str
    rows: Dataset  # columns: image (encoded), label
    row_ids: np.ndarray  # [N] int64, position of each row in the data set's own split
    source_split: str  # the data set's split that row_ids count in
    max_pixels: int = MAX_IMAGE_PIXELS  # an image of more cannot be read
    # Row ids of what --on_bad_image skip has left out; where there are any, all that is here can be read.
    skipped: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self.row_ids)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """[N] int64 class ids; of multi-label data [N, K] uint8, 1 for each class of an image."""
        return label_array(self.rows)

    @property
    def id2label(self) -> dict[int, str]:
        return dict(enumerate(class_label(self.rows.features["label"]).names))

    def describe_row(self, position: int) -> str:
        """How error messages name a row: by the data set's own split and row number, and its file."""
        row = f"{self.source_split} row {self.row_ids[position]}"
        path = (self.rows[int(position)]["image"] or {}).get("path")
        return f"{row} ({path})" if path and os.path.exists(path) else row

    def decode(self, position: int) -> np.ndarray:
        """One image, [H, W, 3] uint8. Raises: UserError that names the row."""
        try:
            return decode_cell(self.rows[int(position)]["image"], self.max_pixels)
        except UserError as error:
            raise UserError(f"{self.describe_row(position)}: {error}") from None

    @functools.cached_property
    def images(self) -> np.ndarray | list[np.ndarray] | None:
        """All images, decoded once: uint8 [N, H, W, 3]; a list of [H, W, 3] if they differ in size.

        None if they take more memory than there is to spare: then they are decoded as they are needed.
        What has one size is kept on disk for the next run, see `cache`.
        Raises: UnreadableImages that names the row of each image that cannot be read.
        """
        budget = memory_to_spare()
        try:
            first = self.decode(0)
        except UserError:
            return self._collect(budget)  # to find the others
        if first.nbytes * len(self) > budget:
            return None
        with one_process_at_a_time(self.content_key):
            images = load_array(self.content_key)
            if images is None:
                images = self._collect(budget)
                if isinstance(images, np.ndarray):
                    save_array(self.content_key, images)
        return images

    @functools.cached_property
    def content_key(self) -> str:
        """SHA-256 of the encoded images, see `cache`."""
        return content_key(self.rows)

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

    def _collect(self, budget: int) -> np.ndarray | list[np.ndarray] | None:
        """Decode every image into one array, or into a list from the first that has another size."""
        images: np.ndarray | list[np.ndarray] | None = None
        for position, image in enumerate(self.decode_all()):
            budget -= image.nbytes
            if budget < 0:
                return None
            if images is None:
                images = np.empty((len(self), *image.shape), np.uint8)
            if isinstance(images, np.ndarray) and image.shape != images.shape[1:]:
                images = list(images[:position])
            if isinstance(images, np.ndarray):
                images[position] = image
            else:
                images.append(image)
        return images

    def decode_all(self) -> Iterator[np.ndarray]:
        """Every image in order, decoded on all cores, with a progress bar on a terminal.

        Raises: UnreadableImages, once all the others are decoded too.
        """
        faults: dict[int, str] = {}
        for position, image in enumerate(self._attempts()):
            if isinstance(image, UserError):
                faults[position] = str(image)
            elif not faults:
                yield image
        if faults:
            raise UnreadableImages([(self, faults)])

    def faults(self) -> dict[int, str]:
        """What is wrong with each image that cannot be read, by position. Decodes all and keeps none."""
        attempts = enumerate(self._attempts())
        return {position: str(each) for position, each in attempts if isinstance(each, UserError)}

    def _attempts(self) -> Iterator[np.ndarray | UserError]:
        with tqdm(
            total=len(self), desc=f"decoding {self.name}", disable=None, leave=False
        ) as progress:
            for start in range(0, len(self), 1024):
                cells = self.rows[start : start + 1024]["image"]
                for image in decode_cells(cells, self.max_pixels):
                    progress.update()
                    yield image


class UnreadableImages(UserError):
    """found: some splits, each with what is wrong with images of it that cannot be read, by position."""

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
    """Row ids by the data set's own splits: `train rows 3, 17-19, validation rows 2`."""
    ids: dict[str, list[int]] = {}
    for split, faults in found:
        ids.setdefault(split.source_split, []).extend(split.row_ids[list(faults)].tolist())
    return ", ".join(f"{name} rows {render_numbers(rows)}" for name, rows in ids.items())


@functools.lru_cache(maxsize=4)
def find_faults(split: Split, pixel_store: str = "auto") -> dict[int, str]:
    """What is wrong with each image that cannot be read, by position. Which they are is kept on disk.

    pixel_store: unless it is "streamed", the images stay in memory if they fit, see `Split.images`.
    """
    if len(split.skipped):
        return {}
    key = f"{split.content_key}-unreadable-{split.max_pixels}"
    with one_process_at_a_time(key):
        positions = load_array(key)
        if positions is None:
            try:
                held = pixel_store != "streamed" and split.images is not None
                faults = {} if held else split.faults()
            except UnreadableImages as error:
                ((_, faults),) = error.found
            save_array(key, np.array(list(faults), np.int64))
            return faults
    # Asked again: a disk may have failed them then.
    faults = subset(split, positions).faults()
    return {int(positions[position]): fault for position, fault in faults.items()}


def require_readable(*splits: Split | Stream, pixel_store: str = "auto") -> None:
    """Decode every image, but for those of a stream, which is not read beforehand.

    Raises: UserError that names the row of each image that cannot be read.
    """
    parts = [split for split in splits if isinstance(split, Split)]
    found = [(split, find_faults(split, pixel_store)) for split in parts]
    found = [(split, faults) for split, faults in found if faults]
    if found:
        raise UnreadableImages(found)


def subset(split: Split, positions: np.ndarray) -> Split:
    """Some rows of a split, by position."""
    return replace(split, rows=split.rows.select(positions), row_ids=split.row_ids[positions])

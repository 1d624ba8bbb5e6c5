"""Survey the images of a split: decode each one once, and keep what the findings need."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from hf_cifar.audit.duplicates import SIDE, Fingerprints, fingerprint
from hf_cifar.data.images import has_alpha, read_deep
from hf_cifar.data.pixels import TASK, num_threads
from hf_cifar.data.split import Split, subset
from hf_cifar.errors import UserError
from hf_cifar.progress import Progress

Array = np.ndarray
# The largest difference between the channels of a pixel in a grey image; JPEG alone causes a difference of 2.
GREY = 3
# An image is blank if the standard deviation of its values, 0..255, is lower in every channel. The lowest
# among 20,000 images of CIFAR-10 is 8.4.
BLANK = 2.0
SMALL = 8  # px per side of the colour thumbnails
COLUMNS = ("height", "width", "deep", "alpha", "grey", "blank")


@dataclass(frozen=True, eq=False)
class Survey:
    """The properties of the images of a split, by position.

    faults: why an image is unreadable; its other properties are 0. size: [N, 2] height and width in pixels.
    deep: [N], more than 8 bits. alpha, grey, blank: [N]. prints: for `compare_fingerprints`. colours:
    [N, 8, 8, 3] uint8.
    """

    split: Split
    faults: dict[int, str]
    size: Array
    deep: Array
    alpha: Array
    grey: Array
    blank: Array
    prints: Fingerprints = field(repr=False)
    colours: Array = field(repr=False)

    @property
    def readable(self) -> Array:
        """Positions [M] of the readable images."""
        return np.setdiff1d(np.arange(len(self.split)), list(self.faults))

    @property
    def good(self) -> Split:
        """The split without its unreadable images."""
        return subset(self.split, self.readable) if self.faults else self.split


def survey_split(split: Split) -> Survey:
    """Decode every image of a split once, on all cores."""
    from hf_cifar.threads import map_in_threads  # imports torch

    count = len(split)
    columns = np.zeros((count, len(COLUMNS)), np.int64)
    thumbnails = np.zeros((count, SIDE, SIDE), np.float32)
    colours = np.zeros((count, SMALL, SMALL, 3), np.uint8)
    digests = [
        b"%d" % position for position in range(count)
    ]  # unreadable images are not duplicates
    faults: dict[int, str] = {}

    def work(positions: Array) -> int:
        for position, cell in zip(positions.tolist(), _cells(split, positions), strict=True):
            try:
                image = split.pixels.decode_cell(cell)
            except UserError as error:
                faults[position] = str(error)
                continue
            digests[position], thumbnails[position] = fingerprint(image)
            colours[position] = _thumbnail(image)
            columns[position] = (*image.shape[:2], *_of_file(cell), *_of_pixels(image))
        return len(positions)

    tasks = np.split(np.arange(count), np.arange(TASK, count, TASK))
    with Progress(f"examining {split.name}", count) as shown:
        for done in map_in_threads(work, tasks, num_threads()):
            shown.update(done)
    deep, alpha, grey, blank = columns[:, 2:].T.astype(bool)
    return Survey(
        split, faults, columns[:, :2], deep, alpha, grey, blank,
        Fingerprints(digests, thumbnails), colours,
    )  # fmt: skip


def _cells(split: Split, positions: Array) -> Iterator[dict | None]:
    yield from split.pixels.rows[split.positions[positions]]["image"]


def _thumbnail(image: Array) -> Array:
    small = Image.fromarray(image).resize((SMALL, SMALL), Image.Resampling.BOX, reducing_gap=2.0)
    return np.asarray(small)


def _of_file(cell: dict | None) -> tuple[bool, bool]:
    """Return whether a readable file has more than 8 bits, and an alpha channel."""
    deep = alpha = False
    with contextlib.suppress(UserError):
        deep = read_deep(cell) is not None
        alpha = has_alpha(cell)
    return deep, alpha


def _of_pixels(image: Array) -> tuple[bool, bool]:
    """Return whether an image [H, W, 3] is grey, and blank."""
    some = image[:: max(1, image.shape[0] // 64), :: max(1, image.shape[1] // 64)].astype(np.int16)
    spread = np.abs(np.diff(some, axis=2)).max()
    blank = bool((some.std(axis=(0, 1)) < BLANK).all()) and bool(
        (image.std(axis=(0, 1)) < BLANK).all()
    )
    return bool(spread <= GREY), blank

"""A file of uint8 images of one size, written and read by row number, which later runs continue.

NAME.pixels holds row i at byte i * height * width * 3; rows that were never written take no space on most
file systems. NAME.rows holds the state and the CRC-32 of each row. The files are read and written by
position, not mapped: a full disk is then an error and not a signal that ends the process, and rows that were
read once do not count as memory of the process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import weakref
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from hf_cifar.platform import read_at, write_at

logger = logging.getLogger(__name__)
# READABLE: decoded without an error, but its pixels were not kept.
MISSING, STORED, READABLE, UNREADABLE = range(4)
ROW = np.dtype([("crc", "<u4"), ("state", "u1")])
SUFFIXES = (".rows", ".pixels")
_open_files: weakref.WeakSet[PixelFile] = weakref.WeakSet()


def names_in_use() -> set[str]:
    """The names of the files that this process has open, without suffix."""
    return {file.path.name for file in _open_files}


class PixelFile:
    """Images [N, height, width, 3] uint8 in a file. Multiple processes may use it at the same time.

    path: without suffix; its folder exists. Raises: OSError if the files cannot be created.
    """

    def __init__(self, path: Path, num_rows: int, size: tuple[int, int]) -> None:
        self.path = path
        self.size = size
        self._num_rows = num_rows
        self._open()

    def _open(self) -> None:
        rows = self.path.with_suffix(".rows")
        if not rows.exists() or rows.stat().st_size != self._num_rows * ROW.itemsize:
            staging = self.path.with_suffix(f".{os.getpid()}.tmp")
            np.zeros(self._num_rows, ROW).tofile(staging)
            os.replace(staging, rows)
        self._rows = np.memmap(rows, ROW, "r+", shape=(self._num_rows,))
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
        self._descriptor = os.open(self.path.with_suffix(".pixels"), flags, 0o666)
        self._checked = np.zeros(self._num_rows, bool)  # by this process
        _open_files.add(self)
        for suffix in SUFFIXES:
            with contextlib.suppress(OSError):
                os.utime(self.path.with_suffix(suffix))  # marks it as recently used

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "size": self.size, "_num_rows": self._num_rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.close(self._descriptor)

    @property
    def row_bytes(self) -> int:
        """Bytes of one image."""
        return self.size[0] * self.size[1] * 3

    def states(self, rows: np.ndarray) -> np.ndarray:
        """Return the states [B] of rows [B]: MISSING, STORED, READABLE or UNREADABLE."""
        return np.asarray(self._rows["state"][rows])

    def checksums(self, rows: np.ndarray) -> np.ndarray:
        """Return the CRC-32 [B] of rows [B]; 0 for those that are not stored."""
        return np.asarray(self._rows["crc"][rows])

    def mark(self, row: int, state: int) -> None:
        """Set the state of a row whose pixels are not kept."""
        self._rows[row] = (0, state)

    def write(self, row: int, image: np.ndarray) -> None:
        """Store the image [height, width, 3] of a row. Raises: OSError, for example if the disk is full."""
        data = np.ascontiguousarray(image).data.cast("B")
        write_at(self._descriptor, data, row * self.row_bytes)
        # The state comes last: a process that dies earlier leaves a missing row.
        self._rows["crc"][row] = zlib.crc32(data)
        self._rows["state"][row] = STORED
        self._checked[row] = True

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read rows [B]: the images uint8 [B, height, width, 3], and a mask [B] of those that are stored.

        Each row is checked when this process reads it for the first time; a damaged one counts as missing.
        """
        images = np.empty((len(rows), *self.size, 3), np.uint8)
        stored = self.states(rows) == STORED
        flat = images.reshape(len(rows), self.row_bytes)
        for first, last in _consecutive(rows, stored):
            buffer = flat[first:last].reshape(-1)
            count = read_at(self._descriptor, buffer.data, int(rows[first]) * self.row_bytes)
            buffer[count:] = 0  # the file was cut off
        for number in np.flatnonzero(stored & ~self._checked[rows]):
            row = rows[number]
            if zlib.crc32(flat[number].data) != self._rows["crc"][row]:
                logger.warning("%s: row %d is damaged and will be decoded again", self.path, row)
                self.mark(row, MISSING)
                stored[number] = False
            else:
                self._checked[row] = True
        return images, stored


def _consecutive(rows: np.ndarray, wanted: np.ndarray) -> list[tuple[int, int]]:
    """Return the ranges of positions of wanted rows whose numbers are consecutive, for one read each."""
    positions = np.flatnonzero(wanted)
    if not len(positions):
        return []
    follows = (np.diff(positions) == 1) & (np.diff(rows[positions]) == 1)
    ends = np.flatnonzero(~follows)
    starts = positions[np.concatenate(([0], ends + 1))]
    stops = positions[np.concatenate((ends, [len(positions) - 1]))] + 1
    return list(zip(starts.tolist(), stops.tolist(), strict=True))

"""TIFF files of any depth. Pillow reads 16-bit colour as 8 bits, and many other types not at all."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from hf_cifar.errors import UserError

# Tag numbers (TIFF 6.0, section 8; Adobe's notes for the predictor; DNG 1.7 for the last two).
SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 254, 256, 257, 258, 259, 262
STRIP_OFFSETS, ORIENTATION, SAMPLES, STRIP_ROWS, STRIP_BYTES = 273, 274, 277, 278, 279
PLANAR, PREDICTOR, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES = 284, 317, 322, 323, 324, 325
EXTRA_SAMPLES, SAMPLE_FORMAT, DNG_VERSION = 338, 339, 50706
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, COLOUR_FILTER, LINEAR_RAW = 0, 1, 2, 32803, 34892
DIFFERENCES, FLOAT_DIFFERENCES = 2, 3  # predictors


@dataclass(frozen=True)
class TiffPage:
    """The first page of a TIFF file. order: of the bytes of a number, "<" or ">"."""

    tags: ImageFileDirectory_v2
    order: str

    @classmethod
    def open(cls, file: BinaryIO) -> TiffPage:
        """Read the tags of the first page, not its pixels."""
        header = file.read(8)
        big = 43 in header[2:4]
        tags = ImageFileDirectory_v2(header + (file.read(8) if big else b""))
        file.seek(tags.next)
        tags.load(file)
        return cls(tags, "<" if header[:2] == b"II" else ">")

    def number(self, tag: int, default: int) -> int:
        """The value of a tag, the first of several."""
        value = self.tags.get(tag, default)
        return int(value[0] if isinstance(value, tuple) else value)

    def numbers(self, tag: int) -> list[int]:
        """All values of a tag."""
        value = self.tags.get(tag, ())
        return [int(each) for each in (value if isinstance(value, tuple) else (value,))]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)"""
        return self.number(HEIGHT, 0), self.number(WIDTH, 0)

    @property
    def bits(self) -> int:
        """Bits of a sample."""
        return self.number(BITS, 1)

    @property
    def is_raw(self) -> bool:
        """True for a camera raw file. Its first page is often a preview of a few pixels."""
        raw = (COLOUR_FILTER, LINEAR_RAW)
        preview = self.number(SUBFILE, 0) & 1
        return bool(preview) or DNG_VERSION in self.tags or self.number(PHOTOMETRIC, 0) in raw

    @property
    def is_deep(self) -> bool:
        """True for grey and RGB of more than 8 bits."""
        grey_or_rgb = (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB)
        return max(self.numbers(BITS) or [1]) > 8 and self.number(PHOTOMETRIC, 0) in grey_or_rgb

    @property
    def dtype(self) -> np.dtype:
        """The type of a sample in the file; unsigned for 10, 12 or 14 bits, which are unpacked to 16."""
        if len(set(self.numbers(BITS))) > 1:
            raise UserError("cannot read image: the channels of this TIFF differ in depth")
        if self.bits % 8:
            return np.dtype("u2")
        kind = {2: "i", 3: "f"}.get(self.number(SAMPLE_FORMAT, 1), "u")
        return np.dtype(f"{self.order}{kind}{self.bits // 8}")

    def samples(self, encoded: bytes) -> np.ndarray:
        """Decode the page of a whole file: [H, W, samples], of `dtype` in this machine's byte order."""
        count = self.number(SAMPLES, 1)
        if self.number(PLANAR, 1) == 1:
            return self._decoded(encoded, slice(None), count)
        places = len(self.numbers(self._places)) // count
        planes = [
            self._decoded(encoded, slice(plane * places, (plane + 1) * places), 1)
            for plane in range(count)
        ]
        return np.concatenate(planes, axis=2)

    @property
    def _tiled(self) -> bool:
        return TILE_OFFSETS in self.tags

    @property
    def _places(self) -> int:
        return TILE_OFFSETS if self._tiled else STRIP_OFFSETS

    def _decoded(self, encoded: bytes, places: slice, count: int) -> np.ndarray:
        """Let Pillow decompress the page, as a grey image whose pixels are the bytes of this one."""
        height, width = self.size

        def num_bytes(pixels: int) -> int:
            return -(-pixels * count * self.bits // 8)

        lengths = TILE_BYTES if self._tiled else STRIP_BYTES
        tile_width = self.number(TILE_WIDTH, 0) if self._tiled else width
        whole_width = -(-width // tile_width) * tile_width  # the last tiles reach beyond the image
        page = {
            WIDTH: [num_bytes(whole_width)], HEIGHT: [height], BITS: [8], PHOTOMETRIC: [BLACK_IS_ZERO],
            COMPRESSION: [self.number(COMPRESSION, 1)], SAMPLES: [1],
            self._places: self.numbers(self._places)[places], lengths: self.numbers(lengths)[places],
        }  # fmt: skip
        if self._tiled:
            page |= {TILE_WIDTH: [num_bytes(tile_width)], TILE_HEIGHT: self.numbers(TILE_HEIGHT)}
        else:
            page[STRIP_ROWS] = [self.number(STRIP_ROWS, height)]
        with Image.open(
            io.BytesIO(_with_page(encoded, page, self.order)), formats=["TIFF"]
        ) as grey:
            data = np.asarray(grey)
        if self.bits % 8:
            bits = np.unpackbits(data, axis=1)[:, : width * count * self.bits]
            each = bits.reshape(height, width, count, self.bits)
            unpacked = np.zeros((height, width, count), np.uint16)
            for place in range(self.bits):
                unpacked <<= 1
                unpacked |= each[..., place]
            return unpacked
        tiles = [
            self._undo_predictor(data[:, num_bytes(left) : num_bytes(left + tile_width)], count)
            for left in range(0, whole_width, tile_width)
        ]
        return np.concatenate(tiles, axis=1)[:, :width]

    def _undo_predictor(self, data: np.ndarray, count: int) -> np.ndarray:
        """Decode the rows of one column of tiles: [H, bytes] to [H, W, count].

        Source: Adobe Photoshop TIFF Technical Note 3, for floats.
        """
        predictor, height, size = self.number(PREDICTOR, 1), len(data), self.dtype.itemsize
        if predictor == FLOAT_DIFFERENCES:
            summed = np.cumsum(data.reshape(height, -1, count), axis=1, dtype=np.uint8)
            # The first bytes of all numbers of a row, then the second ones ...
            numbers = summed.reshape(height, size, -1).transpose(0, 2, 1)
            values = np.ascontiguousarray(numbers).view(self.dtype.newbyteorder(">"))
            return values.reshape(height, -1, count).astype(self.dtype.newbyteorder("="))
        values = np.ascontiguousarray(data).view(self.dtype)
        values = values.reshape(height, -1, count).astype(self.dtype.newbyteorder("="))
        if predictor == DIFFERENCES:
            whole = values.view(f"u{size}")
            values = np.cumsum(whole, axis=1, dtype=whole.dtype).view(values.dtype)
        return values


def _with_page(encoded: bytes, page: dict[int, list[int]], order: str) -> bytes:
    """Copy a TIFF file with new tags for its first page. page: the numbers of each tag."""
    start = len(encoded) + len(encoded) % 2
    after = start + 2 + 12 * len(page) + 4
    entries, longer = b"", b""
    for tag in sorted(page):
        values = struct.pack(f"{order}{len(page[tag])}I", *page[tag])
        if len(values) > 4:
            place = struct.pack(f"{order}I", after + len(longer))
            longer += values
            values = place
        entries += struct.pack(f"{order}HHI", tag, 4, len(page[tag])) + values
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", start)
    directory = struct.pack(f"{order}H", len(page)) + entries + bytes(4) + longer
    return header + encoded[8:] + bytes(start - len(encoded)) + directory

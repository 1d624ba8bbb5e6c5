"""Decode any image file to RGB uint8: the decoder shared by training, evaluation and prediction."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from hf_cifar.config.data import MAX_IMAGE_PIXELS, ValueRange
from hf_cifar.data.depth import (
    TIFF_HEADS,
    DeepPixels,
    deep_pixels,
    deep_tiff,
    encoded_file,
    is_unread_tiff,
    range_of,
    sample_values,
    turned,
)
from hf_cifar.data.formats import RAW_KIND, foreign_kind, is_heic, text_kind
from hf_cifar.data.jpeg import decode_jpeg
from hf_cifar.data.tiff import TiffPage
from hf_cifar.errors import UserError
from hf_cifar.text import one_line

# Icons contain other images, which are decoded before their size can be checked; EPS is a program to run.
REFUSED_FORMATS = {"EPS", "ICNS", "ICO"}
EXIF_MARK, ORIENTATION = b"Exif\0\0", 0x0112
ALPHA_MODES = ("La", "LA", "PA", "RGBA", "RGBa")
JPEG_HEAD = b"\xff\xd8\xff"
HEAD_BYTES = 1024

logger = logging.getLogger(__name__)


def to_rgb(image: Image.Image, value_range: ValueRange | None = None) -> np.ndarray:
    """Convert an image to [H, W, 3] uint8, as a viewer shows it.

    First frame of an animation, rotated by its EXIF tag, transparency over white, more than 8 bits scaled by
    `value_range` or else by the type's full range. Raises: UserError for a damaged EXIF block.
    """
    image.seek(0)
    orientation = _exif_orientation(image.info.get("exif") or b"")
    if orientation is not None:
        # Pillow 12 stops reading at a damaged tag before this one.
        image.getexif().setdefault(ORIENTATION, orientation)
    deep = deep_pixels(image)
    if deep is not None:
        return _scaled(deep.upright(image.getexif().get(ORIENTATION, 1)), value_range)
    image = ImageOps.exif_transpose(image)
    if image.mode == "La":  # Pillow can convert it to LA only
        image = image.convert("LA")
    if image.mode in ALPHA_MODES or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        return np.asarray(Image.alpha_composite(canvas, image).convert("RGB"))
    return np.asarray(image.convert("RGB"))


def _scaled(deep: DeepPixels, value_range: ValueRange | None) -> np.ndarray:
    if value_range is None:
        _note_full_range()
    return deep.to_rgb(value_range)


@functools.cache  # once per process
def _note_full_range() -> None:
    logger.warning(
        "images of more than 8 bits are scaled by the full range of their type, such as 0 to 65535, so those "
        "that use less of it look dark; training finds their range, or takes --value_range"
    )


def _exif_orientation(exif: bytes) -> int | None:
    """Return the orientation tag, if any. Raises: UserError if the first directory is truncated before it.

    Depending on the file format, Pillow rejects such an image or does not rotate it. Other damaged tags are
    harmless.
    """
    block = exif.removeprefix(EXIF_MARK).removeprefix(EXIF_MARK)  # some programs write it twice
    if not block:
        return None
    try:
        order = {b"II*\0": "<", b"MM\0*": ">"}[block[:4]]
        (start,) = struct.unpack_from(f"{order}I", block, 4)
        (count,) = struct.unpack_from(f"{order}H", block, start)
        for number in range(count):
            tag, value = struct.unpack_from(f"{order}H6xH2x", block, start + 2 + 12 * number)
            if tag == ORIENTATION:
                return value
    except (KeyError, struct.error):
        raise UserError(
            "cannot read image: its EXIF block is damaged, so its orientation is unknown"
        ) from None
    return None


def decode_image(
    source: bytes | str | os.PathLike | Image.Image,
    max_pixels: int = MAX_IMAGE_PIXELS,
    value_range: ValueRange | None = None,
) -> np.ndarray:
    """Decode encoded bytes, a file, or a Pillow image to [H, W, 3] uint8, RGB.

    value_range: of images of more than 8 bits; those of 8 do not change. None: the full range of their type.
    Raises: UserError if the source is not a complete image, or, before decoding, if it has more than
    `max_pixels` pixels.
    """
    with _reading_errors():
        if is_unread_tiff(source):
            source = encoded_file(source)
        if isinstance(source, Image.Image):
            return to_rgb(source, value_range)
        with _opened(source) as file:
            page = _deep_page(file)
            if page is not None:
                _check_size(*page.size, max_pixels)
                return _scaled(deep_tiff(page, file.read()), value_range)
            check_webp(file.read(HEAD_BYTES), max_pixels)
            file.seek(0)
            with _open_image(file) as image:
                _check_size(image.height, image.width, max_pixels)
                pixels = _jpeg_pixels(image, file)
                return to_rgb(image, value_range) if pixels is None else pixels


def _jpeg_pixels(image: Image.Image, file: BinaryIO) -> np.ndarray | None:
    """Decode a grey or RGB JPEG file with the faster decoder; return None for other or damaged files."""
    if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return None
    orientation = _exif_orientation(image.info.get("exif") or b"")
    if orientation is None:
        orientation = image.getexif().get(ORIENTATION, 1)  # XMP may have one, too
    file.seek(0)
    pixels = decode_jpeg(file.read())
    return None if pixels is None else turned(pixels, orientation)


def read_deep(cell: dict | None, max_pixels: int = MAX_IMAGE_PIXELS) -> DeepPixels | None:
    """Read one cell of an image column; return None, after its header, unless it has more than 8 bits.

    Raises: UserError as `decode_cell`.
    """
    with _reading_errors(), _opened(_source_of(cell)) as file:
        if file.read(len(JPEG_HEAD)) == JPEG_HEAD:
            return None
        file.seek(0)
        page = _deep_page(file)
        if page is not None:
            _check_size(*page.size, max_pixels)
            return deep_tiff(page, file.read())
        with _open_image(file) as image:
            _check_size(image.height, image.width, max_pixels)
            return deep_pixels(image)


def has_alpha(cell: dict | None) -> bool:
    """Return True if the image of a cell may have transparent pixels, by the header of its file.

    Raises: UserError as `decode_cell`.
    """
    with _reading_errors(), _opened(_source_of(cell)) as file:
        if file.read(len(JPEG_HEAD)) == JPEG_HEAD:
            return False
        file.seek(0)
        with _open_image(file) as image:
            return image.mode in ALPHA_MODES or "transparency" in image.info


@contextlib.contextmanager
def _reading_errors() -> Iterator[None]:
    """Turn every error of a decoder into a UserError."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"no image file {error.filename}") from None
    except Exception as error:  # Pillow's decoders fail on damaged bytes in many ways
        raise UserError(f"cannot read image: {one_line(error)}") from None


def _opened(source: bytes | str | os.PathLike) -> BinaryIO:
    return io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")


def _deep_page(file: BinaryIO) -> TiffPage | None:
    """The first page of a TIFF file if it has more than 8 bits; returns to the beginning of the file.

    Raises: UserError for a camera raw file, which Pillow takes for a TIFF file.
    """
    page, head = None, file.read(HEAD_BYTES)
    file.seek(0)
    if head[:4] in TIFF_HEADS and foreign_kind(head) is None:
        page = TiffPage.open(file)
        file.seek(0)
        if page.is_raw:
            raise _foreign(RAW_KIND)
    return page if page is not None and page.is_deep else None


def _open_image(file: BinaryIO) -> Image.Image:
    """Open an image, unread. Raises: UserError that says what the file is instead."""
    head = file.read(HEAD_BYTES)
    file.seek(0)
    if is_heic(head):
        _register_heic()
    kind = foreign_kind(head)
    if kind is not None:
        raise _foreign(kind)
    try:
        return Image.open(file, formats=_formats())
    except UnidentifiedImageError:
        raise UserError(f"cannot read image: {text_kind(head)}") from None


def _foreign(kind: str) -> UserError:
    return UserError(f"cannot read image: it is {kind}; convert it to PNG or JPEG")


def check_webp(head: bytes, max_pixels: int) -> None:
    """Check the size of an animated WebP file by its first bytes: Pillow allocates its canvas to open it.

    Raises: UserError if it is too large.
    Source: RFC 9649, section 2.7.
    """
    if head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and len(head) >= 30:
        width, height = (1 + int.from_bytes(head[at : at + 3], "little") for at in (24, 27))
        _check_size(height, width, max_pixels)


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise UserError(
            f"cannot read image: {width} x {height} pixels exceed the limit of {max_pixels:,}, "
            "see --max_image_pixels"
        )


@functools.cache
def _register_heic() -> None:
    try:
        from pillow_heif import register_heif_opener
    except ModuleNotFoundError:
        raise UserError(
            "cannot read image: it is in HEIC format, which needs another package; run: pip install "
            "pillow-heif"
        ) from None
    register_heif_opener()


def _formats() -> list[str]:
    """List the formats that Pillow can open, except those decoded or run before their size is known."""
    Image.preinit()  # the common ones first
    Image.init()
    return [name for name in Image.ID if name not in REFUSED_FORMATS]


def _source_of(cell: dict | None) -> bytes | str:
    """The bytes or the path in a cell of an undecoded `datasets` image column."""
    if cell is None or (not cell.get("bytes") and not cell.get("path")):
        raise UserError("cannot read image: the cell is empty")
    return cell["bytes"] if cell.get("bytes") else cell["path"]


def read_encoded(cell: dict | None) -> bytes:
    """Read the image file in one cell of an undecoded column, which may be remote; empty for an empty cell.

    Raises: OSError for a file that cannot be read.
    """
    if not cell or not (cell.get("bytes") or cell.get("path")):
        return b""
    if cell.get("bytes"):
        return cell["bytes"]
    if "://" not in cell["path"]:
        return Path(cell["path"]).read_bytes()
    from datasets.utils.file_utils import xopen

    with xopen(cell["path"], "rb") as file:
        return file.read()


def decode_cell(
    cell: dict | None, max_pixels: int = MAX_IMAGE_PIXELS, value_range: ValueRange | None = None
) -> np.ndarray:
    """Decode one cell of an undecoded `datasets` image column: {"bytes": ..., "path": ...}.

    Raises: UserError as `decode_image`, and for an empty cell.
    """
    return decode_image(_source_of(cell), max_pixels, value_range)


def find_value_range(
    cells: Iterable[dict | None], max_pixels: int = MAX_IMAGE_PIXELS
) -> ValueRange | None:
    """Find the range in which nearly all values of these images lie; None if none has more than 8 bits.

    Images of 8 bits are not decoded, and unreadable ones are passed over: they are reported where all images
    are decoded.
    """
    samples, count = [], 0
    for cell in cells:
        count += 1
        with contextlib.suppress(UserError):
            deep = read_deep(cell, max_pixels)
            values = np.zeros(0) if deep is None else sample_values(deep)
            if len(values):
                samples.append(values)
    if not samples:
        return None
    found = range_of(samples)
    logger.info(
        "%s of %s images examined have more than 8 bits: values from %s to %s, which are 99.8%% of all, "
        "become 0 to 255; --value_range LOW,HIGH sets another range",
        f"{len(samples):,}", f"{count:,}", *str(found).split(","),
    )  # fmt: skip
    return found


def pnm_bytes(pixels: np.ndarray) -> bytes:
    """Encode [H, W] grey or [H, W, 3] RGB uint8 as PGM or PPM: a header, then the raw pixels.

    Source: https://netpbm.sourceforge.net/doc/ppm.html
    """
    kind = b"P6" if pixels.ndim == 3 else b"P5"
    return b"%s %d %d 255\n" % (kind, pixels.shape[1], pixels.shape[0]) + pixels.tobytes()

"""Decode any image file to RGB uint8: the decoder shared by training, evaluation and prediction."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from hf_cifar.config.data import MAX_IMAGE_PIXELS
from hf_cifar.errors import UserError
from hf_cifar.text import one_line

# Icons contain other images, which are decoded before their size can be checked; EPS is a program to run.
REFUSED_FORMATS = {"EPS", "ICNS", "ICO"}
EXIF_MARK, ORIENTATION = b"Exif\0\0", 0x0112
SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to mode RGB, as a viewer shows it.

    First frame of an animation, rotated by its EXIF tag, transparency over white, 16-bit and float
    grey rescaled to 8 bit instead of clipped. Raises: UserError for a damaged EXIF block.
    """
    image.seek(0)
    orientation = _exif_orientation(image.info.get("exif") or b"")
    if orientation is not None:
        # Pillow 12 stops reading at a damaged tag before this one.
        image.getexif().setdefault(ORIENTATION, orientation)
    image = ImageOps.exif_transpose(image)
    if image.mode in SIXTEEN_BIT_MODES:
        # Pillow's own conversion clips at 255. A 16-bit PNG may open as "I", with 16-bit values.
        grey = np.asarray(image).astype(np.float64)
        return Image.fromarray((grey / 257).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        grey = np.asarray(image)
        scale = 255.0 if grey.max() <= 1 else 1.0
        return Image.fromarray((grey * scale).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "La":  # Pillow can convert it to LA only
        image = image.convert("LA")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")


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
    source: bytes | str | os.PathLike | Image.Image, max_pixels: int = MAX_IMAGE_PIXELS
) -> np.ndarray:
    """Decode encoded bytes, a file, or a Pillow image to [H, W, 3] uint8, RGB.

    Raises: UserError if the source is not a complete image, or, before decoding, if it has more than
    `max_pixels` pixels.
    """
    try:
        if isinstance(source, Image.Image):
            return np.asarray(to_rgb(source))
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file, formats=_formats()) as image:
            if image.width * image.height > max_pixels:
                raise UserError(
                    f"cannot read image: {image.width} x {image.height} pixels exceed the limit of "
                    f"{max_pixels:,}, see --max_image_pixels"
                )
            return np.asarray(to_rgb(image))
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"no image file {error.filename}") from None
    except UnidentifiedImageError:
        raise UserError("cannot read image: not a known image format") from None
    except Exception as error:  # Pillow's decoders fail on damaged bytes in many ways
        raise UserError(f"cannot read image: {one_line(error)}") from None


def _formats() -> list[str]:
    """List the formats that Pillow can open, except those decoded or run before their size is known."""
    Image.preinit()  # the common ones first
    Image.init()
    return [name for name in Image.ID if name not in REFUSED_FORMATS]


def decode_cell(cell: dict | None, max_pixels: int = MAX_IMAGE_PIXELS) -> np.ndarray:
    """Decode one cell of an undecoded `datasets` image column: {"bytes": ..., "path": ...}.

    Raises: UserError as `decode_image`, and for an empty cell.
    """
    if cell is None or (not cell.get("bytes") and not cell.get("path")):
        raise UserError("cannot read image: the cell is empty")
    return decode_image(cell["bytes"] if cell.get("bytes") else cell["path"], max_pixels)


def decode_cells(
    cells: Sequence[dict], max_pixels: int = MAX_IMAGE_PIXELS
) -> Iterator[np.ndarray | UserError]:
    """Decode many cells, in order, on all cores (Pillow releases the GIL).

    Yields [H, W, 3] uint8, or the error for an unreadable cell.
    """

    def attempt(cell: dict) -> np.ndarray | UserError:
        try:
            return decode_cell(cell, max_pixels)
        except UserError as error:
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(attempt, cells)


def pnm_bytes(pixels: np.ndarray) -> bytes:
    """Encode [H, W] grey or [H, W, 3] RGB uint8 as PGM or PPM: a header, then the raw pixels.

    Source: https://netpbm.sourceforge.net/doc/ppm.html
    """
    kind = b"P6" if pixels.ndim == 3 else b"P5"
    return b"%s %d %d 255\n" % (kind, pixels.shape[1], pixels.shape[0]) + pixels.tobytes()

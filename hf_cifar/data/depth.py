"""Images of more than 8 bits: read in full, and scaled to 8 by a range of values."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
from PIL import Image, ImageFile

from hf_cifar.config.data import ValueRange
from hf_cifar.data.tiff import (
    BLACK_IS_ZERO,
    EXTRA_SAMPLES,
    ORIENTATION,
    PHOTOMETRIC,
    RGB,
    WHITE_IS_ZERO,
    TiffPage,
)
from hf_cifar.errors import UserError

GREY_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0")
# The share of values below and above the range that is found in training images, in percent.
PERCENTILES = (0.1, 99.9)
VALUES_PER_IMAGE = 4096
VALUES_AT_ONCE = 2**20  # as 64-bit numbers, so that a large scan does not take eight times its size
PREMULTIPLIED, STRAIGHT = 1, 2  # kinds of alpha in TIFF
# What the EXIF orientation tag 1..8 asks for: mirror left and right, then turn by quarters to the left.
# Source: CIPA DC-008 (EXIF 2.32), section 4.6.4.
TURNS = {
    1: (False, 0), 2: (True, 0), 3: (False, 2), 4: (True, 2),
    5: (True, 1), 6: (False, 3), 7: (True, 3), 8: (False, 1),
}  # fmt: skip


@dataclass(frozen=True)
class DeepPixels:
    """An image of more than 8 bits. values: [H, W, 1 or 3], any type; alpha: [H, W] in 0..1, or None.

    full: the range that the file's type can hold, or declares; used without a range of the data.
    """

    values: np.ndarray
    full: ValueRange
    alpha: np.ndarray | None = None

    def to_rgb(self, value_range: ValueRange | None) -> np.ndarray:
        """Scale to [H, W, 3] uint8, transparency over white; values outside the range become 0 or 255."""
        chosen = value_range or self.full
        height, width, _ = self.values.shape
        rgb = np.empty((height, width, 3), np.uint8)
        step = max(1, VALUES_AT_ONCE // max(1, width))
        for top in range(0, height, step):
            rows = slice(top, top + step)
            values = self.values[rows].astype(np.float64)
            pixels = (values - chosen.low) * (255 / (chosen.high - chosen.low))
            pixels = np.nan_to_num(pixels, nan=0.0).clip(0, 255)
            if self.alpha is not None:
                pixels = 255 - (255 - pixels) * self.alpha[rows, :, None]
            rgb[rows] = pixels.round()
        return rgb

    def upright(self, orientation: int) -> DeepPixels:
        """Turn or mirror the image as its EXIF orientation says."""
        alpha = None if self.alpha is None else turned(self.alpha, orientation)
        return DeepPixels(turned(self.values, orientation), self.full, alpha)


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn pixels [H, W] or [H, W, C] as their EXIF orientation tag asks for; other tags change nothing."""
    mirrored, quarters = TURNS.get(orientation, (False, 0))
    pixels = pixels[:, ::-1] if mirrored else pixels
    return np.ascontiguousarray(np.rot90(pixels, quarters)) if mirrored or quarters else pixels


def deep_tiff(page: TiffPage, encoded: bytes) -> DeepPixels:
    """Read the first page of a TIFF file, upright. Raises: UserError unless it is grey or RGB."""
    samples, kind = page.samples(encoded), page.number(PHOTOMETRIC, BLACK_IS_ZERO)
    count, extra = samples.shape[2], page.number(EXTRA_SAMPLES, 0)
    colours = 3 if kind == RGB or count == 3 else 1
    if kind == RGB and count == 4 and EXTRA_SAMPLES not in page.tags:
        extra = STRAIGHT
    if count < colours or (count > colours and EXTRA_SAMPLES not in page.tags and not extra):
        raise UserError(f"cannot read image: it has {count} channels; grey and RGB are read")
    values, alpha = samples[..., :colours], None
    top = 2**page.bits - 1
    if kind == WHITE_IS_ZERO:
        values = top - values if values.dtype.kind == "u" else -values.astype(np.float64)
    if extra in (PREMULTIPLIED, STRAIGHT) and values.dtype.kind == "u":
        alpha = samples[..., colours] / top
        if extra == PREMULTIPLIED:
            values = np.divide(
                values, alpha[..., None], where=alpha[..., None] > 0, out=1.0 * values
            )
    return DeepPixels(values, _full_range(values, page.bits), alpha).upright(
        page.number(ORIENTATION, 1)
    )


def _full_range(values: np.ndarray, bits: int) -> ValueRange:
    """The range of a type: that of 16 bits if it has more, and 0..1 or 0..255 for floats."""
    if values.dtype.kind == "f":
        return ValueRange(0, 1 if np.nanmax(values, initial=0) <= 1 else 255)
    if values.dtype.kind == "i" and bits == 16:
        return ValueRange(-(2**15), 2**15 - 1)
    return ValueRange(0, 2 ** min(bits, 16) - 1)


def deep_pixels(image: Image.Image) -> DeepPixels | None:
    """Read an open image as stored, not rotated; None if it has 8 bits or fewer."""
    if image.mode in GREY_MODES and not _declares_maximum(image):
        values = np.asarray(image)
        full = _full_range(values, 32) if image.mode == "F" else ValueRange(0, 2**16 - 1)
        return DeepPixels(values[..., None], full, _clear(image, values))
    if not isinstance(image, ImageFile.ImageFile) or not image.tile or image.fp is None:
        return None
    if image.format == "PNG" and image.mode != "P" and str(image.tile[0].args).endswith(";16B"):
        return _deep_png(image)
    return _deep_pnm(image) if _declares_maximum(image) else None


def _clear(image: Image.Image, values: np.ndarray) -> np.ndarray | None:
    """The alpha [H, W] of an image with one transparent value."""
    clear = image.info.get("transparency")
    return (values != clear).astype(float) if isinstance(clear, int) else None


def _deep_png(image: ImageFile.ImageFile) -> DeepPixels:
    """Read 16 bits with Pillow, which keeps the high byte of each number, or the low byte if it is told that
    the bytes are in the opposite order."""
    encoded, kind = encoded_file(image), str(image.tile[0].args).partition(";")[0]
    if kind == "LA":
        pairs = _unpacked(encoded, "RGBA")
        high, low = pairs[..., ::2], pairs[..., 1::2]
    else:
        high, low = _unpacked(encoded, f"{kind};16B"), _unpacked(encoded, f"{kind};16L")
    samples = high.astype(np.uint16) << 8 | low
    colours = 3 if samples.shape[2] >= 3 else 1
    alpha = samples[..., -1] / 65535 if samples.shape[2] > colours else None
    clear = image.info.get("transparency")
    if alpha is None and isinstance(clear, tuple):
        alpha = (samples != np.array(clear)).any(axis=2).astype(float)
    return DeepPixels(samples[..., :colours], ValueRange(0, 65535), alpha)


def _unpacked(encoded: bytes, layout: str) -> np.ndarray:
    """Decode a PNG file with the bytes of a pixel in this layout: [H, W, channels] uint8."""
    with Image.open(io.BytesIO(encoded), formats=["PNG"]) as image:
        assert isinstance(image, ImageFile.ImageFile)
        image.tile = [image.tile[0]._replace(args=layout)]
        return np.asarray(image)


def _declares_maximum(image: Image.Image) -> bool:
    """True for a PGM or PPM of more than 8 bits, which Pillow rescales to 16 or 8."""
    if image.format != "PPM" or not getattr(image, "tile", None):
        return False
    args = image.tile[0].args  # type: ignore[attr-defined]
    return isinstance(args, tuple) and isinstance(args[-1], int) and args[-1] > 255


def _deep_pnm(image: ImageFile.ImageFile) -> DeepPixels:
    tile = image.tile[0]
    data, maximum = encoded_file(image)[tile.offset :], int(tile.args[-1])  # type: ignore[index]
    channels = len(image.getbands())
    count = image.width * image.height * channels
    if tile.codec_name == "ppm_plain":
        words: Sequence[bytes] = re.sub(rb"#[^\r\n]*", b"", data).split()[:count]
        values = np.array(words, np.int64)
    else:
        values = np.frombuffer(data[: 2 * count], ">u2")
    if len(values) < count:
        raise UserError("cannot read image: image file is truncated")
    values = values.reshape(image.height, image.width, channels)
    return DeepPixels(values, ValueRange(0, maximum))


def encoded_file(image: ImageFile.ImageFile) -> bytes:
    """The whole file of an open image."""
    assert image.fp is not None
    place = image.fp.tell()
    image.fp.seek(0)
    encoded = image.fp.read()
    image.fp.seek(place)
    return encoded


def is_unread_tiff(source: object) -> TypeGuard[ImageFile.ImageFile]:
    """True for an open TIFF file whose pixels Pillow has not read yet."""
    return (
        isinstance(source, ImageFile.ImageFile)
        and source.format == "TIFF"
        and bool(source.tile)
        and source.fp is not None
    )


def sample_values(pixels: DeepPixels) -> np.ndarray:
    """Draw values at fixed places of an image, float64 [up to 4096]."""
    values = pixels.values.reshape(-1)
    if len(values) > VALUES_PER_IMAGE:
        values = values[np.random.default_rng(0).integers(0, len(values), VALUES_PER_IMAGE)]
    values = values.astype(np.float64)
    return values[np.isfinite(values)]


def range_of(samples: Sequence[np.ndarray]) -> ValueRange:
    """The range of most values, without the rarest at both ends; whole numbers where all values are."""
    values = np.concatenate(samples)
    low, high = np.percentile(values, PERCENTILES)
    if (values == values.round()).all():
        low, high = np.floor(low), np.ceil(high)
    low, high = (float(f"{value:.6g}") for value in (low, high))
    return ValueRange(low, high if high > low else low + 1)

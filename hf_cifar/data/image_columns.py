"""Encode any column of images as `{"bytes", "path"}`: bytes, file names, arrays and lists of pixels."""

from __future__ import annotations

import atexit
import functools
import io
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import pyarrow
import pyarrow.compute as pc
from datasets import (
    Array2D,
    Array3D,
    Dataset,
    Features,
    Image,
    LargeList,
    List,
    Value,
)

from hf_cifar.data.images import pnm_bytes
from hf_cifar.errors import UserError
from hf_cifar.text import listed

logger = logging.getLogger(__name__)
LOOKED_AT = 20  # rows, to find out whether strings name files
SMALLEST = 4  # px; lists that make smaller images are boxes or points
BATCH = 200  # rows
# In the true layout of a photograph, neighbours differ less than in another, by more than this factor.
CLEARLY = 1.2


class Kind(Enum):
    """How a column may hold images."""

    IMAGE = "images"
    ENCODED = "encoded images"  # bytes, or a struct of bytes and path
    ARRAY = "arrays of pixels"
    FLAT = "lists of pixels"
    TEXT = "names of files"


NUMBERS = (Kind.ARRAY, Kind.FLAT)


def image_kind(feature: Any) -> Kind | None:
    """How a column of this type could hold images; None if it cannot."""
    if isinstance(feature, Image):
        return Kind.IMAGE
    if isinstance(feature, dict):
        found = {name: getattr(each, "dtype", None) for name, each in feature.items()}
        types = {
            "bytes": ("binary", "large_binary", "null"),
            "path": ("string", "large_string", "null"),
        }
        fits = all(found[name] in types.get(name, ()) for name in found)
        return Kind.ENCODED if fits and found else None
    if isinstance(feature, (Array2D, Array3D)):
        return Kind.ARRAY
    if isinstance(feature, Value):
        if feature.dtype in ("binary", "large_binary"):
            return Kind.ENCODED
        return Kind.TEXT if feature.dtype in ("string", "large_string") else None
    depth = 0
    while isinstance(feature, (List, LargeList)):
        feature, depth = feature.feature, depth + 1
    if not isinstance(feature, Value) or not feature.dtype.startswith(
        ("int", "uint", "float", "bool")
    ):
        return None
    return {1: Kind.FLAT, 2: Kind.ARRAY, 3: Kind.ARRAY}.get(depth)


def names_files(rows: Dataset, column: str, folder: Path | None) -> bool:
    """True if the strings of a column name files, absolute or relative to the folder of the data set."""
    if folder is None:
        return False
    names = rows.select_columns([column])[:LOOKED_AT][column]
    return any(os.path.isfile(_resolved(name, folder)) for name in names if name)


def _resolved(name: str, folder: Path) -> str:
    """The path of a file that a column names; backslashes are read as those of Windows."""
    path = os.path.join(folder, name)
    if "\\" in name and not os.path.exists(path):
        path = os.path.join(folder, name.replace("\\", "/"))
    return path


def encoded_images(splits: Mapping[str, Dataset], folder: Path | None) -> dict[str, Dataset]:
    """Encode the column `image` of every split, as Image(decode=False).

    Numbers of all splits are read like those of the first; a log line says how. folder: of relative paths, if
    any. Raises: UserError for numbers that are not images, or whose layout is ambiguous.
    """
    (name, first), *_ = splits.items()
    if image_kind(first.features["image"]) in NUMBERS:
        reading = find_reading(first, name)
        return {split: _encode_numbers(rows, split, reading) for split, rows in splits.items()}
    return {split: _encode_files(rows, folder) for split, rows in splits.items()}


def _encode_files(rows: Dataset, folder: Path | None) -> Dataset:
    feature = rows.features["image"]
    names_paths = isinstance(feature, dict) or image_kind(feature) == Kind.TEXT
    if not names_paths or folder is None:
        return rows.cast_column("image", Image(decode=False))
    chunked = rows.select_columns(["image"]).with_format("arrow")[:]["image"]
    contents, parts = None, list(feature) if isinstance(feature, dict) else []
    has_all = "bytes" in parts and not any(
        pc.struct_field(chunk, "bytes").null_count for chunk in chunked.chunks
    )
    if has_all or (parts and "path" not in parts):
        return rows.cast_column("image", Image(decode=False))
    column = chunked.combine_chunks()
    if parts:
        contents = pc.struct_field(column, "bytes") if "bytes" in parts else None
        column = pc.struct_field(column, "path")
    if contents is None or pyarrow.types.is_null(contents.type):
        contents = pyarrow.nulls(len(column), pyarrow.binary())
    paths = [name and _resolved(name, folder) for name in column.to_pylist()]
    cells = pyarrow.StructArray.from_arrays(
        [contents, pyarrow.array(paths, pyarrow.string())], ["bytes", "path"]
    )
    return _with_images(rows, cells)


def _with_images(rows: Dataset, cells: pyarrow.Array) -> Dataset:
    added: Any = cells
    # Added first: a table without columns would have no rows.
    rows = rows.add_column("_image", added, feature=Image(decode=False)).remove_columns("image")
    rows = rows.rename_column("_image", "image")
    return rows.select_columns([name for name in ("image", "label") if name in rows.features])


class Reading(NamedTuple):
    """How numbers become pixels.

    layout: see `_arranged`. scale: factor to 0..255, or 1. mode: of the encoded image, L for 8 bits, grey or
    colour; I;16, I or F for grey with more.
    """

    layout: str
    scale: int
    mode: str


def find_reading(rows: Dataset, split: str) -> Reading:
    """Find how the numbers of the column `image` become pixels, by their shapes and range, and log it.

    Raises: UserError for numbers that are not images, or whose layout is ambiguous.
    """
    shapes: set[tuple[int, ...]] = set()
    low, high, whole, exact = math.inf, -math.inf, True, True
    sample: list[np.ndarray] = []
    for row, values in _arrays(rows, split):
        if values is None or not values.size:
            continue
        if not np.isfinite(values).all():
            raise UserError(f"{split} row {row}: a pixel is missing or infinite")
        shapes.add(values.shape)
        low, high = min(low, float(values.min())), max(high, float(values.max()))
        if values.dtype.kind == "f":
            whole = whole and bool((values == np.rint(values)).all())
            eighths = values.astype(np.float64) * 255
            exact = exact and bool((np.abs(eighths - np.rint(eighths)) < 1e-3).all())
        if len(sample) < LOOKED_AT:
            sample.append(values)
    if not shapes:
        raise UserError(f"the image column of {split} has no numbers; pass --image_column_name")
    layout = _layout(shapes, sample)
    shown = _arranged(sample[0], layout)
    colour = shown.ndim == 3
    scale, mode = _scale_and_mode(low, high, whole=whole, exact=exact, colour=colour)
    size = f"{shown.shape[0]} x {shown.shape[1]} px" if len(shapes) == 1 else "mixed sizes"
    logger.info(
        "image column: numbers from %g to %g, read as %s of %s%s%s",
        low, high, "colour" if colour else "grey", size, NOTES.get(layout, ""),
        ", times 255" if scale > 1 else "",
    )  # fmt: skip
    return Reading(layout, scale, mode)


# Said about a layout that the numbers do not show.
NOTES = {
    "planes": ", all red values first, then green, then blue (as in CIFAR)",
    "pixels": ", red, green and blue of each pixel together",
    "channels first": ", channels first",
}


def _layout(shapes: set[tuple[int, ...]], sample: list[np.ndarray]) -> str:
    """Return the layout of arrays of these shapes. Raises: UserError if there is none, or more than one."""
    found = listed((" x ".join(map(str, shape)) for shape in sorted(shapes)), 3)
    advice = (
        "pass another --image_column_name, or convert the column to images (datasets.Image) first"
    )
    if len({len(shape) for shape in shapes}) > 1:
        raise UserError(f"the image column holds numbers of different shapes, {found}; {advice}")
    dimensions = len(next(iter(shapes)))
    if dimensions == 1:
        count, *more = (shape[0] for shape in shapes)
        if not more and _side(count) >= SMALLEST:
            return "square"
        if not more and count % 3 == 0 and _side(count // 3) >= SMALLEST:
            return "planes" if _is_planes(sample) else "pixels"
        raise UserError(
            f"the image column holds lists of {found} numbers, neither a grey square (such as 28 x 28) nor "
            f"a square in three colours; {advice}"
        )
    if dimensions == 2:
        fits = ["rows"] if min(min(shape) for shape in shapes) >= SMALLEST else []
    else:
        axes = {"channels last": (2, (1, 3, 4)), "channels first": (0, (1, 3))}
        fits = [
            layout
            for layout, (axis, channels) in axes.items()
            if all(shape[axis] in channels for shape in shapes)
        ]
    if len(fits) != 1:
        problem = "which could have its channels first or last" if fits else "which is not an image"
        raise UserError(f"the image column holds numbers of shape {found}, {problem}; {advice}")
    return fits[0]


def _side(count: int) -> int:
    """The side of a square of `count` pixels; 0 if they make no square."""
    side = math.isqrt(count)
    return side if side * side == count else 0


def _is_planes(sample: list[np.ndarray]) -> bool:
    """True unless neighbours are clearly more alike if the three numbers of a pixel are together."""

    def roughness(layout: str) -> float:
        images = [_arranged(values, layout).astype(np.float64) for values in sample]
        return sum(
            float(np.abs(np.diff(image, axis=axis)).mean()) for image in images for axis in (0, 1)
        )

    return roughness("planes") < CLEARLY * roughness("pixels")


def _scale_and_mode(
    low: float, high: float, *, whole: bool, exact: bool, colour: bool
) -> tuple[int, str]:
    """Return scale and mode of a `Reading`. exact: all numbers are whole after multiplication by 255.

    Raises: UserError for colours with more than 8 bits, which no image format of Pillow can hold.
    """
    if low >= 0 and high <= 1 and (exact or colour):
        return 255, "L"
    if low >= 0 and 1 < high <= 255 and (whole or colour):
        return 1, "L"
    if colour:
        raise UserError(
            f"the image column holds colours from {low:g} to {high:g}; scale them to 0..1 or 0..255 (if they "
            "were normalized, undo it)"
        )
    if whole and low >= 0 and high < 2**16:
        return 1, "I;16"
    return 1, "I" if whole and max(-low, high) < 2**31 else "F"


def _arranged(values: np.ndarray, layout: str) -> np.ndarray:
    """Arrange the numbers of an image as [H, W], or [H, W, C] with 3 or 4 channels.

    Raises: ValueError for another shape than the layout has.
    """
    if layout == "square":
        values = values.reshape(_side(values.size), -1)
    elif layout == "planes":
        values = values.reshape(3, _side(values.size // 3), -1).transpose(1, 2, 0)
    elif layout == "pixels":
        values = values.reshape(_side(values.size // 3), -1, 3)
    elif layout == "channels first":
        values = values.transpose(1, 2, 0)
    grey = values.ndim == 3 and values.shape[2] == 1
    values = values[..., 0] if grey else values
    if values.ndim != 2 and (values.ndim != 3 or values.shape[2] not in (3, 4)):
        raise ValueError(f"shape {values.shape}")
    return values


def _encode_numbers(rows: Dataset, split: str, reading: Reading) -> Dataset:
    folder = tempfile.mkdtemp(prefix="hf_cifar-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    features = Features({**rows.features, "image": Image(decode=False)})
    encode = functools.partial(_encode_batch, split=split, reading=reading)
    return (
        rows.with_format("arrow")
        .map(
            encode, batched=True, batch_size=BATCH, with_indices=True, features=features,
            cache_file_name=os.path.join(folder, "images.arrow"), load_from_cache_file=False,
        )
        .with_format(None)
    )  # fmt: skip


def _encode_batch(
    table: pyarrow.Table, numbers: list[int], split: str, reading: Reading
) -> pyarrow.Table:
    cells = []
    for row, values in _rows_of(table["image"], split, numbers[0]):
        try:
            content = None if values is None else _encode(values, reading)
        except ValueError as error:
            raise UserError(
                f"{split} row {row}: {error}, unlike the images of the first split; fix or remove it"
            ) from None
        cells.append(content)
    paths = pyarrow.nulls(len(cells), pyarrow.string())
    images = pyarrow.StructArray.from_arrays(
        [pyarrow.array(cells, pyarrow.binary()), paths], ["bytes", "path"]
    )
    rest = {name: table[name] for name in table.column_names if name != "image"}
    return pyarrow.table({"image": images, **rest})


def _encode(values: np.ndarray, reading: Reading) -> bytes:
    """Encode one image, exact but for rounding to 8 bits. Raises: ValueError if it does not fit `reading`."""
    pixels = _arranged(values, reading.layout)
    kind: Any = {"L": np.uint8, "I;16": np.uint16, "I": np.int32, "F": np.float32}[reading.mode]
    if reading.mode != "F":
        wide = np.float64 if pixels.dtype.kind == "f" else np.int64
        pixels = np.rint(pixels.astype(wide) * reading.scale)
        limits = np.iinfo(kind)
        if not (pixels.min() >= limits.min and pixels.max() <= limits.max):
            raise ValueError(f"numbers from {values.min():g} to {values.max():g}")
    pixels = np.ascontiguousarray(pixels.astype(kind))
    if reading.mode == "L" and pixels.shape[2:] != (4,):
        return pnm_bytes(pixels)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG" if reading.mode == "L" else "TIFF")
    return file.getvalue()


def _arrays(rows: Dataset, split: str) -> Iterator[tuple[int, np.ndarray | None]]:
    """Yield the number and the array of each row of the column `image`, None for a missing one.

    Raises: UserError that names a row whose lists have different lengths.
    """
    start = 0
    for table in rows.select_columns(["image"]).with_format("arrow").iter(BATCH):
        yield from _rows_of(table["image"], split, start)
        start += len(table)


def _rows_of(
    column: pyarrow.ChunkedArray, split: str, start: int
) -> Iterator[tuple[int, np.ndarray | None]]:
    for chunk in column.chunks:
        cells = chunk.storage if isinstance(chunk, pyarrow.ExtensionArray) else chunk
        try:
            yield from enumerate(_to_numpy(cells), start)
        except ValueError:  # images of mixed sizes, or a missing one
            for i in range(len(cells)):
                try:
                    yield start + i, _to_numpy(cells[i : i + 1])[0] if cells[i].is_valid else None
                except ValueError:
                    raise UserError(
                        f"{split} row {start + i}: its lists have different lengths, or lack a number, so "
                        "they are not an image; fix or remove it"
                    ) from None
        start += len(cells)


def _to_numpy(cells: pyarrow.Array) -> np.ndarray:
    """Convert nested lists of equal lengths. Raises: ValueError for other lists, or a missing number."""
    if cells.null_count:
        raise ValueError("missing")
    if not pyarrow.types.is_nested(cells.type):
        return cells.to_numpy(zero_copy_only=False)
    lengths = pc.list_value_length(cells).unique()
    if len(lengths) != 1:
        raise ValueError("different lengths")
    inner = _to_numpy(cells.flatten())
    return inner.reshape(len(cells), lengths[0].as_py(), *inner.shape[1:])

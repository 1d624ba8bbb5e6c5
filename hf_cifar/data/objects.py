"""Open data sets in memory: from the library `datasets`, from pandas, or images with labels."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    List,
)

from hf_cifar.data.columns import class_label, in_memory, quiet_datasets
from hf_cifar.data.images import pnm_bytes, to_rgb
from hf_cifar.errors import UserError

logger = logging.getLogger(__name__)
SPLIT_NAMES = {"train", "validation", "valid", "val", "dev", "eval", "test"}
KINDS = (
    "a datasets.Dataset or DatasetDict, a pandas.DataFrame, (images, labels), a dict of columns or of "
    "splits, or a list of (image, label)"
)


def open_object(value: Any, streaming: bool = False) -> DatasetDict | IterableDatasetDict:
    """Open a data set in memory as splits with their original columns; one without splits is train.

    An IterableDataset is read into memory unless `streaming` is requested.
    Raises: UserError for an object that is not a data set, or cannot be streamed.
    """
    if isinstance(value, IterableDataset):
        value = IterableDatasetDict({"train": value})
    if isinstance(value, IterableDatasetDict):
        if streaming:
            return value
        logger.info(
            "reading an IterableDataset into memory; finetune_classifier with streaming=True reads it during "
            "training"
        )
        return DatasetDict({split: _collected(rows) for split, rows in value.items()})
    if streaming:
        raise UserError(
            f"a {type(value).__name__} is in memory already; leave out streaming, or pass an IterableDataset"
        )
    if not (isinstance(value, Mapping) and value and SPLIT_NAMES.issuperset(value)):
        return DatasetDict({"train": _rows(value)})
    splits: dict[str, Dataset] = {}
    for split in sorted(value, key=lambda name: name != "train"):
        names = class_label(next(iter(splits.values())).features.get("label")) if splits else None
        known = names.names if isinstance(names, ClassLabel) else None
        splits[str(split)] = _rows(value[split], known)
    return DatasetDict(splits)


def _collected(rows: IterableDataset) -> Dataset:
    if rows.features is None:
        with quiet_datasets():
            return Dataset.from_list(list(rows.decode(False)))
    return in_memory(rows.decode(False), rows.features)


def _rows(value: Any, known: Sequence[str] | None = None) -> Dataset:
    """Return one split as a `Dataset`. known: the class names of train."""
    if isinstance(value, Dataset):
        if value.format["type"] == "custom":
            logger.warning(
                "the transform of the Dataset is not used: model and options decide how to prepare images"
            )
        return value.with_format(None)
    if isinstance(value, IterableDataset):
        return _collected(value)
    if hasattr(value, "iloc"):
        value = {str(name): value[name].tolist() for name in value}
    if isinstance(value, Mapping):
        return _from_columns(value, known)
    if isinstance(value, tuple) and len(value) == 2 and _is_sized(value[0], value[1]):
        return _labelled(*value, known=known)
    if _is_sized(value) and hasattr(value, "__getitem__") and len(value):
        pairs = [value[i] for i in range(len(value))]
        if all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
            images, labels = zip(*pairs, strict=True)
            return _labelled(images, labels, getattr(value, "classes", None), known)
        if all(isinstance(row, Mapping) for row in pairs):
            columns = {name: [row.get(name) for row in pairs] for name in pairs[0]}
            return _from_columns(columns, known)
    raise UserError(f"a {type(value).__name__} is not a data set of images; pass {KINDS}")


def _is_sized(*values: Any) -> bool:
    return all(hasattr(v, "__len__") and not isinstance(v, (str, bytes)) for v in values)


def _from_columns(columns: Mapping[str, Any], known: Sequence[str] | None = None) -> Dataset:
    """Make a data set of columns; one of pictures or arrays and one other are images and labels."""
    lengths = {str(name): len(values) for name, values in columns.items()}
    if len(set(lengths.values())) != 1:
        raise UserError(f"the columns have different lengths, {lengths}; pass one value per image")
    pictures = [name for name, values in columns.items() if len(values) and _is_picture(values[0])]
    others = [name for name in columns if name not in pictures]
    if len(pictures) == len(others) == 1:
        return _labelled(columns[pictures[0]], columns[others[0]], None, known)
    labels = {name: _labels(columns[name]) for name in others}
    features = Features(dict.fromkeys(pictures, Image(decode=False)))
    features |= Dataset.from_dict(labels).features
    found = {name: _encoded(columns[name]) for name in pictures} | labels
    rows = zip(*found.values(), strict=True)
    return in_memory((dict(zip(found, row, strict=True)) for row in rows), features)


def _labelled(
    images: Any,
    labels: Any,
    names: Sequence[str] | None = None,
    known: Sequence[str] | None = None,
) -> Dataset:
    """Make a data set of images with a label each. names, known: see `_label_feature`.

    Raises: UserError for other than one label per image.
    """
    if len(images) != len(labels):
        raise UserError(
            f"{len(images):,} images have {len(labels):,} labels; pass one for each image"
        )
    label, values = _label_feature(_labels(labels), names, known)
    features = Features({"image": Image(decode=False), "label": label})
    cells = zip(_encoded(images), values, strict=True)
    return in_memory(({"image": image, "label": each} for image, each in cells), features)


def _label_feature(
    values: list[Any], names: Sequence[str] | None, known: Sequence[str] | None
) -> tuple[Any, list[Any]]:
    """Return the feature of a label column, and its values as numbers of classes.

    names: of the classes, if the labels are their numbers. known: of the train split. Labels of mixed types
    and missing ones are left as they are; `standard_columns` names them.
    """
    if names:
        return ClassLabel(names=list(names)), values
    is_list = any(isinstance(value, (list, tuple)) for value in values)
    flat = [item for value in values for item in value] if is_list else values
    kinds = {type(item) for item in flat}
    if len(kinds) != 1 or not kinds <= {bool, int, str} or (int in kinds and min(flat) < 0):
        return Dataset.from_dict({"label": values}).features["label"], values
    found = [str(item) for item in sorted(set(flat))]
    classes = list(known) if known and set(found) <= set(known) else found
    ids = {name: i for i, name in enumerate(classes)}
    if is_list:
        return List(ClassLabel(names=classes)), [[ids[str(v)] for v in row] for row in values]
    return ClassLabel(names=classes), [ids[str(value)] for value in values]


def _is_picture(value: Any) -> bool:
    return isinstance(value, PIL.Image.Image) or getattr(value, "ndim", 0) >= 2


def _labels(values: Any) -> list[Any]:
    """Return labels as plain values; rows of zeros and ones as a class each, or as lists of classes."""
    found = [each.tolist() if hasattr(each, "tolist") else each for each in values]
    if getattr(values, "ndim", 1) != 2:
        return found
    if not np.isin(found, (0, 1)).all():
        raise UserError("labels of two dimensions must be zeros and ones; pass one label per image")
    if (np.sum(found, axis=1) == 1).all():
        logger.info("labels have one 1 in each row: its column is the class")
        return [row.index(1) for row in found]
    return [[str(i) for i, value in enumerate(row) if value] for row in found]


def _encoded(images: Any) -> Iterator[dict[str, Any] | None]:
    """Encode pictures, arrays, files and bytes as cells of an image column."""
    floats = [
        image for image in images
        if "float" in str(getattr(image, "dtype", "")) and 0 not in image.shape
    ]  # fmt: skip
    largest = float(np.max([float(image.max()) for image in floats], initial=0))  # NaN if one is
    return (_cell(image, largest) for image in images)


def image_cell(image: Any) -> dict[str, Any] | None:
    """Encode one picture, array, file or bytes as a cell of an image column."""
    return next(_encoded([image]))


def _cell(image: Any, largest: float) -> dict[str, Any] | None:
    if image is None:
        return None  # counts as unreadable
    if isinstance(image, Mapping):
        return {"bytes": image.get("bytes"), "path": image.get("path")}
    if isinstance(image, (str, os.PathLike)):
        return {"bytes": None, "path": os.fspath(image)}
    if isinstance(image, bytes):
        return {"bytes": image, "path": None}
    if isinstance(image, PIL.Image.Image):
        if image.mode[0] in "IF":  # more than 8 bits
            return _tiff(image)
        return {"bytes": pnm_bytes(to_rgb(image)), "path": None}
    if not hasattr(image, "ndim"):
        raise UserError(f"a {type(image).__name__} is not an image; pass {KINDS}")
    pixels = _pixels(image)
    if not pixels.size or pixels.dtype.kind not in "buifO":
        raise UserError(
            f"an image is {pixels.dtype} of shape {list(pixels.shape)}; pass uint8, or floats in 0..1"
        )
    if pixels.dtype.kind in "if" and pixels.min() < 0:
        raise UserError(
            "the images hold negative numbers, as after normalising; pass them as uint8, or as floats in 0..1"
        )
    if pixels.dtype.kind == "f":
        if not largest <= 255:
            raise UserError(
                f"the images hold floats up to {largest:g}; pass uint8, or floats in 0..1"
            )
        pixels = (pixels * (255 if largest <= 1 else 1)).round()
    elif pixels.dtype == bool:
        pixels = pixels * 255
    elif pixels.dtype != np.uint8 and pixels.max() > 255:
        if pixels.ndim == 2 and pixels.max() < 2**16:
            return _tiff(PIL.Image.fromarray(pixels.astype(np.uint16)))
        raise UserError(
            f"the images hold {pixels.dtype} up to {pixels.max()}; pass uint8, or 16-bit grey [H, W]"
        )
    return {"bytes": pnm_bytes(np.ascontiguousarray(pixels.astype(np.uint8))), "path": None}


def _tiff(image: PIL.Image.Image) -> dict[str, Any]:
    """Encode a picture of more than 8 bits; its range is found where all images are prepared."""
    file = io.BytesIO()
    image.save(file, "TIFF")
    return {"bytes": file.getvalue(), "path": None}


def _pixels(image: Any) -> np.ndarray:
    """Return an array or tensor as [H, W] or [H, W, 3]. Raises: UserError for another shape."""
    is_tensor = hasattr(image, "detach")
    if is_tensor:
        image = image.detach().cpu()
        image = image.float() if "bfloat16" in str(image.dtype) else image  # unknown to NumPy
    pixels = np.asarray(image)
    channels = (1, 3, 4)
    is_first = pixels.ndim == 3 and pixels.shape[0] in channels
    if is_first and (is_tensor or pixels.shape[2] not in channels):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.ndim == 3 and pixels.shape[2] == 4:
        if pixels.dtype != np.uint8:
            raise UserError("images of four channels must be uint8, red, green, blue and alpha")
        return np.asarray(to_rgb(PIL.Image.fromarray(pixels)))
    if pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3):
        return pixels
    raise UserError(
        f"an image has the shape {list(pixels.shape)}; pass [H, W], [H, W, 3] or [3, H, W] each"
    )

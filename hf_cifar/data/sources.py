"""Where data comes from: every source ends as splits with an undecoded `image` and a ClassLabel `label`,
or lists of them where an image has several."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    Value,
)
from huggingface_hub.errors import EntryNotFoundError
from pyarrow import parquet

from hf_cifar.config.data import DataConfig
from hf_cifar.data.cifar_archives import cifar_version, read_cifar
from hf_cifar.data.images import list_images, pnm_bytes
from hf_cifar.data.multilabel import (
    check_class_names,
    class_label,
    entries,
    holds_lists,
    list_class_names,
    with_label_lists,
)
from hf_cifar.errors import UserError
from hf_cifar.extras import require
from hf_cifar.hub.fetch import fetch
from hf_cifar.hub.reach import looks_like_path, require_network
from hf_cifar.text import first_line

BUNDLED = "bundled/"
NUM_DOWNLOADS = 8  # at the same time
Rows = TypeVar("Rows", Dataset, IterableDataset)


@functools.lru_cache(maxsize=1)
def load_source(config: DataConfig) -> DatasetDict:
    """All splits of a data set, with columns `image` (encoded, not decoded) and `label` (ClassLabel, or lists
    of them).

    Raises: UserError for an unknown data set, no network, or columns that cannot be told apart.
    """
    name = config.dataset_name
    splits = open_data_set(config)
    empty = [split for split, rows in splits.items() if not len(rows)]
    if empty or not splits:
        raise UserError(
            f"split {(empty or ['train'])[0]} of {name} holds no images; add some or remove it"
        )
    # Train comes first: it says which columns and classes there are.
    splits = DatasetDict(
        {split: splits[split] for split in sorted(splits, key=lambda s: s != "train")}
    )
    return _standard_columns(splits, config)


def open_data_set(config: DataConfig, streaming: bool = False) -> DatasetDict | IterableDatasetDict:
    """All splits as their source has them; streaming: unread, which needs a folder or the Hub.

    Raises: UserError for an unknown data set, no network, or a source that cannot be streamed.
    """
    name = config.dataset_name
    if name.startswith(BUNDLED):
        _refuse_configuration(config)
        _refuse_streaming(name, streaming)
        return _load_bundled(name.removeprefix(BUNDLED))
    if looks_like_path(name):
        return _load_local(Path(name).expanduser(), config, streaming)
    return _load_hub(name, config, streaming)


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """Silence the progress bars of `datasets` for work that takes no time."""
    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _refuse_configuration(config: DataConfig) -> None:
    if config.dataset_config_name is not None:
        raise UserError(
            f"{config.dataset_name} has one configuration; leave out --dataset_config_name"
        )


def _refuse_streaming(name: str, streaming: bool) -> None:
    if streaming:
        raise UserError(
            f"{name} cannot be streamed: that takes a Hub id or a folder in Hub layout; leave out --streaming"
        )


def _load_bundled(name: str) -> DatasetDict:
    if name != "digits":
        raise UserError(f"no bundled data set {name!r}; there is bundled/digits")
    digits = require("sklearn.datasets", extra="bundled").load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    # A fixed fifth is the test part: every fifth image of each class, in the file's order.
    occurrence = np.zeros(len(digits.target), int)
    for digit in range(10):
        rows = np.flatnonzero(digits.target == digit)
        occurrence[rows] = np.arange(len(rows))
    is_test = occurrence % 5 == 4
    names = {"label": [str(digit) for digit in range(10)]}
    return DatasetDict(
        {
            split: _from_pixels(
                {"pixels": pixels[rows], "label": digits.target[rows].tolist()}, names
            )
            for split, rows in (("train", ~is_test), ("test", is_test))
        }
    )


def _from_pixels(columns: dict[str, Any], names: dict[str, list[str]]) -> Dataset:
    """A data set from raw pixels [N, H, W] or [N, H, W, 3] and label columns."""
    features = Features(
        {"image": Image(decode=False)} | {c: ClassLabel(names=n) for c, n in names.items()}
    )
    encoded = [
        {"bytes": pnm_bytes(np.ascontiguousarray(image)), "path": None}
        for image in columns["pixels"]
    ]
    return Dataset.from_dict({"image": encoded} | {c: columns[c] for c in names}, features=features)


def _load_local(
    path: Path, config: DataConfig, streaming: bool
) -> DatasetDict | IterableDatasetDict:
    if not path.exists():
        raise UserError(f"no data set {config.dataset_name}: there is no such file or folder")
    if cifar_version(path) is not None:
        _refuse_configuration(config)
        _refuse_streaming(config.dataset_name, streaming)
        parts, names = read_cifar(path)
        return DatasetDict(
            {split: _from_pixels(columns, names) for split, columns in parts.items()}
        )
    if path.is_file():
        raise UserError(
            f"{path} is not a CIFAR archive; pass a folder of images, a Hub-layout folder, or an official "
            "cifar-10/100 tar.gz"
        )
    with quiet_datasets():
        try:
            if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
                _refuse_streaming(config.dataset_name, streaming)
                saved = datasets.load_from_disk(str(path))
                return saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)
            splits = datasets.load_dataset(
                str(path), config.dataset_config_name, streaming=streaming
            )
            _check_class_folders(path, splits)
            _check_parquet_names(path, config.dataset_config_name, splits)
            return splits
        except IndexError:  # what load_from_disk makes of a split without rows
            raise UserError(
                f"a split of {config.dataset_name} holds no images; save it without empty splits"
            ) from None
        except UserError:
            raise
        except Exception as error:  # a stranger's file can fail in any way
            raise UserError(
                f"cannot load data set {config.dataset_name}: {first_line(error)}"
            ) from error


def _check_class_folders(path: Path, splits: DatasetDict | IterableDatasetDict) -> None:
    """Where plain images were found: each class must be a folder of its own, with images.

    Raises: UserError that names a lone class, an image outside the class folders, or an empty one.
    """
    columns = set(next(iter(splits.values())).features or ())
    if not columns <= {"image", "label"} or "image" not in columns:
        return
    images = list_images(path)
    folders = sorted({image.parent for image in images})
    if not folders:
        return  # parquet, or an archive
    if "label" not in columns:
        stray = next((image for image in images if image.parent == path), None)
        others = [folder for folder in folders if folder != path]
        if stray is not None and others:
            raise UserError(
                f"{stray} lies outside the class folders; move it into one, or remove it"
            )
        if len({folder.name for folder in others}) == 1:
            raise UserError(
                f"{path} has one class folder, {others[0].name}; a classifier needs two or more"
            )
        raise UserError(f"the images in {path} have no labels; put them into one folder per class")
    for parent in {folder.parent for folder in folders}:
        for folder in sorted(parent.iterdir()):
            if folder.is_dir() and not any(folder.iterdir()):
                raise UserError(f"class folder {folder} holds no images; add some or remove it")


def _check_parquet_names(
    path: Path, config_name: str | None, splits: DatasetDict | IterableDatasetDict
) -> None:
    """`datasets` takes the class names of the first file for those of all; each must have the same.

    Raises: UserError that names a file with others.
    """
    features = next(iter(splits.values())).features or {}
    names = {
        column: class_label(feature).names
        for column, feature in features.items()
        if isinstance(class_label(feature), ClassLabel)
    }
    different = {}
    for file in sorted(path.rglob("*.parquet")) if names else ():
        for column, feature in Features.from_arrow_schema(parquet.read_schema(file)).items():
            own = class_label(feature)
            if isinstance(own, ClassLabel) and own.names != names.get(column, own.names):
                different[str(file)] = own.names, names[column]
    if not different:
        return
    builder = datasets.load_dataset_builder(str(path), config_name)
    for file in (str(file) for files in builder.config.data_files.values() for file in files):
        if file in different:
            raise UserError(
                "{} names its classes {}, but the first file {}".format(file, *different[file])
            )


def _load_hub(name: str, config: DataConfig, streaming: bool) -> DatasetDict | IterableDatasetDict:
    require_network(f"data set {name}")
    try:
        if streaming:
            return datasets.load_dataset(name, config.dataset_config_name, streaming=True)
        with contextlib.suppress(EntryNotFoundError):
            fetch(name, "README.md", kind="dataset")  # it says what the data set holds
        builder = datasets.load_dataset_builder(
            name, config.dataset_config_name, cache_dir=_lockable_cache()
        )
        if not Path(builder.cache_dir).is_dir():
            _fetch_data_files(builder)
        builder.download_and_prepare()
        return builder.as_dataset()
    except UserError:
        raise
    except Exception as error:  # a client of the network can fail in any way
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            raise UserError(
                f"data set {name} is not in the local cache and HF_HUB_OFFLINE=1 forbids the network; unset "
                "it, or pass --dataset_name with a local folder or bundled/digits"
            ) from None
        raise UserError(f"cannot load data set {name}: {first_line(error)}") from error


def _lockable_cache() -> str | None:
    """None for the cache of `datasets`; where that cannot be written to, a folder of links to what it holds.

    `datasets` takes its locks there even to read.
    """
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    if not cache.is_dir() or os.access(cache, os.W_OK):
        return None
    links = tempfile.mkdtemp(prefix="hf_cifar-")
    atexit.register(shutil.rmtree, links, ignore_errors=True)
    for folder in cache.iterdir():
        if folder.is_dir():
            Path(links, folder.name).symlink_to(folder)
    return links


def _fetch_data_files(builder: datasets.DatasetBuilder) -> None:
    """Have the files of a Hub data set in the cache, where `datasets` looks for them.

    Raises: UserError for one that arrives damaged.
    """
    urls = [url for urls in (builder.config.data_files or {}).values() for url in urls]
    # What lies elsewhere than on the Hub has no hash.
    found = [re.fullmatch(r"hf://datasets/(.+)@([0-9a-f]{40})/(.+)", url) for url in urls]
    with ThreadPoolExecutor(NUM_DOWNLOADS) as pool:
        parts = (url.groups() for url in found if url)
        list(pool.map(lambda p: fetch(p[0], p[2], kind="dataset", revision=p[1]), parts))


def _standard_columns(splits: DatasetDict, config: DataConfig) -> DatasetDict:
    """Find the image and label columns by type, rename them, and make the labels class labels."""
    features = next(iter(splits.values())).features
    image, label = image_and_label(features, config)
    class_names, with_class_labels = _class_names, _with_class_labels
    if holds_lists(features[label]):
        class_names, with_class_labels = list_class_names, with_label_lists
    standard = {}
    names = None
    for split, rows in splits.items():
        rows = with_standard_names(rows, split, image, label)
        with quiet_datasets():
            rows = rows.cast_column("image", Image(decode=False))
        if split not in ("train", "validation") and _is_hidden(rows):
            continue  # such a split can be neither trained on nor evaluated
        if names is None:
            names = class_names(rows, split)
        standard[split] = with_class_labels(rows, names, split)
    return DatasetDict(standard)


def _is_hidden(rows: Dataset) -> bool:
    """Whether no row of a split says its label."""
    values = entries(rows) if holds_lists(rows.features["label"]) else rows.unique("label")
    return set(values) <= {-1, None}


def image_and_label(features: Features, config: DataConfig) -> tuple[str, str]:
    """Names of the image and the label column. Raises: UserError if they cannot be told."""
    image = _find_column(features, Image, config.image_column_name, "image")
    label = _find_column(features, ClassLabel, config.label_column_name, "label")
    if image == label:
        raise UserError(
            f"column {image!r} cannot be both image and label; pass another --label_column_name"
        )
    return image, label


def with_standard_names(rows: Rows, split: str, image: str, label: str) -> Rows:
    """Those two columns alone, as `image` and `label`. Raises: UserError if the split lacks one."""
    if image not in rows.features or label not in rows.features:
        raise UserError(f"split {split} has columns {list(rows.features)}, not {image} and {label}")
    rows = rows.select_columns([image, label])
    if (image, label) != ("image", "label"):
        # Through temporary names, so that columns may trade places.
        rows = rows.rename_columns({image: "_image", label: "_label"})
        rows = rows.rename_columns({"_image": "image", "_label": "label"})
    return rows


def _find_column(features: Features, kind: type, asked: str | None, role: str) -> str:
    flag = f"--{role}_column_name"
    if asked is not None:
        if asked not in features:
            raise UserError(
                f"no column {asked!r} in {list(features)}; pass {flag} with one of them"
            )
        if role == "image" and not isinstance(features[asked], Image):
            raise UserError(
                f"column {asked!r} holds {features[asked]}, not images; pass another {flag}"
            )
        return asked
    found = [name for name, feature in features.items() if isinstance(feature, kind)]
    if not found and role == "label":  # lists of them, where no column holds one alone
        found = [
            name for name, feature in features.items() if isinstance(class_label(feature), kind)
        ]
    if len(found) > 1:
        raise UserError(f"several {role} columns: {found}; choose one with {flag}")
    if not found:
        word, advice = (
            ("an image column", "")
            if role == "image"
            else ("a class label column", ", or put images into one folder per class")
        )
        raise UserError(
            f"none of the columns {list(features)} is {word}; name it with {flag}{advice}"
        )
    return found[0]


def _class_names(rows: Dataset, split: str) -> list[str]:
    """Names of the classes: declared by the data set, else the values that occur in train, sorted."""
    feature = rows.features["label"]
    if isinstance(feature, ClassLabel):
        return feature.names
    if not isinstance(feature, Value):
        raise UserError(
            f"the label column holds {feature}; it must hold class labels, strings or integers"
        )
    values = rows.unique("label")
    for value in values:
        if value is None or value != value or str(value).strip() == "":
            raise UserError(f"{_row_of(rows, value, split)}: the label is missing")
    if not all(isinstance(value, (str, int)) for value in values):
        raise UserError(
            f"the label column holds {feature.dtype}; it must hold class labels, strings or integers"
        )
    names = sorted(values)
    if not isinstance(names[0], str) and names[0] < 0:
        raise UserError(
            f"{_row_of(rows, names[0], split)}: label {names[0]} is negative, as where a label is missing; "
            "remove such rows, or name the class"
        )
    names = [str(name) for name in names]
    check_class_names(names)
    return names


def _row_of(rows: Dataset, value: Any, split: str) -> str:
    labels = rows["label"][:]
    return f"{split} row {next(i for i, v in enumerate(labels) if v == value or (value != value and v != v))}"


def _with_class_labels(rows: Dataset, names: list[str], split: str) -> Dataset:
    feature = rows.features["label"]
    if isinstance(feature, ClassLabel):
        if feature.names != names:
            raise UserError(
                f"split {split} names its classes {feature.names}, but the first split {names}"
            )
        ids = rows["label"][:]
    else:
        index = {name: i for i, name in enumerate(names)}
        values = rows["label"][:]
        ids = [index.get(str(value)) for value in values]
        if None in ids:
            row = ids.index(None)
            raise UserError(
                f"{split} row {row}: label {values[row]!r} is not one of the {len(names)} classes"
            )
    for row, value in enumerate(ids):
        if not isinstance(value, int) or not 0 <= value < len(names):
            raise UserError(
                f"{split} row {row}: label {value!r} is not one of the {len(names)} classes"
            )
    if isinstance(feature, ClassLabel):
        return rows
    with quiet_datasets():
        rows = rows.remove_columns("label").add_column("label", ids)
        return rows.cast_column("label", ClassLabel(names=names))

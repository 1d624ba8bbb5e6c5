"""Open a data set of any kind as splits with two columns: `image` (encoded) and `label` (ClassLabel, or lists
of them for multi-label data)."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
from datasets import DatasetDict, IterableDatasetDict
from huggingface_hub.errors import EntryNotFoundError

from hf_cifar.config.data import DataConfig
from hf_cifar.config.objects import InMemory, require_object
from hf_cifar.data.columns import standard_columns
from hf_cifar.data.folders import (
    Source,
    from_pixels,
    load_local,
    refuse_configuration,
    refuse_folder_options,
    refuse_streaming,
)
from hf_cifar.data.objects import open_object
from hf_cifar.errors import UserError
from hf_cifar.extras import require
from hf_cifar.hub.fetch import fetch
from hf_cifar.hub.origin import public_name
from hf_cifar.hub.reach import looks_like_path, require_network
from hf_cifar.text import first_line, nearest

logger = logging.getLogger(__name__)
BUNDLED = "bundled/"
NUM_DOWNLOADS = 8  # in parallel


def load_source(config: DataConfig) -> DatasetDict:
    """Load all splits, see `read_source`."""
    return read_source(config).splits


def read_source(config: DataConfig, known: Sequence[str] = ()) -> Source:
    """Load all splits, with columns `image` (encoded, not decoded) and `label` (ClassLabel, or lists), and
    log what the source is. known: see `open_data_set`.

    Raises: UserError for an unknown data set, no network, or columns that cannot be identified.
    """
    name = config.dataset_name
    source = open_data_set(config, known=known)
    splits = source.splits
    empty = [split for split, rows in splits.items() if not len(rows)]
    if empty or not splits:
        raise UserError(
            f"split {(empty or ['train'])[0]} of {name} has no images; add some or remove it"
        )
    # Train comes first, because it defines the columns and classes.
    splits = DatasetDict(
        {split: splits[split] for split in sorted(splits, key=lambda s: s != "train")}
    )
    return announced(replace(source, splits=standard_columns(splits, config, known)), config)


def announced(source: Source, config: DataConfig) -> Source:
    """Log what a source is, and its notes."""
    if source.description is not None:
        name = public_name(str(config.dataset_name))
        source = replace(source, description=f"{name}: {source.description}")
        logger.info("%s", source.description)
    for note in source.notes:
        logger.warning("%s", note)
    return source


def open_data_set(
    config: DataConfig,
    streaming: bool = False,
    known: Sequence[str] = (),
    *,
    labelled: bool = True,
) -> Source:
    """Open all splits with their original columns.

    streaming: without reading them, for a folder or the Hub. known: the classes of a model, of which a folder
    of images may have only one. labelled: False if the labels are not needed: those of a folder of images are
    not looked for.

    Raises: UserError for an unknown data set, no network, or a source that cannot be streamed.
    """
    name = config.dataset_name
    if isinstance(name, InMemory):
        refuse_folder_options(config)
        refuse_configuration(config)
        return Source(open_object(name.value, streaming))
    require_object(name, "data set")
    if name.startswith(BUNDLED):
        refuse_folder_options(config)
        refuse_configuration(config)
        refuse_streaming(name, streaming)
        return Source(_load_bundled(name.removeprefix(BUNDLED)))
    if not name:
        raise UserError("--dataset_name is empty; pass a folder of images, or a Hub id")
    if looks_like_path(name):
        path = Path(name).expanduser()
        return load_local(path, config, streaming, known, labelled=labelled)
    refuse_folder_options(config)
    try:
        return Source(_load_hub(name, config, streaming))
    except UserError as error:
        raise type(error)(f"{error}{_local_hint(name)}") from None


def _local_hint(name: str) -> str:
    """Suggest a folder here whose name is similar to a name that is not a Hub id."""
    folder = Path(name).parent
    if not folder.is_dir():
        return ""
    found = nearest(Path(name).name, (each.name for each in folder.iterdir() if each.is_dir()))
    return f" (nearest folder here: {folder / found})" if found else ""


def _load_bundled(name: str) -> DatasetDict:
    if name != "digits":
        raise UserError(f"unknown bundled data set {name!r}; the only one is bundled/digits")
    digits = require("sklearn.datasets", extra="bundled").load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    # Test is every fifth image of each class, in file order.
    occurrence = np.zeros(len(digits.target), int)
    for digit in range(10):
        rows = np.flatnonzero(digits.target == digit)
        occurrence[rows] = np.arange(len(rows))
    is_test = occurrence % 5 == 4
    names = {"label": [str(digit) for digit in range(10)]}
    return DatasetDict(
        {
            split: from_pixels(
                {"pixels": pixels[rows], "label": digits.target[rows].tolist()}, names
            )
            for split, rows in (("train", ~is_test), ("test", is_test))
        }
    )


def _load_hub(name: str, config: DataConfig, streaming: bool) -> DatasetDict | IterableDatasetDict:
    require_network(f"data set {name}")
    try:
        if streaming:
            return datasets.load_dataset(name, config.dataset_config_name, streaming=True)
        with contextlib.suppress(EntryNotFoundError):
            fetch(name, "README.md", kind="dataset")  # declares the configurations and splits
        builder = datasets.load_dataset_builder(
            name, config.dataset_config_name, cache_dir=_lockable_cache()
        )
        if not Path(builder.cache_dir).is_dir():
            _fetch_data_files(builder)
        builder.download_and_prepare()
        return builder.as_dataset()
    except UserError:
        raise
    except Exception as error:  # a network client can fail in any way
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            raise UserError(
                f"data set {name} is not in the local cache and HF_HUB_OFFLINE=1 forbids the network; unset "
                "it, or pass a local folder or bundled/digits"
            ) from None
        raise UserError(f"cannot load data set {name}: {first_line(error)}") from error


def _lockable_cache() -> str | None:
    """Return None to use the cache of `datasets`; if it is read-only, a writable folder of links into it.

    `datasets` creates lock files there even for reading.
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
    """Download the files of a Hub data set into the cache, where `datasets` finds them.

    Raises: UserError for a damaged download.
    """
    urls = [url for urls in (builder.config.data_files or {}).values() for url in urls]
    # Files outside the Hub have no hash.
    found = [re.fullmatch(r"hf://datasets/(.+)@([0-9a-f]{40})/(.+)", url) for url in urls]
    with ThreadPoolExecutor(NUM_DOWNLOADS) as pool:
        parts = (url.groups() for url in found if url)
        list(pool.map(lambda p: fetch(p[0], p[2], kind="dataset", revision=p[1]), parts))

"""Open data sets on this machine: CIFAR archives, saved data sets, folders of images or Parquet files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, IterableDatasetDict
from pyarrow import parquet

from hf_cifar.config.data import DataConfig
from hf_cifar.data.cifar_archives import cifar_version, read_cifar
from hf_cifar.data.columns import quiet_datasets
from hf_cifar.data.images import list_images, pnm_bytes
from hf_cifar.data.labels import class_label
from hf_cifar.errors import UserError
from hf_cifar.text import first_line


def refuse_configuration(config: DataConfig) -> None:
    """Raises: UserError if --dataset_config_name is given for data with a single configuration."""
    if config.dataset_config_name is not None:
        raise UserError(
            f"{config.dataset_name} has one configuration; leave out --dataset_config_name"
        )


def refuse_streaming(name: str, streaming: bool) -> None:
    """Raises: UserError if streaming is requested for data that cannot be streamed."""
    if streaming:
        raise UserError(
            f"{name} cannot be streamed, only a Hub data set or a folder in Hub layout; leave out --streaming"
        )


def from_pixels(columns: dict[str, Any], names: dict[str, list[str]]) -> Dataset:
    """Make a data set of raw pixels [N, H, W] or [N, H, W, 3] and label columns."""
    features = Features(
        {"image": Image(decode=False)} | {c: ClassLabel(names=n) for c, n in names.items()}
    )
    encoded = [
        {"bytes": pnm_bytes(np.ascontiguousarray(image)), "path": None}
        for image in columns["pixels"]
    ]
    return Dataset.from_dict({"image": encoded} | {c: columns[c] for c in names}, features=features)


def load_local(
    path: Path, config: DataConfig, streaming: bool
) -> DatasetDict | IterableDatasetDict:
    """Open all splits of a file or folder. Raises: UserError if it is not a data set."""
    if not path.exists():
        raise UserError(f"no data set {config.dataset_name}: there is no such file or folder")
    if cifar_version(path) is not None:
        refuse_configuration(config)
        refuse_streaming(config.dataset_name, streaming)
        parts, names = read_cifar(path)
        return DatasetDict({split: from_pixels(columns, names) for split, columns in parts.items()})
    if path.is_file():
        raise UserError(
            f"{path} is not a CIFAR archive; pass a folder of images, a Hub-layout folder, or an official "
            "cifar-10/100 tar.gz"
        )
    with quiet_datasets():
        try:
            if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
                refuse_streaming(config.dataset_name, streaming)
                saved = datasets.load_from_disk(str(path))
                return saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)
            splits = datasets.load_dataset(
                str(path), config.dataset_config_name, streaming=streaming
            )
            _check_class_folders(path, splits)
            _check_parquet_names(path, config.dataset_config_name, splits)
            return splits
        except IndexError:  # raised by load_from_disk for a split without rows
            raise UserError(
                f"a split of {config.dataset_name} has no images; save it without empty splits"
            ) from None
        except UserError:
            raise
        except Exception as error:  # a file of unknown origin can fail in any way
            raise UserError(
                f"cannot load data set {config.dataset_name}: {first_line(error)}"
            ) from error


def _check_class_folders(path: Path, splits: DatasetDict | IterableDatasetDict) -> None:
    """Check a folder of images: it must have one non-empty folder for each class.

    Raises: UserError that names the only class, an image outside the class folders, or an empty folder.
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
            raise UserError(f"{stray} is not in a class folder; move it into one, or remove it")
        if len({folder.name for folder in others}) == 1:
            raise UserError(
                f"{path} has one class folder, {others[0].name}; a classifier needs two or more"
            )
        raise UserError(f"the images in {path} have no labels; put them into one folder per class")
    for parent in {folder.parent for folder in folders}:
        for folder in sorted(parent.iterdir()):
            if folder.is_dir() and not any(folder.iterdir()):
                raise UserError(f"class folder {folder} has no images; add some or remove it")


def _check_parquet_names(
    path: Path, config_name: str | None, splits: DatasetDict | IterableDatasetDict
) -> None:
    """Check that all Parquet files have the same class names, since `datasets` uses those of the first.

    Raises: UserError that names a file with other class names.
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
    for name in (str(file) for files in builder.config.data_files.values() for file in files):
        if name in different:
            raise UserError(
                "{} has the classes {}, but the first file has {}".format(name, *different[name])
            )

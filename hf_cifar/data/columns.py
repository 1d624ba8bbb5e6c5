"""Find the image and label columns by type, or by an obvious name if multiple fit, and standardize them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import datasets
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset

from hf_cifar.config.data import DataConfig
from hf_cifar.config.objects import InMemory
from hf_cifar.data.image_columns import NUMBERS, Kind, encoded_images, image_kind, names_files
from hf_cifar.data.labels import LABEL_NAMES, class_label, is_hidden, may_be_labels, with_classes
from hf_cifar.errors import UserError
from hf_cifar.text import listed

logger = logging.getLogger(__name__)
PIECE_BYTES = 256 * 1024**2  # of a table in memory
Rows = TypeVar("Rows", Dataset, IterableDataset)
# Names that decide between columns of one type, in any case.
IMAGE_NAMES = {"image", "images", "img", "picture", "photo", "pixels"}


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """Hide the progress bars of `datasets` for work that takes an instant."""
    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def in_memory(rows: Iterable[dict[str, Any]], features: Features) -> Dataset:
    """Make a data set of rows with encoded images, in pieces: Arrow holds at most 2 GB of bytes in one."""
    pieces, piece, size = [], [], 0
    with quiet_datasets():
        for row in rows:
            piece.append(row)
            size += sum(map(_num_bytes, row.values()))
            if size >= PIECE_BYTES:
                pieces.append(Dataset.from_list(piece, features))
                piece, size = [], 0
        if piece or not pieces:
            columns = {name: [row.get(name) for row in piece] for name in features}
            pieces.append(Dataset.from_dict(columns, features))
        return datasets.concatenate_datasets(pieces)


def _num_bytes(cell: Any) -> int:
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    return len(content) if isinstance(content, bytes) else 0


def standard_columns(
    splits: DatasetDict, config: DataConfig, known: Sequence[str] = ()
) -> DatasetDict:
    """Find the image and label columns, rename them, encode the images, and make the labels class labels.

    Test splits without labels are left out. Raises: UserError for columns that cannot be identified or read.
    """
    first = next(iter(splits.values()))
    image, label = image_and_label(first.features, config, first)
    labelled = {}
    for split, rows in splits.items():
        # Without labels, it can be neither trained on nor evaluated.
        may_be_hidden = split not in ("train", "validation") and rows is not first
        if may_be_hidden and image in rows.features and label not in rows.features:
            logger.info("split %s has no column %r, and is left out", split, label)
            continue
        rows = with_standard_names(rows, split, image, label, _group_column(rows, split, config))
        if may_be_hidden and is_hidden(rows):
            logger.info("split %s has no labels, and is left out", split)
            continue
        labelled[split] = rows
    with quiet_datasets():
        return DatasetDict(encoded_images(with_classes(labelled, known), data_folder(config)))


def image_columns(splits: DatasetDict, config: DataConfig) -> dict[str, Dataset]:
    """Find the image column of every split, rename it and encode the images; nothing else is kept.

    Raises: UserError for a column that cannot be identified or read, or that a split lacks.
    """
    first = next(iter(splits.values()))
    image, found = _image_column(first.features, config, first), {}
    for split, rows in splits.items():
        if image not in rows.features:
            raise UserError(f"split {split} has columns {list(rows.features)}, not {image}")
        rows = rows.select_columns([image])
        found[split] = rows if image == "image" else rows.rename_column(image, "image")
    with quiet_datasets():
        return encoded_images(found, data_folder(config))


def standard_split(rows: Dataset, split: str, config: DataConfig) -> Dataset:
    """Find the two columns of one split, rename them and encode the images, with the labels as they are."""
    found = with_standard_names(rows, split, *image_and_label(rows.features, config, rows))
    with quiet_datasets():
        return encoded_images({split: found}, data_folder(config))[split]


def data_folder(config: DataConfig) -> Path | None:
    """The folder to which paths in a column are relative: for an object, the current one; None for a Hub data
    set."""
    if isinstance(config.dataset_name, InMemory):
        return Path.cwd()
    path = Path(config.dataset_name).expanduser()
    if not path.exists():
        return None
    return path if path.is_dir() else path.parent


def image_and_label(
    features: Features, config: DataConfig, rows: Dataset | None = None
) -> tuple[str, str]:
    """Names of the image and the label column.

    rows: to tell strings that name files from others; not given for a stream. Raises: UserError if they
    cannot be identified.
    """
    image = _image_column(features, config, rows)
    return image, _label_column(features, config, image)


def with_standard_names(
    rows: Rows, split: str, image: str, label: str, group: str | None = None
) -> Rows:
    """Select the columns, as `image`, `label` and, with a group column, `group`.

    Raises: UserError if the split lacks one.
    """
    if image not in rows.features or label not in rows.features:
        raise UserError(f"split {split} has columns {list(rows.features)}, not {image} and {label}")
    names = {image: "image", label: "label"} | ({group: "group"} if group else {})
    rows = rows.select_columns(list(names))
    if any(name != standard for name, standard in names.items()):
        # Through temporary names, in case columns swap names.
        rows = rows.rename_columns({name: f"_{standard}" for name, standard in names.items()})
        rows = rows.rename_columns({f"_{standard}": standard for standard in names.values()})
    return rows


def _group_column(rows: Dataset, split: str, config: DataConfig) -> str | None:
    """Return the group column of train, the only split that is divided. Raises: UserError without one."""
    requested = config.group_column_name
    if requested is None or split in ("validation", "test"):
        return None
    _require_column(requested, rows.features, "group")
    kind = getattr(rows.features[requested], "dtype", "")
    if kind not in ("string", "large_string", "bool") and "int" not in kind:
        raise UserError(
            f"column {requested!r} holds {rows.features[requested]}, not the names or numbers of groups; "
            "pass another --group_column_name"
        )
    return requested


def _image_column(features: Features, config: DataConfig, rows: Dataset | None) -> str:
    requested, folder = config.image_column_name, data_folder(config)
    kinds = {name: image_kind(feature) for name, feature in features.items()}

    def holds_images(name: str) -> bool:
        if kinds[name] == Kind.TEXT:
            return rows is not None and names_files(rows, name, folder)
        # A stream is not scanned for the shape and range of its numbers.
        return kinds[name] is not None and (rows is not None or kinds[name] not in NUMBERS)

    if requested is not None:
        _require_column(requested, features, "image")
        if not holds_images(requested):
            has_files = kinds[requested] == Kind.TEXT and folder is not None
            files = f" or file names in {folder}" if has_files else ""
            raise UserError(
                f"column {requested!r} holds {features[requested]}, not images{files}; pass another "
                "--image_column_name"
            )
        return requested
    for tier in ((Kind.IMAGE,), (Kind.ENCODED, Kind.ARRAY), (Kind.TEXT, Kind.FLAT)):
        found = [name for name in features if kinds[name] in tier and holds_images(name)]
        if not found:
            continue
        chosen = _decide(found, _called(found, IMAGE_NAMES), "image")
        if kinds[chosen] == Kind.TEXT:
            logger.info("image column: %r, file names in %s", chosen, folder)
        return chosen
    raise UserError(
        f"none of the columns {listed(features, 8)} is an image column; pass --image_column_name"
    )


def _label_column(features: Features, config: DataConfig, image: str) -> str:
    requested = config.label_column_name
    if requested is not None:
        _require_column(requested, features, "label")
        if requested == image:
            raise UserError(
                f"column {image!r} cannot be both image and label; pass another --label_column_name"
            )
        return requested
    others = {name: feature for name, feature in features.items() if name != image}
    single = [name for name, feature in others.items() if isinstance(feature, ClassLabel)]
    declared = single or [n for n, f in others.items() if isinstance(class_label(f), ClassLabel)]
    called = [name for name in _called(others, LABEL_NAMES) if may_be_labels(others[name])]
    both = [name for name in declared if name in called]
    # A column that is called label is a candidate, even if it declares no classes.
    found = declared if both else [*declared, *called]
    if not found:
        raise UserError(
            f"none of the columns {listed(features, 8)} is a class label column; pass "
            "--label_column_name, or put images into one folder per class"
        )
    if not declared and len(found) == 1:
        _log_choice(found[0], others, "label")
    return _decide(found, both, "label")


def _require_column(requested: str, features: Features, role: str) -> None:
    if requested not in features:
        raise UserError(
            f"no column {requested!r} in {list(features)}; pass --{role}_column_name with one of them"
        )


def _called(columns: Iterable[str], names: set[str]) -> list[str]:
    return [column for column in columns if column.casefold() in names]


def _decide(found: list[str], obvious: list[str], role: str) -> str:
    """Return the only column found, or the only one with an obvious name, which is logged.

    Raises: UserError that lists the columns otherwise.
    """
    if len(found) == 1:
        return found[0]
    if len(obvious) != 1:
        raise UserError(f"multiple {role} columns: {found}; choose one with --{role}_column_name")
    _log_choice(obvious[0], found, role)
    return obvious[0]


def _log_choice(chosen: str, columns: Iterable[str], role: str) -> None:
    others = [name for name in columns if name != chosen]
    logger.info(
        "%s column: %r, by its name%s",
        role, chosen, f"; --{role}_column_name chooses another of {listed(others)}" if others else "",
    )  # fmt: skip

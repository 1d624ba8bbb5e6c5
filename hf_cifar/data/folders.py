"""Open data sets on this machine: folders and archives of images, CIFAR archives, saved data sets, shards."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    DatasetInfo,
    Features,
    Image,
    IterableDatasetDict,
    List,
    Value,
)
from datasets.table import InMemoryTable
from huggingface_hub import metadata_load
from pyarrow import parquet

from hf_cifar.config.data import DataConfig
from hf_cifar.data.archives import (
    archive_name,
    is_archive,
    is_web_dataset,
    refuse_other_archives,
    unpack,
)
from hf_cifar.data.cifar_archives import cifar_version, read_cifar
from hf_cifar.data.columns import quiet_datasets
from hf_cifar.data.images import pnm_bytes
from hf_cifar.data.labels import class_label
from hf_cifar.data.layout import ORDER, Layout, NoClassFolders, read_layout, split_roles
from hf_cifar.data.listing import (
    TABLE_SUFFIXES,
    File,
    Listing,
    list_files,
    render_left_out,
    suffix_of,
)
from hf_cifar.data.pixel_tables import is_pixel_table, read_pixel_tables
from hf_cifar.data.tables import (
    NoTable,
    agree,
    candidates,
    holds_images,
    join_tables,
    metadata_files,
    read_metadata_layout,
    read_table_layout,
    top_folders,
)
from hf_cifar.errors import UserError
from hf_cifar.hub.reach import url_advice
from hf_cifar.text import first_line, listed, nearest_hint, one_line

# Tables that are opened to find the one with the labels.
MAX_TABLES, MAX_TABLE_BYTES = 50, 500 * 1024**2
IN_PYTHON = (
    "load it in Python, and pass its images and labels to finetune_classifier (docs/data.md)"
)
# What to do with files that are not read, by their suffix.
ADVICE = {
    **dict.fromkeys((".npy", ".npz", ".mat", ".h5", ".hdf5", ".pkl", ".pickle", ".pt", ".pth"), IN_PYTHON),
    **dict.fromkeys((".tfrecord", ".tfrecords", ".rec", ".mdb", ".lmdb", ".db", ".sqlite"), IN_PYTHON),
    **dict.fromkeys((".idx3-ubyte", ".idx1-ubyte", ".gz"), "if it is packed, unpack it, then " + IN_PYTHON),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "save it as CSV, with the images' names and their labels"),
    ".arrow": "pass the folder that save_to_disk wrote",
    **dict.fromkeys((".rar", ".7z", ".zst"), "unpack it, and pass the folder"),
    **dict.fromkeys((".pdf", ".svg", ".dcm", ".mp4", ".avi", ".mov"), "convert it to PNG or JPEG images"),
}  # fmt: skip
LABEL_LISTS = {".json", ".ndjson", ".txt", ".lst"}
NO_LABELS = ("readme", "license", "licence", "requirements", "notes")


@dataclass(frozen=True, eq=False)
class Source:
    """An open data set.

    description: one line about what it is, None if there is nothing to say. left_out: files that are not
    used, counted by reason; rows_left_out: rows of a table. notes: decisions that the user may not expect,
    one line each. roots: how the names of files below a folder begin.
    """

    splits: DatasetDict | IterableDatasetDict
    description: str | None = None
    left_out: dict[str, int] = field(default_factory=dict)
    rows_left_out: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    roots: dict[str, str] = field(default_factory=dict)


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


def refuse_folder_options(config: DataConfig) -> None:
    """Raises: UserError if an option for folders of images is given for other data."""
    given = [
        name
        for name, value, default in (
            ("--labels_file", config.labels_file, None),
            ("--folders", config.folders, "auto"),
        )
        if value != default
    ]
    if given:
        raise UserError(
            f"{given[0]} is for a folder of images, and {config.dataset_name} is not one; leave it out"
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


def from_layout(layout: Layout) -> DatasetDict:
    """Make a data set from the files of a layout, without reading them."""
    image = layout.image_column
    label: Any = ClassLabel(names=layout.class_names)
    ids = {name: i for i, name in enumerate(layout.class_names)}
    every = (each for rows in layout.splits.values() for _, each in rows)
    is_multi_label = any(isinstance(each, tuple) for each in every)
    features = Features(
        {image: Image(decode=False), layout.label_column: List(label) if is_multi_label else label}
        | ({layout.group_column: Value("string")} if layout.group_column else {})
    )
    splits = {}
    for split, rows in layout.splits.items():
        labels = [
            [ids[name] for name in each] if isinstance(each, tuple) else ids[each]
            for _, each in rows
        ]
        cells = _image_cells(file for file, _ in rows)
        columns = {image: cells, layout.label_column: pyarrow.array(labels)}
        if layout.group_column:
            columns[layout.group_column] = pyarrow.array(
                [layout.group_of[file] for file, _ in rows]
            )
        splits[split] = _in_memory(columns, features)
    return DatasetDict(splits)


def _image_cells(files: Iterable[File]) -> pyarrow.StructArray:
    """Make the cells of an image column from files, which are not read."""
    contents, paths = [], []
    for file in files:
        is_text = _is_text(file.path)
        # A path that is not valid Unicode cannot be stored in a column.
        contents.append(None if is_text else Path(file.path).read_bytes())
        paths.append(file.path if is_text else None)
    return pyarrow.StructArray.from_arrays(
        [pyarrow.array(contents, pyarrow.binary()), pyarrow.array(paths, pyarrow.string())],
        ["bytes", "path"],
    )


def _in_memory(columns: dict[str, pyarrow.Array], features: Features) -> Dataset:
    table = pyarrow.table(columns).cast(features.arrow_schema)
    return Dataset(InMemoryTable(table), info=DatasetInfo(features=features))


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def load_local(
    path: Path,
    config: DataConfig,
    streaming: bool,
    known: Sequence[str] = (),
    *,
    labelled: bool = True,
) -> Source:
    """Open all splits of a file or folder. known: classes of which there may be only one. labelled: False
    for the images of a folder without looking for their classes.

    Raises: UserError if it is not a data set.
    """
    if not path.exists():
        raise UserError(
            f"no data set {config.dataset_name}: there is no such file or folder"
            f"{_hint(config.dataset_name, path)}"
        )
    if cifar_version(path) is not None:
        refuse_folder_options(config)
        refuse_configuration(config)
        refuse_streaming(config.dataset_name, streaming)
        parts, names = read_cifar(path)
        return Source(
            DatasetDict({split: from_pixels(columns, names) for split, columns in parts.items()})
        )
    if path.is_file():
        return _load_file(path, config, streaming, known, labelled)
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        refuse_folder_options(config)
        refuse_streaming(config.dataset_name, streaming)
        return Source(_load_saved(path, config))
    listing = list_files(path)
    if config.labels_file is None and (_declares_files(path) or _has_shards(listing)):
        return _shards_source(path, listing, config, streaming)
    listing = _with_archives(listing)
    if listing.images and not labelled:
        return _unlabelled_source(listing)
    layout = None
    if listing.images or config.labels_file or candidates(listing) or metadata_files(listing):
        layout = _read_images(listing, config, known)
    if layout is None:
        readable = (*TABLE_SUFFIXES, ".arrow", ".json", ".tar", ".zip")
        if not any(file.name.lower().endswith(readable) for file in listing.others):
            left_out = listing.all_left_out()
            files = f" among {render_left_out(left_out)}" if left_out else ""
            advice = next(
                (ADVICE[s] for f in listing.others if (s := suffix_of(f.name)) in ADVICE), ""
            )
            raise UserError(
                f"{config.dataset_name} holds no images{files}; "
                + (advice or "put them into one folder per class, and pass the folder above")
            )
        pixels = [file for file in listing.others if _holds_pixels(file.path)]
        if pixels:
            return _pixel_source(pixels, listing, config, streaming)
        return Source(_load_shards(path, config, streaming))
    return _source(layout, config, streaming)


def _source(layout: Layout, config: DataConfig, streaming: bool) -> Source:
    refuse_configuration(config)
    if streaming:
        raise UserError(
            f"{config.dataset_name} is a folder of image files, sorted by class, which a stream cannot "
            "shuffle; leave out --streaming (the files are read in place, not copied)"
        )
    left_out, rows_left_out = (
        {reason: count for reason, count in counts.items() if count}
        for counts in (layout.left_out, layout.rows_left_out)
    )
    return Source(
        from_layout(layout), layout.describe(), left_out, rows_left_out, tuple(layout.notes)
    )


def _unlabelled_source(listing: Listing) -> Source:
    """Open all images of a folder; its top folders are splits if all of them are named as splits."""
    tops = top_folders([file.name for file in listing.images])
    names = set(tops)
    roles = split_roles(names)
    if len(roles) < len(names):
        roles = dict.fromkeys(names, "train")
    files: dict[str, list[File]] = {}
    for file, top in zip(listing.images, tops, strict=True):
        files.setdefault(roles[top], []).append(file)
    features = Features({"image": Image(decode=False)})
    splits = {
        split: _in_memory({"image": _image_cells(files[split])}, features)
        for split in ORDER
        if split in files
    }
    left_out = {reason: n for reason, n in listing.all_left_out().items() if n}
    description = f"{len(listing.images):,} images"
    if left_out:
        description += f"; left out: {render_left_out(Counter(left_out))}"
    roots = {path: f"{name}/" for name, path in listing.mounts.items()} | {listing.root: ""}
    return Source(DatasetDict(splits), description, left_out, roots=roots)


def _load_file(
    path: Path, config: DataConfig, streaming: bool, known: Sequence[str], labelled: bool
) -> Source:
    """Open an archive, a table of paths, or a Parquet file."""
    refuse_other_archives(path)
    if is_archive(path) and not is_web_dataset(path):
        folder = unpack(path)
        try:
            return load_local(folder, config, streaming, known, labelled=labelled)
        except UserError as error:
            raise type(error)(str(error).replace(str(folder), str(path))) from None
    if is_archive(path) or holds_images(str(path)):
        kind = "webdataset" if is_archive(path) else "parquet"
        return Source(_load_shards(path, config, streaming, builder=kind))
    if _holds_pixels(str(path)):
        return _pixel_source([File(path.name, str(path))], None, config, streaming)
    if suffix_of(path.name) in (*TABLE_SUFFIXES, ".json"):
        layout = read_table_layout(
            list_files(path.parent), str(path), config, requested=True, known=known
        )
        return _source(layout, config, streaming)
    if suffix_of(path.name) in ADVICE:
        raise UserError(f"{path} is not a supported data set; {ADVICE[suffix_of(path.name)]}")
    raise UserError(
        f"{path} is not a data set; pass a folder of images, a zip or tar of one, a table of paths and "
        "labels, a Hub-layout folder, or an official cifar-10/100 tar.gz"
    )


def _hint(name: str, path: Path) -> str:
    """Suggest what to pass instead of a name that is not a file or folder."""
    if advice := url_advice(name):
        return advice
    text = str(path)
    if "*" in text or "?" in text:
        return "; pass a folder, not a pattern of files"
    if path.parent.is_dir():
        return nearest_hint(path.name, (each.name for each in path.parent.iterdir()))
    return ""


def _holds_pixels(path: str) -> bool:
    return suffix_of(path) in (".csv", ".parquet") and is_pixel_table(path)


def _pixel_source(
    tables: list[File], listing: Listing | None, config: DataConfig, streaming: bool
) -> Source:
    """Open tables with the pixels of an image in each row. listing: of the folder that holds them."""
    refuse_folder_options(config)
    refuse_configuration(config)
    refuse_streaming(config.dataset_name, streaming)
    splits = read_pixel_tables(tables, config)
    count = sum(map(len, splits.values()))
    left_out = Counter[str]()
    if listing is not None:
        left_out = listing.all_left_out({file.path for file in tables})
    description = f"the pixels of {count:,} images in {listed(file.name for file in tables)}"
    if left_out:
        description += f"; left out: {render_left_out(left_out)}"
    return Source(splits, description, dict(left_out))


def _with_archives(listing: Listing) -> Listing:
    """If there are only archives in a folder, list what is in them, each as a folder of its name."""
    archives = [f for f in listing.others if "/" not in f.name and is_archive(f.name)]
    if listing.images or not archives:
        return listing
    of_name = {archive_name(file.name): file for file in archives}
    for file in archives:
        if (other := of_name[archive_name(file.name)]) != file:
            raise UserError(
                f"{file.name} and {other.name} in {one_line(listing.root)} have the same name; rename or "
                "remove one"
            )
    mounts = {name: str(unpack(file.path)) for name, file in of_name.items()}
    unpacked = list_files(listing.root, mounts)
    unpacked.others = [file for file in unpacked.others if file not in archives]
    return unpacked


def _has_shards(listing: Listing) -> bool:
    """True for Parquet files of images, or tar files of WebDataset."""
    if any(f.name.endswith(".parquet") and holds_images(f.path) for f in listing.others):
        return True
    tars = [f for f in listing.others if is_archive(f.name) and not f.name.lower().endswith(".zip")]
    return bool(tars) and not listing.images and is_web_dataset(tars[0].path)


def _declares_files(path: Path) -> bool:
    """True if a README says which files are which split, as on the Hub."""
    try:
        card = metadata_load(path / "README.md") or {}
    except Exception:  # a README of any kind
        return False
    configs = card.get("configs")
    return isinstance(configs, list) and any(
        isinstance(c, dict) and "data_files" in c for c in configs
    )


def _read_images(listing: Listing, config: DataConfig, known: Sequence[str]) -> Layout | None:
    """Find where the classes of images come from: folders, metadata files or a table.

    Returns None if there are no images and no table of images. Raises: UserError if that is ambiguous.
    """
    if config.labels_file is not None:
        return read_table_layout(
            listing, _labels_path(listing, config), config, requested=True, known=known
        )
    layout: Layout | None = None
    problem = UserError("no images")
    try:
        layout = read_layout(listing, config.folders, known)
    except UserError as error:
        problem = error
    if metadata_files(listing):
        try:
            found = read_metadata_layout(listing, config, by_name=layout is not None)
        except NoTable:
            if layout is None:
                raise
            found = None
        if found is not None:
            return found
    if layout is not None and config.folders != "auto":
        return layout
    fitting, unclear, rejected = _fitting_tables(listing, config, layout, known)
    if layout is not None:
        return _agreed(layout, fitting, unclear, config)
    if len(fitting) == 1:
        (found,) = fitting.values()
        if "train" in found.splits or not unclear:
            return found
        name = next((name for name in unclear if "train" in name.lower()), next(iter(unclear)))
        raise UserError(
            f"{listed(fitting)} labels only images of {listed(found.splits)}, and {name} cannot be used: "
            f"{unclear[name]}; or choose the table with --labels_file"
        )
    if joined := join_tables(listing, fitting):
        return joined
    if fitting:
        raise UserError(
            f"multiple tables have labels for these images: {listed(fitting)}; choose one with --labels_file"
        )
    if unclear and (not listing.images or isinstance(problem, NoClassFolders)):
        raise next(iter(unclear.values()))
    if not listing.images:
        return None
    if isinstance(problem, NoClassFolders):
        raise NoClassFolders(f"{problem}{_unused_labels(listing, rejected)}")
    raise problem


def _unused_labels(listing: Listing, rejected: dict[str, UserError]) -> str:
    """Name a file that may have the labels of images without class folders, and say why it is not used."""
    rejected = {n: e for n, e in rejected.items() if not n.startswith("predictions/")}
    if rejected:
        name, error = next(iter(rejected.items()))
        return f". {name} is not used: {error}"
    stems = {os.path.splitext(os.path.basename(file.name))[0] for file in listing.images}
    for file in listing.others:
        name, suffix = os.path.basename(file.name), suffix_of(file.name)
        if suffix in (".xlsx", ".xls", ".ods"):
            return f". {file.name} is not read: {ADVICE[suffix]}"
        is_sidecar = name.lower().startswith(NO_LABELS) or os.path.splitext(name)[0] in stems
        if suffix in LABEL_LISTS and not is_sidecar and file.name.count("/") < 2:
            return f". If {name} has the labels, pass --labels_file {file.name}"
        if suffix == ".mat":
            return f". Labels in files such as {file.name} are not read: write them into a CSV"
        if suffix == ".xml":
            return f". Labels in XML files such as {file.name} are not read: write them into a CSV"
    return ""


def _labels_path(listing: Listing, config: DataConfig) -> str:
    """The path of --labels_file, which may also be relative to the folder of the images."""
    assert config.labels_file is not None
    path = os.path.expanduser(config.labels_file)
    for each in (path, os.path.join(listing.root, path)):
        if os.path.isfile(each):
            return each
    raise UserError(f"--labels_file {config.labels_file}: there is no such file")


def _fitting_tables(
    listing: Listing, config: DataConfig, layout: Layout | None, known: Sequence[str]
) -> tuple[dict[str, Layout], dict[str, UserError], dict[str, UserError]]:
    """Return the tables that label the images, the errors of those that name images ambiguously, and the
    errors of the others, by name. layout: the class folders, if any; then only tables beside them count."""
    fitting: dict[str, Layout] = {}
    unclear: dict[str, UserError] = {}
    rejected: dict[str, UserError] = {}
    folder_of = None if layout is None else _class_of(layout)
    for file in candidates(listing, None if layout is None else 0)[:MAX_TABLES]:
        if os.path.getsize(file.path) > MAX_TABLE_BYTES:
            continue
        try:
            fitting[file.name] = read_table_layout(
                listing, file.path, config, folder_of=folder_of, known=known
            )
        except NoTable as error:
            rejected[file.name] = error
        except UserError as error:
            unclear[file.name] = error
    return fitting, unclear, rejected


def _class_of(layout: Layout) -> dict[File, Any]:
    return {file: label for rows in layout.splits.values() for file, label in rows}


def _agreed(
    layout: Layout, fitting: dict[str, Layout], unclear: dict[str, UserError], config: DataConfig
) -> Layout:
    """Choose between class folders and tables. Raises: UserError if they contradict each other."""
    columns = (config.image_column_name, config.label_column_name, config.group_column_name)
    if set(columns) - {None, "image", "label"} and len(fitting) == 1:
        return next(iter(fitting.values()))
    folder_of = _class_of(layout)
    for name, table in fitting.items():
        if not agree((folder_of.get(file), label) for file, label in _class_of(table).items()):
            raise UserError(
                f"the folders ({listed(layout.class_names, 3)}) and {name} ({listed(table.class_names, 3)}) "
                f"give different classes; pass --labels_file {name}, or --folders "
                f"{'splits' if layout.split_names else 'classes'}"
            )
    for name, error in unclear.items():
        raise UserError(
            f"the images are in folders ({listed(layout.class_names, 3)}), and {name} names them too, but "
            f"{error}, or use the folders with --folders {'splits' if layout.split_names else 'classes'}"
        )
    return layout


def _load_saved(path: Path, config: DataConfig) -> DatasetDict:
    with quiet_datasets():
        try:
            saved = datasets.load_from_disk(str(path))
        except IndexError:  # a split without rows
            raise UserError(
                f"a split of {config.dataset_name} has no images; save it without empty splits"
            ) from None
        except Exception as error:  # a file of unknown origin can fail in any way
            raise _unreadable(config, error) from error
    return saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)


def _load_shards(
    path: Path,
    config: DataConfig,
    streaming: bool,
    builder: str | None = None,
) -> DatasetDict | IterableDatasetDict:
    """Open a folder of Parquet files, WebDataset shards or other files that `datasets` reads, or one file."""
    refuse_folder_options(config)
    files = {"data_files": {"train": str(path)}} if builder else {}
    with quiet_datasets():
        try:
            splits = datasets.load_dataset(
                builder or str(path), config.dataset_config_name, streaming=streaming, **files
            )
            if builder is None:
                _check_parquet_names(path, config.dataset_config_name, splits)
            return splits
        except UserError:
            raise
        except Exception as error:  # a file of unknown origin can fail in any way
            raise _unreadable(config, error) from error


def _shards_source(path: Path, listing: Listing, config: DataConfig, streaming: bool) -> Source:
    """Open a folder of shards. Raises: UserError if it has class folders, too."""
    images, notes = len(listing.images), []
    if images and not _declares_files(path):
        try:
            names = read_layout(listing).class_names
        except UserError:
            names = []
        if names:
            raise UserError(
                f"{config.dataset_name} holds class folders ({listed(names, 3)}) and Parquet or tar files of "
                "images; pass one of them as --dataset_name"
            )
    if images:
        notes.append(
            f"{path.name}: left out {images:,} image files beside the Parquet or tar files"
        )
    return Source(_load_shards(path, config, streaming), notes=tuple(notes))


def _unreadable(config: DataConfig, error: Exception) -> UserError:
    return UserError(f"cannot load data set {config.dataset_name}: {first_line(error)}")


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

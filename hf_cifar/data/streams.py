"""Data larger than the machine: train is read shard by shard, never whole; what is evaluated is gathered."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset
from datasets.distributed import split_dataset_by_node
from datasets.utils.file_utils import xopen

from hf_cifar.data.images import decode_image
from hf_cifar.data.sources import find_column, open_data_set, quiet_datasets
from hf_cifar.errors import UserError
from hf_cifar.options import DataConfig

# Rows that wait, encoded, in a loader process for a random one of them to go.
SHUFFLE_BUFFER = 1000
# Shards that fill the buffer at a time: files sorted by class must mix. Closing them takes `datasets` 5 s.
INTERLEAVED_SHARDS = 10


@functools.lru_cache(maxsize=1)
def load_streams(config: DataConfig) -> dict[str, IterableDataset]:
    """All splits, unread, with columns `image` (encoded) and `label` (ClassLabel).

    Raises: UserError for a source that cannot be streamed, or that does not declare its columns' types.
    """
    standard = {}
    for split, rows in open_data_set(config, streaming=True).items():
        if rows.features is None:
            raise UserError(
                f"{config.dataset_name} does not declare the types of its columns; leave out --streaming"
            )
        image = find_column(rows.features, Image, config.image_column_name, "image")
        label = find_column(rows.features, ClassLabel, config.label_column_name, "label")
        if not isinstance(rows.features[label], ClassLabel):
            raise UserError(
                f"column {label!r} does not declare its classes, and a stream is not read to find them; "
                "leave out --streaming, or cast the column to ClassLabel"
            )
        features = Features({"image": Image(decode=False), "label": rows.features[label]})
        rows = rows.select_columns([image, label])
        names = {image: "image", label: "label"}
        rows = rows.rename_columns({old: new for old, new in names.items() if old != new})
        standard[split] = rows.cast(features)
    return standard


@dataclass(frozen=True, eq=False)
class Stream:
    """The images to train on, of a data set that is read in shards and never whole.

    rows: columns image (encoded), label. num_rows: what the data set says that it holds, if it does.
    held_out: share of the images that belong to validation, picked by a hash of their bytes and `seed`:
    whatever the order of reading, and for a copy of an image as for the image.
    """

    name: str
    source_split: str
    rows: IterableDataset
    num_rows: int | None
    held_out: float
    seed: int

    def __len__(self) -> int:
        """Images of an epoch, to within the chance of the hash. Raises: UserError if nobody knows."""
        if self.num_rows is None:
            raise UserError(
                f"the data set does not say how many images {self.source_split} holds; pass "
                "--max_train_samples with the number that makes an epoch"
            )
        return round(self.num_rows * (1 - self.held_out))

    @property
    def id2label(self) -> dict[int, str]:
        return dict(enumerate(self.rows.features["label"].names))

    def num_shards(self, num_processes: int) -> int:
        """Shards that each of the processes reads, see `read`."""
        shards = self.rows.num_shards
        return shards // num_processes if shards % num_processes == 0 else shards

    def read(
        self, epoch: int, rank: int = 0, num_processes: int = 1, seed: int = 0
    ) -> Iterator[tuple[np.ndarray, int]]:
        """This process's images, [H, W, 3] uint8, and labels, in an order drawn anew for each epoch.

        A process reads shards of its own where they can be shared out evenly, else every so manieth row; in
        a loader's worker, that worker's part of it. Raises: UserError for an image that cannot be read.
        """
        rows = self.rows.shuffle(
            seed=seed, buffer_size=SHUFFLE_BUFFER, max_buffer_input_shards=INTERLEAVED_SHARDS
        )
        rows = split_dataset_by_node(rows, rank, num_processes)
        rows.set_epoch(epoch)
        for row in rows:
            encoded = encoded_bytes(row["image"])
            if self.held_out and is_held_out(encoded, self.held_out, self.seed):
                continue
            try:
                yield decode_image(encoded), checked_label(row["label"], self.rows.features)
            except UserError as error:
                where = (row["image"] or {}).get("path") or f"SHA-256 {sha256(encoded)[:16]}"
                raise UserError(f"{self.source_split}, {where}: {error}") from None


def gather(
    name: str, rows: IterableDataset, limit: int | None, held_out: float = 1, seed: int = 0
) -> tuple[Dataset, np.ndarray]:
    """The first `limit` (None: all) of the held-out rows, in memory as they are, and their positions [N].

    Raises: UserError if they do not show every class: then the order of the rows is not a random one.
    """
    found: dict[str, list] = {"image": [], "label": []}
    positions = []
    for position, row in enumerate(rows):
        if limit is not None and len(positions) == limit:
            break
        encoded = encoded_bytes(row["image"])
        if held_out == 1 or is_held_out(encoded, held_out, seed):
            found["image"].append({"bytes": encoded, "path": None})
            found["label"].append(checked_label(row["label"], rows.features))
            positions.append(position)
    classes = rows.features["label"].names
    missing = [n for i, n in enumerate(classes) if i not in set(found["label"])]
    if missing:
        raise UserError(
            f"the {len(positions)} images of {name} show {len(classes) - len(missing)} of {len(classes)} "
            f"classes, none of {missing[0]!r}; raise or leave out --max_eval_samples, or --streaming"
        )
    with quiet_datasets():
        return Dataset.from_dict(found, features=rows.features), np.asarray(positions, np.int64)


def num_rows(rows: IterableDataset, split: str) -> int | None:
    """Rows of a split, as its data set declares them."""
    declared = (rows.info.splits or datasets.SplitDict()).get(split)
    return declared.num_examples or None if declared is not None else None


def encoded_bytes(cell: dict | None) -> bytes:
    """The image file in one cell of an undecoded column; empty for an empty cell."""
    if not cell or not (cell.get("bytes") or cell.get("path")):
        return b""
    if cell.get("bytes"):
        return cell["bytes"]
    with xopen(cell["path"], "rb") as file:
        return file.read()


def is_held_out(encoded: bytes, share: float, seed: int) -> bool:
    """Whether an image belongs to validation: a fixed `share` of all that there are, evenly drawn."""
    digest = hashlib.sha256(f"{seed} ".encode() + encoded).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def sha256(encoded: bytes) -> str:
    return hashlib.sha256(encoded).hexdigest()


def checked_label(label: int | None, features: Features) -> int:
    """Raises: UserError for a label that is not one of the classes."""
    classes = features["label"].num_classes
    if label is None or not 0 <= label < classes:
        raise UserError(f"label {label!r} is not one of the {classes} classes")
    return label

"""Stream data sets larger than the machine: train is read by shards, evaluation images are kept in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset
from datasets.distributed import split_dataset_by_node

from hf_cifar.config.data import MAX_IMAGE_PIXELS, DataConfig, ValueRange
from hf_cifar.data.columns import image_and_label, in_memory, with_standard_names
from hf_cifar.data.images import decode_image, read_encoded
from hf_cifar.data.labels import holds_lists
from hf_cifar.data.sources import open_data_set
from hf_cifar.errors import UserError

# Encoded rows in the shuffle buffer of each loader process.
SHUFFLE_BUFFER = 1000
# Shards that fill the buffer at the same time, so that files sorted by class mix. `datasets` takes 5 s to
# close them.
INTERLEAVED_SHARDS = 10


def load_streams(config: DataConfig) -> dict[str, IterableDataset]:
    """Open all splits, unread, with columns `image` (encoded, as in the source) and `label` (ClassLabel).

    Raises: UserError for a source that cannot be streamed, or that does not declare its columns' types.
    """
    standard: dict[str, IterableDataset] = {}
    for split, rows in open_data_set(config, streaming=True).splits.items():
        if rows.features is None:
            raise UserError(
                f"{config.dataset_name} does not declare the types of its columns; leave out --streaming"
            )
        if rows.info.builder_name == "imagefolder":
            raise UserError(
                f"{config.dataset_name} is a folder of image files, sorted by class, which a stream cannot "
                "shuffle; leave out --streaming (the files are read in place, not copied)"
            )
        image, label = image_and_label(rows.features, config)
        # Before anything else: a stream that decodes would return re-encoded images.
        rows = with_standard_names(rows.decode(False), split, image, label)
        if not isinstance(rows.features["image"], Image):  # bytes
            rows = rows.cast_column("image", Image(decode=False))
        if holds_lists(rows.features["label"]):
            raise UserError(
                f"column {label!r} holds multiple labels per image, which cannot be streamed; leave out "
                "--streaming"
            )
        if not isinstance(rows.features["label"], ClassLabel):
            raise UserError(
                f"column {label!r} does not declare its classes, and a stream is not scanned to find them; "
                "leave out --streaming, or cast the column to ClassLabel"
            )
        names = rows.features["label"].names
        first = next(iter(standard.values()), rows).features["label"].names
        if names != first:
            raise UserError(
                f"split {split} has the classes {names}, but the first split has {first}"
            )
        standard[split] = rows
    return standard


@dataclass(frozen=True, eq=False)
class Stream:
    """The training images of a data set that is read in shards and never whole.

    rows: columns image (encoded), label. num_images: per epoch, None if unknown. Each image's bytes and
    `seed` are hashed to a number from 0 to 1: images below held_out belong to validation, those from there up
    to `end` to train. The number does not depend on the reading order, and identical images share it.
    """

    name: str
    source_split: str
    rows: IterableDataset
    num_images: int | None
    held_out: float
    end: float
    seed: int
    max_pixels: int = MAX_IMAGE_PIXELS
    value_range: ValueRange | None = None

    def __len__(self) -> int:
        """Images per epoch (approximate: a hash decides membership). Raises: UserError if it is unknown."""
        if self.num_images is None:
            raise UserError(
                f"the data set does not declare how many images {self.source_split} has; pass "
                "--max_train_samples with the number of images per epoch"
            )
        return self.num_images

    @property
    def id2label(self) -> dict[int, str]:
        return dict(enumerate(self.rows.features["label"].names))

    def num_shards(self, num_processes: int) -> int:
        """Number of shards that each process reads, see `read`."""
        shards = self.rows.num_shards
        return shards // num_processes if shards % num_processes == 0 else shards

    def num_workers(self, num_processes: int, limit: int) -> int:
        """The largest number of workers up to `limit` that divides the shards of a process evenly."""
        shards = self.num_shards(num_processes)
        return max(n for n in range(1, limit + 1) if shards % n == 0)

    def read(
        self, epoch: int, rank: int = 0, num_processes: int = 1, seed: int = 0
    ) -> Iterator[tuple[np.ndarray, int]]:
        """Read this process's images, [H, W, 3] uint8, and labels, in a new random order for each epoch.

        A process reads its own shards if they divide evenly, else every n-th row; a loader's worker reads its
        part of that. Raises: UserError for an image that cannot be read.
        """
        rows = self.rows.shuffle(
            seed=seed, buffer_size=SHUFFLE_BUFFER, max_buffer_input_shards=INTERLEAVED_SHARDS
        )
        rows = split_dataset_by_node(rows, rank, num_processes)
        rows.set_epoch(epoch)
        for row in rows:
            encoded = read_encoded(row["image"])
            if (self.held_out or self.end < 1) and not (
                self.held_out <= unit_hash(encoded, self.seed) < self.end
            ):
                continue
            try:
                image = decode_image(encoded, self.max_pixels, self.value_range)
                yield image, checked_label(row["label"], self.rows.features)
            except UserError as error:
                digest = hashlib.sha256(encoded).hexdigest()
                where = (row["image"] or {}).get("path") or f"SHA-256 {digest[:16]}"
                raise UserError(f"{self.source_split}, {where}: {error}") from None


def collect(
    source_split: str, rows: IterableDataset, limit: int | None, held_out: float = 1, seed: int = 0
) -> tuple[Dataset, np.ndarray]:
    """Collect the first `limit` (None: all) held-out rows in memory, encoded, with their positions [N].

    Raises: UserError that names a row whose label is not one of the classes.
    """
    found: list[dict[str, Any]] = []
    positions: list[int] = []
    for position, row in enumerate(rows):
        if limit is not None and len(positions) == limit:
            break
        encoded = read_encoded(row["image"])
        if held_out == 1 or unit_hash(encoded, seed) < held_out:
            try:
                label = checked_label(row["label"], rows.features)
            except UserError as error:
                raise UserError(f"{source_split} row {position}: {error}") from None
            found.append({"image": {"bytes": encoded, "path": None}, "label": label})
            positions.append(position)
    return in_memory(found, rows.features), np.asarray(positions, np.int64)


def num_rows(rows: IterableDataset, split: str) -> int | None:
    """Number of rows of a split that its data set declares; None if it does not."""
    declared = (rows.info.splits or datasets.SplitDict()).get(split)
    return declared.num_examples or None if declared is not None else None


def unit_hash(encoded: bytes, seed: int) -> float:
    """Hash an image to a number from 0 to 1, uniformly distributed and the same in every run."""
    digest = hashlib.sha256(f"{seed} ".encode() + encoded).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def require_every_class(rows: Dataset, what: str) -> None:
    """Raises: UserError if the rows for model selection lack a class, as in a source sorted by class."""
    classes, present = rows.features["label"].names, set(rows["label"][:])
    missing = [name for i, name in enumerate(classes) if i not in present]
    if missing:
        raise UserError(
            f"the {len(rows)} images of {what} cover {len(classes) - len(missing)} of {len(classes)} "
            f"classes, not {missing[0]!r}; raise --max_eval_samples, or leave out --streaming"
        )


def checked_label(label: int | None, features: Features) -> int:
    """Raises: UserError for a label that is not one of the classes."""
    classes = features["label"].num_classes
    if label is None or not 0 <= label < classes:
        raise UserError(f"label {label!r} is not one of the {classes} classes")
    return label

"""uint8 pixels for the loader: a split resident in memory or on the device, or read for each batch.

`ResidentStore` holds every pixel, `PreparedStore` reads them from a file or decodes them, and `ShardStore`
reads data that can only be read in order.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from hf_cifar.data.pixels import Prepared
from hf_cifar.data.preparation import SplitImages, fits_on_gpu
from hf_cifar.data.split import Split, UnreadableImages
from hf_cifar.data.streams import Stream
from hf_cifar.errors import UserError
from hf_cifar.platform import num_cores
from hf_cifar.transforms.preprocessing import Preprocessing

logger = logging.getLogger(__name__)
# A split with a smaller share of its source reads only its own rows into memory.
SHARED_FRACTION = 0.5
CHUNK = 1024  # images that are read at once
CPU = torch.device("cpu")


class ResidentStore(Dataset):
    """Every image of a split in one tensor, on the model's device; the loader only passes row numbers.

    pixels: uint8 [M, H, W, 3], which other stores may share; labels: int64 [N]; row_ids: int64 [N],
    0 to N - 1 if not given; positions: int64 [N], the index of each image in `pixels`, if not in order; name:
    of the split.
    A batch is {"pixel_values": uint8 [B, 3, H, W], "labels": int64 [B], "row_ids": int64 [B]}.
    """

    decodes = False

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        row_ids: Tensor | None = None,
        positions: Tensor | None = None,
        name: str = "",
    ) -> None:
        self.name = name
        self.pixels = pixels
        self.labels = labels
        self.row_ids = torch.arange(len(labels)) if row_ids is None else row_ids
        self.row_ids = self.row_ids.to(pixels.device)
        self.positions = positions

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> dict[str, Tensor]:
        rows = torch.as_tensor(positions).to(self.pixels.device, non_blocking=True)
        places = rows if self.positions is None else self.positions[rows]
        return {
            # On a CPU three times as fast as indexing, because it copies whole rows.
            "pixel_values": torch.index_select(self.pixels, 0, places).permute(0, 3, 1, 2),
            "labels": self.labels[rows],
            "row_ids": self.row_ids[rows],
        }


class PreparedStore(Dataset):
    """Images that are read from a file for each batch; those that are not there yet are decoded.

    A batch is {"pixel_values": uint8 [B, 3, h, w], "labels": int64 [B], "row_ids": int64 [B]}, with (h, w) =
    the size of the stored form. skips: leave unreadable images out of a batch, instead of an error.
    """

    def __init__(self, split: Split, *, skips: bool = False) -> None:
        self.name, self.split, self.images = split.name, split, images_of(split)
        self.skips = skips
        self.labels = torch.from_numpy(split.labels)
        self.row_ids = torch.from_numpy(split.row_ids)

    @property
    def decodes(self) -> bool:
        """True if images are decoded while the model computes."""
        return self.images.decodes

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> dict[str, Tensor]:
        rows = np.asarray(positions)
        images, readable = self.images.read(rows)
        if not readable.all():
            if not (self.skips and readable.any()):
                faults = self.images.faults
                bad = {row: faults[row] for row in rows[~readable].tolist()}
                # A loader's worker can only pass on errors that are made from a message alone.
                raise UserError(str(UnreadableImages([(self.split, bad)])))
            images, rows = images[readable], rows[readable]
        return {
            "pixel_values": torch.from_numpy(images).permute(0, 3, 1, 2),
            "labels": self.labels[rows],
            "row_ids": self.row_ids[rows],
        }


class ShardStore(IterableDataset):
    """Batches from a stream of shards: this process's part, decoded and resized by the loader's workers.

    An item is a whole batch, {"pixel_values": uint8 [B, 3, h, w], "labels": int64 [B]}; an epoch has full
    batches only, which the workers yield in turn. A worker that runs out of images rereads its shards.
    """

    def __init__(
        self,
        stream: Stream,
        preprocessing: Preprocessing,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        self.stream = stream
        self.preprocessing = preprocessing
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.num_processes = num_processes
        self.epoch = 0
        if len(self) == 0:
            raise UserError(
                f"the {len(stream)} training images do not fill one batch of {batch_size} in each of "
                f"{num_processes} processes; pass a smaller --per_device_train_batch_size"
            )

    def __len__(self) -> int:
        return len(self.stream) // (self.batch_size * self.num_processes)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        images = self._images()
        for _ in range(first, len(self), step):
            batch = [next(images) for _ in range(self.batch_size)]
            yield {
                "pixel_values": torch.cat([resized(im, self.preprocessing) for im, _ in batch]),
                "labels": torch.tensor([label for _, label in batch]),
            }

    def _images(self) -> Iterator[tuple[np.ndarray, int]]:
        again = 0
        while True:
            # Unique for each pass, because a run has far fewer epochs than the factor.
            number = self.epoch + again * 100_000
            part = self.stream.read(number, self.rank, self.num_processes, self.seed)
            empty = True
            for image in part:
                empty = False
                yield image
            if empty:
                raise UserError(
                    f"a shard of {self.stream.source_split} has no training images; use fewer "
                    "--dataloader_num_workers"
                )
            again += 1


def images_of(split: Split) -> SplitImages:
    """Return the images of a split for a model. Raises: ValueError if they have not been prepared."""
    if split.images is None:
        raise ValueError(
            f"the images of {split.name} are not prepared for a model; call `prepare_split`"
        )
    return split.images


def build_store(
    split: Split, *, device: torch.device = CPU, skips: bool = False
) -> ResidentStore | PreparedStore:
    """Make the store of a split whose images have been prepared, or are lazy.

    Resident images are moved to the device if they fit; stores of one split share their tensor. skips: see
    `PreparedStore`.
    """
    images = images_of(split)
    if images.kind != "resident":
        where = "decoded at each use" if images.kind == "streamed" else "read from disk"
        logger.info("%s: %s, %s", split.name, images, where)
        return PreparedStore(split, skips=skips)
    pixels, positions = _resident(images, device)
    where = "in memory" if pixels.device.type == "cpu" else "on the GPU"
    logger.info("%s: %s %s", split.name, images, where)
    labels = torch.from_numpy(split.labels).to(pixels.device)
    if positions is not None:
        positions = positions.to(pixels.device)
    return ResidentStore(
        pixels, labels, torch.from_numpy(split.row_ids), positions, name=split.name
    )


def _resident(images: SplitImages, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return a tensor with the images, and the position of each of them if the tensor holds others too.

    Small images of one size share a tensor for all splits of a source; each split fills in its own.
    """
    prepared, own, shared = images.prepared, images.tensors, images.pixels.tensors
    key, count, num_all = (prepared.form, device), len(images), len(images.pixels)
    is_shared = prepared.form.view is None and (key in shared or count >= SHARED_FRACTION * num_all)
    if not is_shared:
        if key not in own:
            own[key] = _allocated(count, prepared, device)
            _fill(own[key], np.arange(count), prepared, images.positions)
        return own[key], None
    if key not in shared:
        shared[key] = _allocated(num_all, prepared, device), np.zeros(num_all, bool)
    pixels, filled = shared[key]
    rows = images.positions[~filled[images.positions]]
    _fill(pixels, rows, prepared, rows)
    filled[rows] = True
    return pixels, torch.from_numpy(images.positions)


def _allocated(count: int, prepared: Prepared, device: torch.device) -> Tensor:
    """Allocate images [count, h, w, 3] on the device if they fit there, else in memory."""
    if not fits_on_gpu(count * prepared.form.row_bytes, device):
        device = CPU
    return torch.empty((count, *prepared.form.size, 3), dtype=torch.uint8, device=device)


def _fill(pixels: Tensor, rows: np.ndarray, prepared: Prepared, positions: np.ndarray) -> None:
    """Read the images at `positions` [B] into rows [B] of a tensor."""
    for start in range(0, len(rows), CHUNK):
        wanted = positions[start : start + CHUNK]
        chunk, readable = prepared.read(wanted)
        if not readable.all():
            reason = prepared.reasons[int(wanted[~readable][0])]
            raise UserError(f"an image can no longer be read: {reason}; start again")
        where = torch.from_numpy(rows[start : start + CHUNK]).to(pixels.device)
        pixels[where] = torch.from_numpy(chunk).to(pixels.device)


def default_num_workers(*, decodes: bool) -> int:
    """Number of loader workers: this process's share of the cores if they decode, else none."""
    if not decodes:
        return 0
    return max(1, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def to_batch(image) -> Tensor:
    """Convert a [H, W, 3] uint8 array to a [1, 3, H, W] uint8 tensor."""
    return torch.tensor(image).permute(2, 0, 1)[None]


def resized(image, preprocessing: Preprocessing) -> Tensor:
    """Convert a [H, W, 3] uint8 array to its preprocessed view, uint8 [1, 3, h, w]."""
    return preprocessing.view(to_batch(image)).round_().to(torch.uint8)


def take_batch(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the batch unchanged: the loader's collate function, since a store returns whole batches."""
    return batch

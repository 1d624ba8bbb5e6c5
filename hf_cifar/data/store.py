"""uint8 pixels for the loader: a split resident in memory or on the device, or streamed by workers.

`ResidentStore` holds every pixel, `StreamedStore` decodes rows on demand, and `ShardStore` reads data that
can only be read in order.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from tqdm.auto import tqdm

from hf_cifar.data.pixels import ImageView, Pixels, memory_to_spare
from hf_cifar.data.split import Split, require_readable
from hf_cifar.data.streams import Stream
from hf_cifar.errors import UserError
from hf_cifar.transforms.preprocessing import Preprocessing

logger = logging.getLogger(__name__)
# Images of mixed sizes are stored this much larger than the model's input, as a margin for random crops.
TRAINING_MARGIN = 8 / 7
# Share of a device's free memory that the images of one source, or of one split, may take.
DEVICE_SHARE = 0.25
CPU = torch.device("cpu")


class ResidentStore(Dataset):
    """Every image of a split in one tensor, on the model's device; the loader only passes row numbers.

    pixels: uint8 [M, H, W, 3], which other stores may share; labels: int64 [N]; row_ids: int64 [N],
    0 to N - 1 if not given; positions: int64 [N], the index of each image in `pixels`, if not in order.
    A batch is {"pixel_values": uint8 [B, 3, H, W], "labels": int64 [B], "row_ids": int64 [B]}.
    """

    resident = True

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        row_ids: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> None:
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


class StreamedStore(Dataset):
    """Images that the loader's workers decode and resize to one size.

    A batch is {"pixel_values": uint8 [B, 3, h, w], "labels": int64 [B], "row_ids": int64 [B]}, with (h, w) =
    `preprocessing.size`.
    """

    resident = False

    def __init__(self, split: Split, preprocessing: Preprocessing) -> None:
        self.split = split
        self.preprocessing = preprocessing
        self.labels = torch.from_numpy(split.labels)
        self.row_ids = torch.from_numpy(split.row_ids)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> dict[str, Tensor]:
        images = [resized(self.split.decode(row), self.preprocessing) for row in positions]
        return {
            "pixel_values": torch.cat(images),
            "labels": self.labels[torch.as_tensor(positions)],
            "row_ids": self.row_ids[torch.as_tensor(positions)],
        }


class ShardStore(IterableDataset):
    """Batches from a stream of shards: this process's part, decoded and resized by the loader's workers.

    An item is a whole batch, {"pixel_values": uint8 [B, 3, h, w], "labels": int64 [B]}; an epoch has full
    batches only, which the workers yield in turn. A worker that runs out of images rereads its shards.
    """

    resident = False

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


def build_store(
    split: Split,
    preprocessing: Preprocessing,
    *,
    augmented: bool,
    kind: str = "auto",
    device: torch.device = CPU,
) -> ResidentStore | StreamedStore:
    """Make a resident store if the split fits, else a streamed one. Stores of one split share their tensor.

    augmented: images of mixed sizes keep a margin around the model's size, for random crops. kind: auto,
    resident or streamed. device: resident pixels are moved there if they fit.
    Raises: UserError that names the row of each unreadable image.
    """
    stored = stored_view(preprocessing, augmented)
    count = f"{len(split):,} images"
    if not is_resident(split, stored, kind):
        require_readable(split, pixel_store="streamed")
        logger.info("%s: %s, decoded on demand", split.name, count)
        return StreamedStore(split, stored)
    images, positions = split.images, None
    if isinstance(images, ImageView):
        pixels = _placed(images.pixels, None, device, lambda: torch.from_numpy(images.array))
        positions = torch.from_numpy(images.positions).to(pixels.device)
    else:
        pixels = _placed(split, stored, device, lambda: _resize_all(split, stored))
    where = "in memory" if pixels.device.type == "cpu" else "on the GPU"
    logger.info(
        "%s: %s of %d x %d px %s", split.name, count, pixels.shape[2], pixels.shape[1], where
    )
    labels = torch.from_numpy(split.labels).to(pixels.device)
    return ResidentStore(pixels, labels, torch.from_numpy(split.row_ids), positions)


def _placed(
    owner: Pixels | Split,
    stored: Preprocessing | None,
    device: torch.device,
    make: Callable[[], Tensor],
) -> Tensor:
    """Call `make` and move its tensor to the device if it fits; `owner` keeps the last one for reuse."""
    key = stored, device
    if key not in owner.tensors:
        owner.tensors.clear()
        pixels = make()
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            device = device if pixels.nbytes < DEVICE_SHARE * free else CPU
        owner.tensors[key] = pixels.to(device)
    return owner.tensors[key]


def stored_view(preprocessing: Preprocessing, augmented: bool) -> Preprocessing:
    """The view in which images are stored if their sizes differ, or if the originals do not fit in memory."""
    return preprocessing.enlarged(TRAINING_MARGIN) if augmented else preprocessing.uncropped()


def is_resident(split: Split, stored: Preprocessing, kind: str = "auto") -> bool:
    """True if `build_store` holds the split in memory, at its original size or in its stored view."""
    if kind != "auto":
        return kind == "resident"
    num_bytes = 3 * math.prod(stored.size) * len(split)
    return split.images is not None or num_bytes < memory_to_spare()


def default_num_workers(resident: bool) -> int:
    """Number of loader workers: none for images in memory, else this process's share of the cores."""
    if resident:
        return 0
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def to_batch(image) -> Tensor:
    """Convert a [H, W, 3] uint8 array to a [1, 3, H, W] uint8 tensor."""
    return torch.tensor(image).permute(2, 0, 1)[None]


def resized(image, preprocessing: Preprocessing) -> Tensor:
    """Convert a [H, W, 3] uint8 array to its preprocessed view, uint8 [1, 3, h, w]."""
    return preprocessing.view(to_batch(image)).round_().to(torch.uint8)


def take_batch(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the batch unchanged: the loader's collate function, since a store returns whole batches."""
    return batch


def _resize_all(split: Split, preprocessing: Preprocessing) -> Tensor:
    """Resize images of mixed sizes to one size, uint8 [N, h, w, 3]."""
    pixels = torch.empty((len(split), *preprocessing.size, 3), dtype=torch.uint8)
    images = split.decode_all() if split.images is None else split.images
    for row, image in enumerate(
        tqdm(images, f"resizing {split.name}", len(split), leave=False, disable=None)
    ):
        pixels[row] = resized(image, preprocessing)[0].permute(1, 2, 0)
    return pixels

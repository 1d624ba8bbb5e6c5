"""uint8 pixels for the loader: all in memory, or decoded and resized as workers need them."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_cifar.data.preprocessing import Preprocessing
from hf_cifar.data.splits import Split

# Streamed training images keep this margin over the model's size for the random crops to use.
STREAMED_MARGIN = 8 / 7


class ResidentStore(Dataset):
    """Every image of a split as one uint8 tensor, decoded once.

    A batch is {"pixel_values": uint8 [B, 3, H, W], "labels": int64 [B]}.
    """

    streamed = False

    def __init__(self, split: Split) -> None:
        self.pixels = torch.from_numpy(split.pixels)
        self.labels = torch.from_numpy(split.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> dict[str, Tensor]:
        index = torch.as_tensor(positions)
        return {
            "pixel_values": self.pixels[index].permute(0, 3, 1, 2),
            "labels": self.labels[index],
        }


class StreamedStore(Dataset):
    """Images of any sizes, decoded and brought to one size in the loader's workers.

    A batch is {"pixel_values": uint8 [B, 3, h, w], "labels": int64 [B]}, with h x w the size that
    `preprocessing` gives.
    """

    streamed = True

    def __init__(self, split: Split, preprocessing: Preprocessing) -> None:
        self.split = split
        self.preprocessing = preprocessing
        self.labels = torch.from_numpy(split.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> dict[str, Tensor]:
        images = [
            self.preprocessing.view(to_batch(self.split.decode(position))) for position in positions
        ]
        return {
            "pixel_values": torch.cat(images).round_().to(torch.uint8),
            "labels": self.labels[torch.as_tensor(positions)],
        }


def build_store(split: Split, preprocessing: Preprocessing, *, augmented: bool) -> Dataset:
    """Hold the split in memory if its images have one size and fit, else stream it.

    augmented: keep a margin around the model's size, for random crops.
    Raises: UserError that names the row of an image that cannot be read.
    """
    if split.pixels is not None:
        return ResidentStore(split)
    return StreamedStore(
        split, preprocessing.enlarged(STREAMED_MARGIN) if augmented else preprocessing.uncropped()
    )


def default_num_workers(in_memory: bool) -> int:
    """Loader processes: none for images in memory, else this process's share of the machine's cores."""
    if in_memory:
        return 0
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def to_batch(image) -> Tensor:
    """[H, W, 3] uint8 array -> [1, 3, H, W] uint8 tensor."""
    return torch.tensor(image).permute(2, 0, 1)[None]


def take_batch(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loader's collate function: a store already returns whole batches."""
    return batch

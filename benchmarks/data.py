"""Speed of the store and the transforms alone, compared with the PIL pipeline on the same number of cores.

python -m benchmarks.data [--rounds 3]
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import compare
from benchmarks.peers import pil_transform
from hf_cifar.data.store import ResidentStore
from hf_cifar.training.memory import keep_freed_memory
from hf_cifar.transforms.augmentation import Augmentation
from hf_cifar.transforms.preprocessing import Preprocessing
from hf_cifar.transforms.views import RandomView

AUGMENTATION = Augmentation(RandomView(min_area=0.25, flip=0.5))
STATISTICS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


class EndlessPictures(Dataset):
    """A repeated list of pictures, transformed one by one."""

    def __init__(self, pictures: list[Image.Image], transform: Callable) -> None:
        self.pictures, self.transform = pictures, transform

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(self.pictures[index % len(self.pictures)])


def timed(run: Callable[[], int], seconds: float = 3.0) -> Callable[[], float]:
    """Return images/s of a function that processes some images and returns their number."""

    def measure() -> float:
        run()
        start, images = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            images += run()
        return images / (time.perf_counter() - start)

    return measure


def store_speed(rounds: int) -> None:
    """Compare random batches of 256 from 50,000 resident images with the same from a numpy array."""
    pixels = np.random.default_rng(0).integers(0, 256, (50_000, 32, 32, 3), dtype=np.uint8)
    store = ResidentStore(torch.from_numpy(pixels), torch.zeros(50_000, dtype=torch.int64))
    generator = np.random.default_rng(1)

    def resident() -> int:
        rows = generator.integers(0, 50_000, 256).tolist()
        return len(store.__getitems__(rows)["labels"])

    def numpy() -> int:
        return len(pixels[generator.integers(0, 50_000, 256)])

    compare(
        "store, random batches of 256",
        {"ours": timed(resident), "numpy": timed(numpy)},
        rounds=rounds,
    )


def transform_speed(size: int, rounds: int) -> None:
    """Compare random resized crop, flip and normalisation, 32 px to `size`, on all cores."""
    preprocessing = Preprocessing((size, size), None, "bicubic", **STATISTICS)
    pixels = np.random.default_rng(0).integers(0, 256, (256, 32, 32, 3), dtype=np.uint8)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    labels = torch.zeros(len(images), dtype=torch.int64)
    pictures = [Image.fromarray(image) for image in pixels]
    transform = pil_transform(preprocessing)
    generator = torch.Generator().manual_seed(0)
    pool = ThreadPoolExecutor(os.cpu_count())

    def ours() -> int:
        AUGMENTATION(images[:64], labels[:64], preprocessing, 10, generator)
        return 64

    def pil() -> int:
        return len(list(pool.map(transform, pictures)))

    def pil_alone() -> int:
        return len([transform(picture) for picture in pictures[:64]])

    def pil_workers() -> float:
        loader = DataLoader(EndlessPictures(pictures, transform), 64, num_workers=os.cpu_count())
        batches = iter(loader)
        return timed(lambda: len(next(batches)))()

    runs = {
        "ours": timed(ours),
        "PIL, threads": timed(pil),
        "PIL, loader processes": pil_workers,
        "PIL, one thread": timed(pil_alone),
    }
    compare(f"transforms, 32 -> {size} px", runs, rounds=rounds)


def main() -> None:
    """Measure the store, then transforms at 96 and 224 px."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    keep_freed_memory()  # as in training on a CPU; the PIL pipeline benefits too
    store_speed(rounds)
    for size in (96, 224):
        transform_speed(size, rounds)


if __name__ == "__main__":
    main()

"""Photographs: preparing them once, compared with decoding them in every epoch.

python -m benchmarks.photos [--images 20000] [--classes 100] [--rounds 3] [--folder FOLDER] [--growth]
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from torch.utils.data import DataLoader, RandomSampler

from benchmarks.measure import compare, conditions, write
from benchmarks.peers import Task, ceiling, collate, ours, pil_transform, plain, timm_pattern
from benchmarks.pictures import write_photographs
from benchmarks.turns import workers
from hf_cifar.config.data import DataConfig
from hf_cifar.data.cache import disk_bytes
from hf_cifar.data.split import Split, prepare_split, with_images
from hf_cifar.data.splits import DataSource
from hf_cifar.data.store import build_store
from hf_cifar.training.memory import keep_freed_memory
from hf_cifar.transforms.augmentation import Augmentation
from hf_cifar.transforms.preprocessing import Preprocessing
from hf_cifar.transforms.views import RandomView

SIZE, BATCH, NUM_WORKERS = 128, 64, 2
VIEW = Preprocessing(
    SIZE, (SIZE, SIZE), "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
)
AUGMENTATION = Augmentation(RandomView(min_area=0.25, flip=0.5))
SECONDS = 5  # per variant and round


def timed(batches: Iterator[int]) -> float:
    """Return images/s of an endless iterator of batch sizes, after a warm-up."""
    for _ in range(4):
        next(batches)
    start, images = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        images += next(batches)
    return images / (time.perf_counter() - start)


def our_batches(split: Split) -> Iterator[int]:
    """Yield the sizes of endless training batches from prepared images, cropped, flipped and normalised."""
    store = build_store(split)
    generator = torch.Generator().manual_seed(0)
    while True:
        for rows in torch.randperm(len(split), generator=generator).split(BATCH):
            batch = store.__getitems__(rows.tolist())
            pixel_values, _ = AUGMENTATION(
                batch["pixel_values"], batch["labels"], VIEW, 1000, generator
            )
            yield len(pixel_values)


def plain_batches(folder: Path) -> Iterator[int]:
    """Yield the sizes of endless batches of the stock recipe: PIL transforms in loader processes."""
    rows = load_dataset("imagefolder", data_dir=str(folder), split="train")
    transform = pil_transform(VIEW)

    def apply(examples: dict) -> dict:
        images = [transform(image.convert("RGB")) for image in examples["image"]]
        return {"pixel_values": images, "labels": examples["label"]}

    loader = DataLoader(
        rows.with_transform(apply), BATCH, sampler=RandomSampler(rows, True, 10**7),
        num_workers=NUM_WORKERS, collate_fn=collate,
    )  # fmt: skip
    for batch in loader:
        yield len(batch["labels"])


def timm_batches(folder: Path) -> Iterator[int]:
    """Yield the sizes of endless batches of timm's loader."""
    from timm.data import create_dataset, create_loader

    loader = create_loader(
        create_dataset("", root=str(folder)), (3, SIZE, SIZE), BATCH, is_training=True,
        scale=(0.25, 1), hflip=0.5, color_jitter=None, num_workers=NUM_WORKERS, mean=VIEW.mean,
        std=VIEW.std, interpolation="bicubic", use_prefetcher=False, persistent_workers=False,
    )  # fmt: skip
    while True:
        for images, _ in loader:
            yield len(images)


def first_pass(split: Split) -> float:
    """Return images/s of preparing some images in an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        before = os.environ.get("HF_CIFAR_CACHE")
        os.environ["HF_CIFAR_CACHE"] = cache
        try:
            start = time.perf_counter()
            part = Split(split.name, fresh(split), split.positions[:2000])
            prepare_split(part, VIEW, augmented=True, kind="disk")
            return len(part) / (time.perf_counter() - start)
        finally:
            os.environ.pop("HF_CIFAR_CACHE")
            if before is not None:
                os.environ["HF_CIFAR_CACHE"] = before


def fresh(split: Split):
    """Return the pixels of a split, without what is prepared of them."""
    pixels = split.pixels
    again = type(pixels)(pixels.source_split, pixels.rows)
    again.key = pixels.key
    return again


def data_side(folder: Path, rounds: int) -> None:
    """Compare the images per second that reach the model, and the first pass."""
    source = DataSource(DataConfig(dataset_name=str(folder)))
    train = source.splits.train
    start = time.perf_counter()
    prepared = prepare_split(train, VIEW, augmented=True, kind="disk")
    seconds = time.perf_counter() - start
    cache = Path(os.environ["HF_CIFAR_CACHE"])
    facts = {
        "prepared": f"{len(train):,} images in {seconds:.0f} s",
        "disk_mb": round(sum(disk_bytes(path) for path in cache.iterdir()) / 1e6),
    }
    compare(
        f"photographs, data side, {SIZE} px",
        {
            "ours, from the second epoch on": lambda: timed(our_batches(prepared)),
            f"plain, {NUM_WORKERS} workers": lambda: timed(plain_batches(folder)),
            f"timm, {NUM_WORKERS} workers": lambda: timed(timm_batches(folder)),
        },
        rounds=rounds,
        **facts,
    )
    compare(
        f"photographs, first pass, {SIZE} px",
        {
            "ours, first pass": lambda: first_pass(train),
            f"plain, {NUM_WORKERS} workers": lambda: timed(plain_batches(folder)),
        },
        rounds=rounds,
    )


def main() -> None:
    """Measure the data side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["HF_CIFAR_CACHE"] = str(Path(scratch, "pixels"))
        folder = options.folder or write_photographs(
            Path(scratch, "photos"), options.images, options.classes
        )
        data_side(folder, options.rounds)


if __name__ == "__main__":
    main()

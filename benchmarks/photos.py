"""Photographs: prepared once, compared with decoding them in every epoch; time to the first step; growth.

python -m benchmarks.photos [--only data|training|start|growth] [--images 20000] [--classes 100] [--rounds 3]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import resource
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

from benchmarks.measure import compare
from benchmarks.peers import Task, chosen_setting, collate, pil_transform, train_as
from benchmarks.pictures import write_photographs
from benchmarks.training import compare_in_turns
from benchmarks.turns import CONTEXT
from hf_cifar.config.data import DataConfig
from hf_cifar.data.cache import disk_bytes
from hf_cifar.data.pixels import Pixels
from hf_cifar.data.split import Split, prepare_split
from hf_cifar.data.splits import DataSource
from hf_cifar.data.store import build_store
from hf_cifar.training.memory import keep_freed_memory
from hf_cifar.transforms.augmentation import Augmentation
from hf_cifar.transforms.preprocessing import Preprocessing
from hf_cifar.transforms.views import RandomView

MODEL = "bundled/efficientnet_lite0"
SIZE, BATCH, NUM_WORKERS = 128, 64, 2
VIEW = Preprocessing(SIZE, (SIZE, SIZE), "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
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


@contextlib.contextmanager
def empty_cache() -> Iterator[Path]:
    """Let the package use an empty cache until the block ends."""
    before = os.environ["HF_CIFAR_CACHE"]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_CIFAR_CACHE"] = folder
        try:
            yield Path(folder)
        finally:
            os.environ["HF_CIFAR_CACHE"] = before


def first_pass(split: Split, count: int = 2000) -> float:
    """Return images/s of preparing some images for the first time."""
    pixels = split.pixels
    again = Pixels(pixels.source_split, pixels.rows)
    again.__dict__["key"] = pixels.key  # hashing the files is part of every run, not of the pass
    with empty_cache():
        start = time.perf_counter()
        prepare_split(
            Split(split.name, again, split.positions[:count]), VIEW, augmented=True, kind="disk"
        )
        return count / (time.perf_counter() - start)


def delivered(split: Split) -> Iterator[int]:
    """Yield the sizes of endless batches as the loader hands them over, uint8, not transformed."""
    store, generator = build_store(split), np.random.default_rng(0)
    while True:
        yield len(store.__getitems__(generator.integers(0, len(split), BATCH).tolist())["labels"])


def data_side(folder: Path, rounds: int) -> None:
    """Compare the images per second that reach the model, and the first pass."""
    train = DataSource(DataConfig(dataset_name=str(folder))).splits.train
    start = time.perf_counter()
    prepared = prepare_split(train, VIEW, augmented=True, kind="disk")
    seconds = time.perf_counter() - start
    cache = Path(os.environ["HF_CIFAR_CACHE"])
    facts = {
        "images": len(train),
        "first_pass_seconds": round(seconds, 1),
        "disk_mb": round(sum(disk_bytes(path.stat()) for path in cache.iterdir()) / 1e6),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
    }
    plain = {
        f"plain, {NUM_WORKERS} workers": lambda: timed(plain_batches(folder)),
        f"timm, {NUM_WORKERS} workers": lambda: timed(timm_batches(folder)),
    }
    compare(
        f"photographs at {SIZE} px, to the model's input, from the second epoch on",
        {"ours": lambda: timed(our_batches(prepared)), **plain},
        rounds=rounds, **facts,
    )  # fmt: skip
    compare(
        f"photographs at {SIZE} px, to the device, from the second epoch on",
        {"ours": lambda: timed(delivered(prepared)), **plain},
        rounds=rounds,
    )
    compare(
        f"photographs at {SIZE} px, first pass",
        {"ours": lambda: first_pass(train), **plain},
        rounds=rounds,
    )


def training(folder: Path, turns: int) -> None:
    """Compare complete training from the second epoch on with the plain recipe, timm and ready tensors."""
    task = Task(MODEL, SIZE, 32, dataset_name=str(folder), images=str(folder))
    train = DataSource(DataConfig(dataset_name=str(folder))).splits.train
    prepare_split(train, VIEW, augmented=True, kind="disk")
    task = Task(**{**vars(task), "setting": chosen_setting(task)})
    peers = ("ours", "ceiling", f"plain, bf16 and {NUM_WORKERS} workers", "timm")
    works = {peer: functools.partial(train_as, peer, task) for peer in peers}
    compare_in_turns(
        "training efficientnet_lite0 on photographs", works, task, turns, setting=str(task.setting)
    )


def seconds_to_first_step(folder: Path, output: Path) -> tuple[float, float]:
    """Return the seconds from the command to its first training step, and the peak memory in MB."""
    command = [
        sys.executable, "scripts/finetune.py", "--dataset_name", str(folder),
        "--model_name_or_path", MODEL, "--image_size", str(SIZE), "--max_steps", "2",
        "--logging_steps", "1", "--eval_strategy", "no", "--save_strategy", "no",
        "--output_dir", str(output),
    ]  # fmt: skip
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 1/"):
            break
    seconds = time.perf_counter() - start
    peak = _peak_mb(process.pid)
    process.kill()
    process.wait()
    return seconds, peak


def _peak_mb(pid: int) -> float:
    """Return the peak of a process's resident memory in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1e3
    return float("nan")


def start(folder: Path, rounds: int, label: str) -> None:
    """Measure the seconds from the command to the first step: first run, and a later one."""
    peaks: list[float] = []

    def run() -> float:
        with tempfile.TemporaryDirectory() as output:
            seconds, peak = seconds_to_first_step(folder, Path(output, "run"))
        peaks.append(peak)
        return seconds

    def first() -> float:
        with empty_cache():
            return run()

    later: dict[str, Callable[[], float]] = {"first run": first, "later run": run}
    compare(f"seconds to the first step, {label}", later, "s", rounds)
    print(f"peak memory at the first step: {max(peaks):,.0f} MB")


def main() -> None:
    """Measure the data side, training, the start, and how the start grows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("data", "training", "start", "growth"))
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--folder", type=Path, help="default: generated photographs")
    options = parser.parse_args()
    keep_freed_memory()
    CONTEXT.set_forkserver_preload(["benchmarks.peers"])
    parts = [options.only] if options.only else ["data", "training", "start"]
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["HF_CIFAR_CACHE"] = str(Path(scratch, "pixels"))
        folder = options.folder or write_photographs(
            Path(scratch, "photos"), options.images, options.classes
        )
        if "data" in parts:
            data_side(folder, options.rounds)
        if "training" in parts:
            training(folder, options.turns)
        label = f"{options.images:,} photographs, {options.classes:,} classes"
        if "start" in parts:
            start(folder, options.rounds, label)
        if "growth" in parts:
            for images, classes in ((5_000, 10), (20_000, 100), (80_000, 1_000)):
                grown = write_photographs(Path(scratch, f"{images}"), images, classes, 150, 200)
                start(grown, 1, f"{images:,} small photographs, {classes:,} classes")


if __name__ == "__main__":
    main()

"""Training speed: ours, the ceiling, the plain recipe with and without its best flags, timm's loop.

python -m benchmarks.training [--only resnet50] [--turns 15] [--dataset_name DATA]

Each is a separate process, and they train in turns of a second or two, so that noise affects all equally.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.measure import compare
from benchmarks.peers import WARM_UP, Task, chosen_setting, image_folder, small_pictures, train_as
from benchmarks.turns import CONTEXT, Turn, Worker, workers

ON_CPU = {
    "resnet50": Task("scratch/resnet50", 128, 16),
    "vit_tiny": Task("scratch/vit_tiny_patch16_224", 128, 32),
    "efficientnet_lite0": Task("scratch/tf_efficientnet_lite0", 96, 32),
    "article_cnn": Task("scratch/article_cnn", 32, 64),
}
ON_GPU = {
    "resnet50": Task("scratch/resnet50", 224, 128),
    "vit_base": Task("scratch/vit_base_patch16_224", 224, 128),
    "efficientnet_lite0": Task("scratch/tf_efficientnet_lite0", 224, 128),
    "article_cnn": Task("scratch/article_cnn", 32, 64),
}
TURN_SECONDS = 1.5
MEMORY_FOR_128 = 70e9  # bytes that all peers together need at 128 images a step, ViT-B/16 at 224 px


def names() -> list[str]:
    """Return the names of the peers, ours first."""
    on_gpu = torch.cuda.is_available()
    ceilings = ["ceiling"] if on_gpu else ["ceiling", "ceiling, memory given back"]
    best = [f"plain, bf16 and {count} workers" for count in ((4, 16) if on_gpu else (2,))]
    return ["ours", *ceilings, "plain", *best, "timm"]


def tasks(only: str | None) -> dict[str, Task]:
    """Return the tasks for this device, or the named one; with smaller batches on a smaller GPU."""
    found = ON_CPU
    if torch.cuda.is_available():
        share = torch.cuda.get_device_properties(0).total_memory / MEMORY_FOR_128
        part = 2 ** min(0, math.floor(math.log2(share)))
        found = {
            name: dataclasses.replace(task, batch_size=max(8, int(task.batch_size * part)))
            for name, task in ON_GPU.items()
        }
    return {name: task for name, task in found.items() if only in (None, name)}


def compare_in_turns(
    benchmark: str,
    works: dict[str, Callable[[Turn], None]],
    task: Task,
    turns: int,
    folder: Path | None = None,
    **facts: object,
) -> dict[str, list[float]]:
    """Train all peers in turns. Returns images/s by name; records peak memory too."""
    peak_mb: dict[str, int] = {}
    facts = {
        "model": task.model, "image_size": task.image_size, "batch_size": task.batch_size,
        "turn_seconds": TURN_SECONDS, "peak_mb": peak_mb, **facts,
    }  # fmt: skip

    def turn(name: str, worker: Worker) -> float:
        speed = task.batch_size * worker.turn()
        peak_mb[name] = round(worker.peak_mb)
        return speed

    with workers(works, WARM_UP, TURN_SECONDS) as started:
        runs = {name: functools.partial(turn, name, each) for name, each in started.items()}
        return compare(benchmark, runs, rounds=turns, folder=folder, **facts)


def main() -> None:
    """Compare on every task, or the named one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--dataset_name", help="default: 4,000 generated PNG images of 32 x 32 px")
    options = parser.parse_args()
    CONTEXT.set_forkserver_preload(["benchmarks.peers"])
    with tempfile.TemporaryDirectory() as folder:
        data = options.dataset_name or str(small_pictures(Path(folder, "data")))
        images = str(image_folder(data, Path(folder, "images")))
        for name, task in tasks(options.only).items():
            task = dataclasses.replace(task, dataset_name=data, images=images)
            task = dataclasses.replace(task, setting=chosen_setting(task))
            works = {peer: functools.partial(train_as, peer, task) for peer in names()}
            facts = {
                "setting": str(task.setting),
                "dataset_name": Path(options.dataset_name or "small_pictures").name,
            }
            compare_in_turns(f"training {name}", works, task, options.turns, **facts)


if __name__ == "__main__":
    main()

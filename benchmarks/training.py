"""Training speed: ours, the ceiling, the plain recipe with and without its best flags, timm's pattern.

python -m benchmarks.training [--only resnet50] [--rounds 3] [--dataset_name DATA]
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

import torch

from benchmarks.measure import compare
from benchmarks.peers import (
    Task,
    ceiling,
    image_folder,
    ours,
    plain,
    small_pictures,
    timm_pattern,
)

ON_CPU = {
    "resnet50": Task("scratch/resnet50", 128, 32, 6),
    "vit_tiny": Task("scratch/vit_tiny_patch16_224", 128, 32, 10),
    "efficientnet_lite0": Task("scratch/tf_efficientnet_lite0", 96, 32, 12),
    "article_cnn": Task("scratch/article_cnn", 32, 64, 60),
}
ON_GPU = {
    "resnet50": Task("scratch/resnet50", 224, 128, 60),
    "vit_base": Task("scratch/vit_base_patch16_224", 224, 128, 40),
    "article_cnn": Task("scratch/article_cnn", 32, 64, 400),
}


def variants(task: Task, images: Path) -> tuple[dict, str]:
    """What is compared, ours first, and the setting that ours picked."""
    run, setting = ours(task)
    gpu = torch.cuda.is_available()
    best = {"bf16": True, "use_cpu": not gpu}
    runs = {"ours": run, "ceiling": ceiling(task, setting), "plain": plain(task)}
    for workers in (4, 16) if gpu else (2,):
        name = f"plain, bf16 and {workers} workers"
        runs[name] = plain(task, dataloader_num_workers=workers, **best)
    return {**runs, "timm": timm_pattern(task, image_folder(task, images))}, setting


def main() -> None:
    """Compare on every task, or the named one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dataset_name", help="default: 4,000 PNG images of 32 x 32 px, made here")
    options = parser.parse_args()
    for name, task in (ON_GPU if torch.cuda.is_available() else ON_CPU).items():
        if options.only not in (None, name):
            continue
        with tempfile.TemporaryDirectory() as folder:
            data = options.dataset_name or str(small_pictures(Path(folder, "data")))
            task = dataclasses.replace(task, dataset_name=data)
            runs, setting = variants(task, Path(folder, "images"))
            facts = {**vars(task), "dataset_name": options.dataset_name or "small_pictures"}
            compare(f"training {name}", runs, rounds=options.rounds, setting=setting, **facts)


if __name__ == "__main__":
    main()

"""Prediction of a data set by two processes that share the folder, and by one; a core and a thread each.

python -m benchmarks.batch_prediction [--rounds 3]
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.evaluation import IMAGE_SIZE, MODEL, run_on_files
from benchmarks.measure import compare
from benchmarks.peers import small_pictures
from hf_cifar.config.deployment import BatchPredictionConfig, PredictConfig
from hf_cifar.deploy.batch_prediction import predict_dataset

NUM_IMAGES = 16_000
# Forked from a process that has imported everything and computed nothing.
CONTEXT = multiprocessing.get_context("forkserver")


def predict_on_core(core: int, run: str, images: str, output: str) -> None:
    """Predict into a folder on one core, with one thread."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    config = PredictConfig(model_name_or_path=run, use_cpu=True)
    predict_dataset(config, BatchPredictionConfig(images, output=output))


def images_per_second(num_processes: int, run: str, images: str, num_images: int) -> float:
    """Return the images per second of some processes together, with the loading of model and list of files,
    without imports."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        pool = stack.enter_context(CONTEXT.Pool(num_processes))
        pool.map(abs, range(num_processes), 1)  # started
        cores = sorted(os.sched_getaffinity(0))[:num_processes]
        work = [(core, run, images, str(Path(folder, "out"))) for core in cores]
        start = time.perf_counter()
        pool.starmap(predict_on_core, work, 1)
        seconds = time.perf_counter() - start
    return num_images / seconds


def compare_processes(
    run: str, images: str, num_images: int, *, rounds: int = 3, folder: Path | None = None
) -> dict[str, list[float]]:
    """Compare two processes with one, see `measure.compare`."""
    variants = {
        f"{count} process{'es' * (count > 1)}": partial(
            images_per_second, count, run, images, num_images
        )
        for count in (2, 1)
    }
    return compare(
        "batch prediction", variants, rounds=rounds, folder=folder, num_images=num_images
    )


def main() -> None:
    """Compare on small generated pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    CONTEXT.set_forkserver_preload(["benchmarks.batch_prediction"])
    with tempfile.TemporaryDirectory() as folder:
        pictures = str(small_pictures(Path(folder, "data"), NUM_IMAGES))
        run, images, count = run_on_files(pictures, MODEL, IMAGE_SIZE, 80, Path(folder))
        compare_processes(run, images, count, rounds=options.rounds)


if __name__ == "__main__":
    main()

"""Prediction speed: ours, `pipeline("image-classification")` with the same labels, and the network alone.

python -m benchmarks.evaluation [--rounds 3]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForImageClassification, pipeline

from benchmarks.measure import compare, conditions, summary, write
from benchmarks.peers import small_pictures
from benchmarks.turns import CONTEXT
from hf_cifar import PredictConfig, RunConfig, finetune_classifier, predict_files
from hf_cifar.data.images import list_images
from hf_cifar.data.splits import load_splits
from hf_cifar.models.folding import fold_norms
from hf_cifar.options import DataConfig
from hf_cifar.predict import each_on_its_cores
from hf_cifar.process import keep_freed_memory

MODEL, NUM_IMAGES, IMAGE_SIZE = "scratch/tf_efficientnet_lite0", 4000, 96
BATCH_SIZES = (8, 16, 64)

Found = tuple[float, list[str]]  # images/s, labels


def ours(model: str, images: str) -> Found:
    """The package at its defaults, on a folder, model loaded; modules were imported for one image before."""
    config = PredictConfig(model_name_or_path=model)
    list(predict_files(config, [str(list_images(Path(images))[0])]))
    start = time.perf_counter()
    records = list(predict_files(config, [images]))
    return len(records) / (time.perf_counter() - start), [record["label"] for record in records]


def theirs(batch_size: int, model: str, images: str) -> Found:
    """transformers' pipeline on the same files, as ours."""
    files = [str(path) for path in list_images(Path(images))]
    pipeline("image-classification", model=model)(files[0])
    start = time.perf_counter()
    classify = pipeline("image-classification", model=model)
    with torch.inference_mode():
        results = classify(files, batch_size=batch_size, top_k=5)
    seconds = time.perf_counter() - start
    return len(files) / seconds, [result[0]["label"] for result in results]


def alone(model: str, images: str) -> Found:
    """Ready tensors through the loaded network, as ours computes: what no predictor can exceed."""
    keep_freed_memory()
    layout = torch.channels_last
    network = AutoModelForImageClassification.from_pretrained(model).eval()
    size = PredictConfig.batch_size
    pixel_values = torch.randn(size, 3, IMAGE_SIZE, IMAGE_SIZE).contiguous(memory_format=layout)
    network = fold_norms(network, pixel_values).to(memory_format=layout)

    def compute(pixel_values: torch.Tensor) -> None:
        with torch.inference_mode():
            network(pixel_values=pixel_values)

    def computed(num_batches: int) -> int:
        work = each_on_its_cores(compute, [pixel_values] * num_batches, torch.get_num_threads())
        return size * len(list(work))

    computed(torch.get_num_threads())
    start = time.perf_counter()
    num_images = computed(NUM_IMAGES // size)
    return num_images / (time.perf_counter() - start), []


def main() -> None:
    """Classify the same PNG files with the same saved model, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    CONTEXT.set_forkserver_preload(["benchmarks.evaluation"])
    with tempfile.TemporaryDirectory() as folder:
        data = DataConfig(dataset_name=str(small_pictures(Path(folder, "data"), NUM_IMAGES)))
        split = load_splits(data).train
        images, saved = Path(folder, "images"), Path(folder, "run")
        images.mkdir()
        for row, cell in enumerate(split.rows["image"]):
            (images / f"{row:05}.png").write_bytes(cell["bytes"])
        # Trained a little: labels that are all the same would agree with anything.
        flags = [
            "--dataset_name", data.dataset_name, "--model_name_or_path", MODEL,
            "--image_size", str(IMAGE_SIZE), "--output_dir", str(saved),
            "--max_steps", "80", "--eval_strategy", "no",
        ]  # fmt: skip
        finetune_classifier(RunConfig.parse(flags))
        labels: dict[str, list[str]] = {}

        def timed(name: str, work: Callable[..., Found], *more: int) -> Callable[[], float]:
            def run() -> float:
                with CONTEXT.Pool(1) as process:
                    speed, labels[name] = process.apply(work, (*more, str(saved), str(images)))
                return speed

            return run

        peers = {f"pipeline, {n} at a time": (theirs, n) for n in BATCH_SIZES}
        peers = {"ours": (ours,), "the network alone": (alone,), **peers}
        runs = {name: timed(name, *work) for name, work in peers.items()}
        num_images = len(split)
        compare("prediction efficientnet_lite0", runs, rounds=options.rounds, num_images=num_images)
        same = {
            name: sum(a == b for a, b in zip(labels["ours"], found, strict=True)) / num_images
            for name, found in labels.items()
            if name.startswith("pipeline")
        }
        record = {
            "benchmark": "prediction efficientnet_lite0, the same label as ours", "unit": "of images",
            "n": 1, "num_images": num_images, "num_distinct": len(set(labels["ours"])),
            "figures": {name: summary([share]) for name, share in same.items()}, "ratios": {},
            **conditions(),
        }  # fmt: skip
        write(record)
        print(f"same label as ours: {same}, {record['num_distinct']} distinct ones")


if __name__ == "__main__":
    main()

"""Prediction speed: ours against `pipeline("image-classification")`, with the same labels.

python -m benchmarks.evaluation [--rounds 3]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from transformers import pipeline

from benchmarks.measure import compare
from benchmarks.peers import small_pictures
from hf_cifar import ModelConfig, PredictConfig, build_model, predict_files
from hf_cifar.data.images import list_images
from hf_cifar.data.splits import load_splits
from hf_cifar.options import DataConfig

NUM_IMAGES = 1500
BATCH_SIZES = (1, 16, 64)


def main() -> None:
    """Classify the same PNG files with the same saved model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = DataConfig(dataset_name=str(small_pictures(Path(folder, "data"), NUM_IMAGES)))
        split = load_splits(data).train
        images = Path(folder, "images")
        images.mkdir()
        for row, cell in enumerate(split.rows["image"]):
            (images / f"{row:05}.png").write_bytes(cell["bytes"])
        model, processor = build_model(
            ModelConfig(model_name_or_path="scratch/tf_efficientnet_lite0", image_size=96),
            split.id2label,
        )
        saved = Path(folder, "model")
        model.save_pretrained(saved)
        processor.save_pretrained(saved)
        files = [str(path) for path in list_images(images)]
        labels: dict[str, list[str]] = {}

        def ours() -> float:
            config = PredictConfig(model_name_or_path=str(saved))
            start = time.perf_counter()
            labels["ours"] = [record["label"] for record in predict_files(config, [str(images)])]
            return len(files) / (time.perf_counter() - start)

        def theirs(batch_size: int):
            def run() -> float:
                start = time.perf_counter()
                classify = pipeline("image-classification", model=str(saved))
                with torch.inference_mode():
                    results = classify(files, batch_size=batch_size, top_k=5)
                labels["pipeline"] = [result[0]["label"] for result in results]
                return len(files) / (time.perf_counter() - start)

            return run

        runs = {"ours": ours, **{f"pipeline, {n} at a time": theirs(n) for n in BATCH_SIZES}}
        compare("prediction efficientnet_lite0", runs, rounds=options.rounds, num_images=len(files))
        same = sum(a == b for a, b in zip(labels["ours"], labels["pipeline"], strict=True))
        print(f"the same label for {same} of {len(files)} images")


if __name__ == "__main__":
    main()

"""Measure the mistakes of the tutorials, each next to the correct procedure, on the same images.

python -m benchmarks.tutorials --dataset_name DATA [--only cached] [--seeds 3]
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets, disable_progress_bars
from PIL import Image

from benchmarks.measure import conditions, summary, write
from hf_cifar import DataConfig, ModelConfig, RunConfig, build_model, finetune_classifier
from hf_cifar.data.images import decode_cell
from hf_cifar.data.sources import load_source
from hf_cifar.evaluation.predictions import Predictions
from hf_cifar.logs import quieten
from hf_cifar.transforms.resampling import resample
from hf_cifar.transforms.views import RandomView

DRAWS = 1000
CROP = {"crop_padding": 0.125, "flip": 0.5}
STILL = {"crop_padding": 0.0, "flip": 0.0}


class Laboratory:
    """Trains on parts of one data set, in a temporary folder."""

    def __init__(self, dataset_name: str, num_images: int, folder: Path) -> None:
        source = load_source(DataConfig(dataset_name=dataset_name))
        shuffled = {name: source[name].shuffle(seed=0) for name in ("train", "test")}
        self.train = shuffled["train"].select(range(num_images))
        self.test = shuffled["test"].select(range(num_images))
        self.fresh = shuffled["test"].select(range(num_images, len(shuffled["test"])))
        self.folder = folder
        self.count = 0

    def predictions(
        self, train: Dataset, test: Dataset, seed: int = 42, **options: object
    ) -> Predictions:
        """Return the predictions on one data set by a model trained on the other."""
        self.count += 1
        data, run = self.folder / f"data-{self.count}", self.folder / f"run-{self.count}"
        DatasetDict(train=train, test=test).save_to_disk(str(data))
        chosen = {
            "dataset_name": data, "output_dir": run, "seed": seed, "do_predict": "true",
            "model_name_or_path": "scratch/article_cnn", "num_train_epochs": 15, "precision": "fp32",
            "learning_rate": 1e-3, "per_device_train_batch_size": 64, **STILL,
            "save_strategy": "no", "load_best_model_at_end": "false", "calibrate": "false",
            "disable_tqdm": "true", **options,
        }  # fmt: skip
        tokens = [f"--{name}={value}" for name, value in chosen.items()]
        finetune_classifier(RunConfig.parse(tokens))
        return Predictions.load(run, "test")

    def accuracy(self, *args: object, **options: object) -> float:
        """Return the accuracy of such a model."""
        return float(self.predictions(*args, **options).correct.mean())


def trained_on_test(lab: Laboratory, seed: int) -> dict[str, float]:
    """Train and report on the same images; compare with the model's accuracy on unseen images."""
    both = concatenate_datasets([lab.test, lab.fresh])
    right = lab.predictions(lab.test, both, seed).correct
    return {
        "reported: the images it was trained on": float(right[: len(lab.test)].mean()),
        "true: unseen images": float(right[len(lab.test) :].mean()),
    }


def tuned_on_test(lab: Laboratory, seed: int, num_runs: int = 10) -> dict[str, float]:
    """Pick the best of ten runs by one in 25 test images; compare its accuracy on these and on all others."""
    small = lab.train.select(range(len(lab.train) // 5))
    right = np.stack(
        [
            lab.predictions(
                small, lab.test, 100 * seed + run, num_train_epochs=5,
                model_name_or_path="scratch/article_mlp",
            ).correct
            for run in range(num_runs)
        ]
    )  # fmt: skip
    generator = np.random.default_rng(seed)
    found = np.empty((DRAWS, 2))
    for draw in found:
        few = generator.choice(right.shape[1], right.shape[1] // 25, replace=False)
        rest = np.setdiff1d(np.arange(right.shape[1]), few)
        best = right[:, few].mean(axis=1).argmax()
        draw[:] = right[best, few].mean(), right[best, rest].mean()
    reported, truth = found.mean(axis=0).tolist()
    return {"reported: on the images that chose it": reported, "true: on all others": truth}


def cached_augmentation(lab: Laboratory, seed: int) -> dict[str, float]:
    """Compare one random view for all epochs, a new one in each, and none."""
    view, generator = RandomView(padding=0.125, flip=0.5), torch.Generator().manual_seed(seed)

    def freeze(row: dict) -> dict:
        pixels = torch.tensor(decode_cell(row["image"])).permute(2, 0, 1)[None]
        size = tuple(pixels.shape[2:])
        boxes, _ = view.draw(1, *size, size, generator)
        shown = resample(pixels, boxes, size)[0].round().to(torch.uint8)
        file = io.BytesIO()
        Image.fromarray(shown.permute(1, 2, 0).numpy()).save(file, "PNG")
        return {"image": {"bytes": file.getvalue(), "path": None}}

    cached = lab.train.map(freeze, keep_in_memory=True)
    return {
        "cached: one view for all epochs": lab.accuracy(cached, lab.test, seed),
        "a new view each time": lab.accuracy(lab.train, lab.test, seed, **CROP),
        "no augmentation": lab.accuracy(lab.train, lab.test, seed),
    }


def idle_crop(lab: Laboratory, seed: int) -> dict[str, float]:
    """Compare a crop of 32 x 32 out of 32 x 32, which has no effect, with one after adding a border."""
    return {
        "crop without a border": lab.accuracy(lab.train, lab.test, seed),
        "crop after a border of 4 px": lab.accuracy(lab.train, lab.test, seed, crop_padding=0.125),
    }


def wrong_preprocessing(lab: Laboratory, seed: int) -> dict[str, float]:
    """Compare a frozen ImageNet network on pixels / 255 at 32 px, on its own preprocessing, and upscaled."""
    head = {"freeze": "backbone", "head_solver": "lbfgs"}
    model = "bundled/efficientnet_lite0"
    raw = lab.folder / f"raw-{seed}"
    names = dict(enumerate(lab.train.features["label"].names))
    classifier = build_model(ModelConfig(model_name_or_path=model), names)
    classifier.model.save_pretrained(raw)
    classifier.image_processor.save_pretrained(raw)
    settings = json.loads((raw / "config.json").read_text())
    settings["pretrained_cfg"] |= {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
    (raw / "config.json").write_text(json.dumps(settings))

    def accuracy(name: str, size: int) -> float:
        return lab.accuracy(
            lab.train, lab.test, seed, model_name_or_path=name, image_size=size, **head
        )

    return {
        "32 px, pixels / 255": accuracy(str(raw), 32),
        "32 px, the checkpoint's own preprocessing": accuracy(model, 32),
        "upscaled to 96 px": accuracy(model, 96),
    }


MISTAKES: dict[str, Callable[[Laboratory, int], dict[str, float]]] = {
    "trained on test": trained_on_test,
    "tuned on test": tuned_on_test,
    "cached augmentation": cached_augmentation,
    "idle crop": idle_crop,
    "wrong preprocessing": wrong_preprocessing,
}
# Its head is solved exactly, so one seed is enough.
WITHOUT_CHANCE = ("wrong preprocessing",)


def main() -> None:
    """Measure every mistake, or the named one, once for each seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10")
    parser.add_argument("--only", help="a word in the mistake's name")
    parser.add_argument("--num_images", type=int, default=5000, help="to train on, and to test on")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    quieten(main_process=False)
    disable_progress_bars()
    for name, mistake in MISTAKES.items():
        if options.only is not None and options.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            lab = Laboratory(options.dataset_name, options.num_images, Path(folder))
            seeds = 1 if name in WITHOUT_CHANCE else options.seeds
            runs = [mistake(lab, seed) for seed in range(seeds)]
        measured = {variant: summary([run[variant] for run in runs]) for variant in runs[0]}
        for variant, values in measured.items():
            print(f"{name}: {variant}: {values['median']:.4f}", flush=True)
        write(
            {
                "benchmark": name, "unit": "accuracy", "n": seeds,
                "num_images": options.num_images, "figures": measured, "ratios": {}, **conditions(),
            }
        )  # fmt: skip


if __name__ == "__main__":
    main()

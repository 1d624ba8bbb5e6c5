"""What --reject keeps and rejects: CIFAR-10's test images, digits, noise and photographs.

A model answers with a label, or that an image is of none of its classes. Three rules keep the same share of
validation images: a threshold on confidence alone, one on distance alone, and both, as in the model. Runs
that are given are copied; models are trained here, each seed on its own split.

The photographs are tiles of pictures that scikit-learn and scikit-image ship, and that show none of the ten
classes. There are few pictures, so the interval of their share resamples pictures, not tiles.

python -m benchmarks.reject --dataset_name DATA [--runs NAME=RUN ...] [--models article_cnn] [--seeds 3]
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import skimage
import sklearn
from datasets import disable_progress_bars
from PIL import Image
from sklearn.datasets import load_digits

from benchmarks.measure import conditions, summary, write
from benchmarks.techniques import ALL, MODELS, SHARED
from hf_cifar import RunConfig, evaluate_saved, finetune_classifier
from hf_cifar.config.data import DataConfig
from hf_cifar.config.deployment import PredictConfig
from hf_cifar.config.evaluation import EvaluateConfig
from hf_cifar.data.splits import DataSource
from hf_cifar.data.stratify import subsample
from hf_cifar.evaluation.intervals import mean_interval, wilson
from hf_cifar.evaluation.predictions import Predictions
from hf_cifar.logs import quieten
from hf_cifar.models.rejection import Rejection
from hf_cifar.predict import Predictor
from hf_cifar.runs.folder import RunFolder

KEEP = 0.95
TEST_IMAGES, NOISE_IMAGES, DIGITS = 2500, 500, 900
SIDE = 32  # of noise, in pixels, as CIFAR-10's
TILE, MOST_TILES = 96, 40  # of a picture
# Pictures of textures, places, things and instruments; none with an animal or a vehicle of CIFAR-10.
PICTURES = {
    sklearn: ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
    skimage: (
        "data/astronaut.png", "data/brick.png", "data/camera.png", "data/cell.png", "data/clock_motion.png",
        "data/coffee.png", "data/coins.png", "data/grass.png", "data/gravel.png",
        "data/hubble_deep_field.jpg", "data/ihc.png", "data/moon.png", "data/page.png", "data/retina.jpg",
    ),
}  # fmt: skip
Images = Sequence[np.ndarray]


def noise(seed: int = 0) -> dict[str, Images]:
    """Return uniform and Gaussian noise images."""
    generator, shape = np.random.default_rng(seed), (NOISE_IMAGES, SIDE, SIDE, 3)
    gaussian = generator.normal(128, 64, shape).clip(0, 255).round().astype(np.uint8)
    uniform = generator.integers(0, 256, shape, dtype=np.uint8)
    return {"uniform noise": list(uniform), "Gaussian noise": list(gaussian)}


def digits() -> Images:
    """Return handwritten digits, unchanged, of 8 x 8 pixels. The model's own preprocessing enlarges them;
    digits that are first enlarged without smoothing are easier to reject."""
    pixels = (load_digits().images[:DIGITS] * (255 / 16)).round().astype(np.uint8)
    return [np.repeat(each[..., None], 3, 2) for each in pixels]


def photographs() -> dict[str, Images]:
    """Return tiles of each picture, by its name."""
    found = {}
    for package, names in PICTURES.items():
        for name in names:
            path = Path(package.__file__).parent / name
            pixels = np.asarray(Image.open(path).convert("RGB"))
            height, width, _ = pixels.shape
            tiles = [
                pixels[top : top + TILE, left : left + TILE]
                for top in range(0, height - TILE + 1, TILE)
                for left in range(0, width - TILE + 1, TILE)
            ]
            order = np.random.default_rng(0).permutation(len(tiles))[:MOST_TILES]
            found[path.stem] = [tiles[number] for number in order]
    return found


class Judge:
    """The confidence and distance that a model gives to images, and three rules that reject them."""

    def __init__(self, run: Path) -> None:
        self.predictor = Predictor(PredictConfig(str(run)))
        assert self.predictor.rejection is not None
        self.both = self.predictor.rejection
        validation, keep = Predictions.load(run, "validation"), self.both.keep
        assert validation.distances is not None
        lowest = float(np.quantile(validation.confidences, 1 - keep, method="lower"))
        largest = float(np.quantile(validation.distances, keep, method="higher"))
        self.rules: dict[str, Rejection] = {
            "confidence alone": replace(self.both, min_confidence=lowest, max_distance=np.inf),
            "distance alone": replace(self.both, min_confidence=0.0, max_distance=largest),
            "both": self.both,
        }

    def scores(self, images: Images) -> np.ndarray:
        """Return the scores and the distance of each image, [N, K + 1]."""
        parts = [
            self.predictor.scores(images[start : start + 50]).numpy()
            for start in range(0, len(images), 50)
        ]
        return np.concatenate(parts)

    def rejected(self, scores: np.ndarray) -> dict[str, np.ndarray]:
        """Return by rule whether each image is rejected."""
        confidences, distances = scores[:, :-1].max(axis=1), scores[:, -1]
        return {name: rule.rejects(confidences, distances) for name, rule in self.rules.items()}


def share(found: np.ndarray) -> dict[str, object]:
    """Return a share of images with its 95% interval (Wilson) and their number."""
    interval = wilson(found.sum(), len(found)).round(4).tolist()
    return {"share": round(float(found.mean()), 4), "interval": interval, "num_images": len(found)}


def share_over(pictures: Sequence[np.ndarray]) -> dict[str, object]:
    """Return the mean share over pictures, with its 95% interval from 2,000 resamples of the pictures."""
    means = np.array([each.mean() for each in pictures])
    drawn = np.random.default_rng(0).choice(means, (2000, len(means))).mean(axis=1)
    interval = np.quantile(drawn, [0.025, 0.975]).round(4).tolist()
    return {
        "share": round(float(means.mean()), 4), "interval": interval, "num_pictures": len(means),
        "num_images": sum(map(len, pictures)),
    }  # fmt: skip


def judge(run: Path, data: DataConfig) -> dict[str, dict[str, dict[str, object]]]:
    """Return what each rule keeps of a run's test images, and rejects of other images."""
    judged = Judge(run)
    test = subsample(DataSource(data).test_split, TEST_IMAGES, seed=0)
    assert test.id2label == judged.predictor.model.config.id2label
    scores = judged.scores([test.decode(row) for row in range(len(test))])
    right = scores[:, :-1].argmax(axis=1) == test.labels
    rejected = judged.rejected(scores)
    others = {
        name: judged.rejected(judged.scores(images))
        for name, images in {"digits": digits(), **noise()}.items()
    }
    tiles = {name: judged.rejected(judged.scores(images)) for name, images in photographs().items()}
    return {
        rule: {
            "test images kept": share(~rejected[rule]),
            "right answers kept": share(~rejected[rule][right]),
            "wrong answers rejected": share(rejected[rule][~right]),
            **{f"{name} rejected": share(found[rule]) for name, found in others.items()},
            "photographs rejected": share_over([found[rule] for found in tiles.values()]),
            "by picture": {
                name: round(float(found[rule].mean()), 3) for name, found in tiles.items()
            },
        }
        for rule in judged.rules
    }


def given_run(run: str, folder: Path) -> Path:
    """Copy a run, and fit its thresholds unless it has them."""
    copied = folder / Path(run).resolve().name
    shutil.copytree(run, copied, ignore=shutil.ignore_patterns("checkpoint-*"))
    settings = RunFolder(copied)
    if settings.model_config().get("reject", {}).get("keep") != KEEP:
        evaluate_saved(EvaluateConfig(str(copied), reject=KEEP), settings.data())
    return copied


def trained_run(model: str, dataset_name: str, seed: int, folder: Path) -> Path:
    """Train a model with --reject, on its own split."""
    run = folder / f"{model}-{seed}".replace(", ", "-").replace(" ", "-")
    chosen = {
        **SHARED, "max_train_samples": 10_000, **MODELS[model], "do_predict": "false", "calibrate": "true",
        "reject": KEEP, "seed": seed, "split_seed": seed, "dataset_name": dataset_name, "output_dir": run,
    }  # fmt: skip
    finetune_classifier(RunConfig.parse([f"--{name}={value}" for name, value in chosen.items()]))
    return run


def compare(name: str, runs: Sequence[Path], output: Path | None = None) -> None:
    """Record what each rule keeps and rejects with each run, and the mean share with its interval."""
    found = [judge(run, RunFolder(run).data()) for run in runs]
    figures, intervals = {}, {}
    for rule, first in found[0].items():
        for kind in first:
            if kind == "by picture":
                continue
            cells = [each[rule][kind] for each in found]
            shares = [float(str(cell["share"])) for cell in cells]
            figures[f"{rule}: {kind}"] = summary(shares)
            several = mean_interval(shares).clip(0, 1).round(4).tolist() if len(runs) > 1 else None
            intervals[f"{rule}: {kind}"] = several or cells[0]["interval"]
    record = {
        "benchmark": f"reject, {name}", "unit": "share of images", "n": len(runs), "keep": KEEP,
        "figures": figures, "intervals": intervals, "ratios": {}, "runs": found,
        "accuracy": [RunFolder(run).metrics()["validation"]["accuracy"] for run in runs],
        **conditions(),
    }  # fmt: skip
    write(record, output)
    for kind, values in figures.items():
        print(f"{name}: {kind} {values['median']:.4f} {intervals[kind]}", flush=True)


def main() -> None:
    """Measure the given runs, one by one, and several runs of each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--runs", nargs="+", default=[], help="NAME=FOLDER")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=[ALL])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="folder for the JSON lines")
    options = parser.parse_args()
    disable_progress_bars()
    quieten(True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for each in options.runs:
            name, _, run = each.rpartition("=")
            compare(name or Path(run).name, [given_run(run, folder)], options.output)
        for model in options.models:
            runs = [
                trained_run(model, options.dataset_name, seed, folder)
                for seed in range(options.seeds)
            ]
            compare(model, runs, options.output)


if __name__ == "__main__":
    main()

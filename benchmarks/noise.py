"""The effect of --clean_labels with 20% wrong labels: paired runs on one split.

python -m benchmarks.noise --dataset_name DATA [--models article_cnn] [--seeds 3] [--max_train_samples 10000]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, disable_progress_bars

from benchmarks.measure import conditions, summary, write
from benchmarks.techniques import CNN, HEAD, MODELS, SHARED, accuracy, paired_differences
from hf_cifar import RunConfig, finetune_classifier
from hf_cifar.config.data import DataConfig
from hf_cifar.data.splits import DataSource
from hf_cifar.evaluation.predictions import Predictions
from hf_cifar.logs import quieten
from hf_cifar.runs.folder import RunFolder

SHARE = 0.2  # of the labels that are wrong
# The epoch is chosen on validation, whose labels are as noisy as those of train.
OPTIONS = {
    **SHARED, "eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": "true",
    "save_total_limit": 1,
}  # fmt: skip
# A network from random weights is predicted by its own kind, so it has to be good.
MORE: dict[str, Mapping[str, object]] = {CNN: {"optim": "muon"}}
VARIANTS = ("clean labels", "noisy labels", "--clean_labels drop", "wrong labels known, left out")


def open_splits(dataset_name: str, max_train_samples: int | None) -> DatasetDict:
    """Load train, validation and test with columns image and label."""
    source = DataSource(DataConfig(dataset_name, max_train_samples=max_train_samples))
    splits = (source.splits.train, source.splits.validation, source.test_split)
    return DatasetDict({split.name: split.rows for split in splits})  # type: ignore[union-attr]


def with_noise(rows: Dataset, seed: tuple[int, ...]) -> tuple[Dataset, np.ndarray]:
    """Return the rows with `SHARE` of the labels replaced by another class at random, and their numbers."""
    generator, labels = np.random.default_rng(seed), np.array(rows["label"])
    feature = rows.features["label"]
    wrong = generator.choice(len(labels), round(SHARE * len(labels)), replace=False)
    moved = generator.integers(1, feature.num_classes, len(wrong))
    labels[wrong] = (labels[wrong] + moved) % feature.num_classes
    others = rows.remove_columns("label")
    return others.add_column("label", labels.tolist(), feature=feature), np.sort(wrong)


def versions(clean: DatasetDict, seed: int) -> tuple[dict[str, DatasetDict], np.ndarray]:
    """Return the data of each variant, test always clean, and the numbers of the wrong rows of train."""
    train, wrong = with_noise(clean["train"], (seed, 0))
    validation, _ = with_noise(clean["validation"], (seed, 1))
    noisy = DatasetDict({**clean, "train": train, "validation": validation})
    right = np.setdiff1d(np.arange(len(train)), wrong)
    known = DatasetDict({**noisy, "train": train.select(right)})
    return dict(zip(VARIANTS, (clean, noisy, noisy, known), strict=True)), wrong


def measure(
    data: DatasetDict, model: str, options: Mapping[str, object], seed: int
) -> tuple[float, dict[str, Any]]:
    """Return the test accuracy of a run, and its run.json."""
    with tempfile.TemporaryDirectory() as folder:
        chosen = {
            **OPTIONS,
            **MODELS[model],
            **MORE.get(model, {}),
            **options,
            "output_dir": folder + "/run",
            "seed": seed,
        }
        config = RunConfig.parse([f"--{name}={value}" for name, value in chosen.items()])
        finetune_classifier(config.with_options(dataset_name=data))
        run = Path(folder, "run")
        return accuracy(Predictions.load(run, "test")), RunFolder(run).facts()


def measure_seed(clean: DatasetDict, model: str, seed: int) -> dict[str, float]:
    """Return the test accuracy of all variants for a seed, and precision and recall of the doubted rows."""
    data, wrong = versions(clean, seed)
    found: dict[str, float] = {}
    for name in VARIANTS:
        options = {"clean_labels": "drop"} if "drop" in name else {}
        found[name], facts = measure(data[name], model, options, seed)
        if options:
            doubted = facts["doubted_rows"]["row_ids"]
            hits = len(np.intersect1d(doubted, wrong))
            found |= {"precision": hits / max(1, len(doubted)), "recall": hits / len(wrong)}
        print(f"{model}, seed {seed}: {name} {found[name]:.4f}", flush=True)
    return found


def recovered(values: Mapping[str, list[float]], name: str) -> float:
    """Return the share of the loss to noise that a variant recovers, of mean accuracies."""
    clean, noisy = (float(np.mean(values[each])) for each in VARIANTS[:2])
    return round((float(np.mean(values[name])) - noisy) / (clean - noisy), 3)


def compare(clean: DatasetDict, model: str, seeds: int, output: Path | None = None) -> None:
    """Run all variants with every seed, and record accuracies, the share recovered, precision and recall."""
    found = [measure_seed(clean, model, seed) for seed in range(seeds)]
    values = {name: [each[name] for each in found] for name in VARIANTS}
    differences = paired_differences(values, VARIANTS[1])
    write(
        {
            "benchmark": f"noisy labels, {model}", "unit": "accuracy", "n": seeds,
            "figures": {name: summary(each) for name, each in values.items()},
            "ratios": {}, "values": values,
            "differences": differences,
            "recovered": {name: recovered(values, name) for name in VARIANTS[2:]},
            "doubted": {name: [each[name] for each in found] for name in ("precision", "recall")},
            "train_images": len(clean["train"]), "wrong": SHARE,
            **conditions(),
        },
        output,
    )  # fmt: skip
    for name, gain in differences.items():
        print(f"{model}: {name}, over noisy labels {gain['mean']:+.4f} {gain['interval']}")
    for name in VARIANTS[2:]:
        print(f"{model}: {name} recovers {recovered(values, name):.0%} of the loss", flush=True)


def main() -> None:
    """Measure the chosen models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[CNN, HEAD])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max_train_samples", type=int)
    parser.add_argument("--output", type=Path, help="folder for the JSON lines")
    options = parser.parse_args()
    disable_progress_bars()
    quieten(True)
    clean = open_splits(options.dataset_name, options.max_train_samples)
    for model in options.models:
        compare(clean, model, options.seeds, options.output)


if __name__ == "__main__":
    main()

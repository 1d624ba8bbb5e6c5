"""What each technique is worth: paired runs on one split, with the difference from a run without it.

python -m benchmarks.techniques --dataset_name DATA [--only imbalance] [--models article_cnn] [--seeds 3]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from datasets import disable_progress_bars
from scipy.stats import t

from benchmarks.measure import conditions, summary, write
from hf_cifar import RunConfig, finetune_classifier
from hf_cifar.commands.command import quieten
from hf_cifar.evaluation.predictions import Predictions

# Options of each model: one trained from random weights, one a head on features that are computed once.
MODELS: dict[str, dict[str, object]] = {
    "article_cnn": {
        "model_name_or_path": "scratch/article_cnn", "num_train_epochs": 10,
        "per_device_train_batch_size": 64, "learning_rate": 1e-3, "precision": "fp32",
    },
    "efficientnet_lite0, head": {
        "model_name_or_path": "bundled/efficientnet_lite0", "freeze": "backbone", "image_size": 96,
        "num_train_epochs": 10, "precision": "fp32",
    },
}  # fmt: skip
SHARED = {
    "do_predict": "true", "save_strategy": "no", "load_best_model_at_end": "false",
    "eval_strategy": "no", "calibrate": "false", "disable_tqdm": "true", "use_cpu": "true",
}  # fmt: skip
Options = Mapping[str, object]


class Laboratory:
    """Trains on one data set, in a temporary folder; the split is the same in every run."""

    def __init__(self, dataset_name: str, folder: Path) -> None:
        self.dataset_name, self.folder, self.count = dataset_name, folder, 0

    def test(self, model: str, options: Options, seed: int) -> Predictions:
        """Return the predictions on test of a model trained with these options."""
        self.count += 1
        run = self.folder / f"run-{self.count}"
        chosen = {
            "dataset_name": self.dataset_name, "output_dir": run, "seed": seed,
            **SHARED, **MODELS[model], **options,
        }  # fmt: skip
        finetune_classifier(
            RunConfig.parse([f"--{name}={value}" for name, value in chosen.items()])
        )
        return Predictions.load(run, "test")


def accuracy(predictions: Predictions) -> float:
    return float(predictions.correct.mean())


def balanced_accuracy(predictions: Predictions) -> float:
    return float(predictions.metrics["balanced_accuracy"])


def paired_interval(differences: list[float]) -> list[float]:
    """Return the 95% interval of the mean of paired differences, by Student's t."""
    mean, error = np.mean(differences), np.std(differences, ddof=1) / len(differences) ** 0.5
    reach = t.ppf(0.975, len(differences) - 1) * error
    return [round(float(mean - reach), 4), round(float(mean + reach), 4)]


def compare(
    lab: Laboratory,
    name: str,
    variants: Mapping[str, Options],
    metric: Callable[[Predictions], float],
    models: list[str],
    seeds: int,
) -> None:
    """Run every variant with every seed, and record the metric and its difference from the first variant."""
    for model in models:
        values = {
            variant: [metric(lab.test(model, options, seed)) for seed in range(seeds)]
            for variant, options in variants.items()
        }
        first = next(iter(values))
        gains = {
            variant: [b - a for a, b in zip(values[first], each, strict=True)]
            for variant, each in values.items()
            if variant != first
        }
        record = {
            "benchmark": f"{name}, {model}", "unit": metric.__name__.replace("_", " "), "n": seeds,
            "figures": {variant: summary(each) for variant, each in values.items()},
            "ratios": {}, "values": values,
            "differences": {
                variant: {"mean": round(float(np.mean(each)), 4), "interval": paired_interval(each)}
                for variant, each in gains.items()
            },
            "options": {variant: dict(options) for variant, options in variants.items()},
            **conditions(),
        }  # fmt: skip
        write(record)
        for variant, each in values.items():
            gain = record["differences"].get(variant, "")
            print(f"{name}, {model}: {variant} {np.mean(each):.4f} {gain}", flush=True)


LONG_TAIL = {"imbalance_factor": 100}
BALANCES = ("oversample", "undersample", "weights", "effective", "logit_adjustment")
TECHNIQUES: dict[str, tuple[Mapping[str, Options], Callable[[Predictions], float]]] = {
    "imbalance": (
        {
            "cross-entropy": LONG_TAIL,
            **{kind: {**LONG_TAIL, "class_balance": kind} for kind in BALANCES},
            "focal": {**LONG_TAIL, "loss": "focal"},
        },
        balanced_accuracy,
    ),
    "schedule": (
        {
            "linear": {},
            **{
                kind: {"lr_scheduler_type": kind}
                for kind in (
                    "constant", "cosine", "exponential", "step", "multistep", "inverse_time",
                    "one_cycle",
                )
            },
            "reduce_lr_on_plateau": {
                "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch",
                "lr_scheduler_kwargs": '{"patience": 1}',
            },
        },
        accuracy,
    ),
    "L1": ({"none": {}, "0.001": {"l1_decay": 0.001}, "0.01": {"l1_decay": 0.01}}, accuracy),
}  # fmt: skip


def main() -> None:
    """Measure the chosen techniques."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--only", choices=TECHNIQUES)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    disable_progress_bars()
    quieten(True)
    with tempfile.TemporaryDirectory() as folder:
        lab = Laboratory(options.dataset_name, Path(folder))
        for name, (variants, metric) in TECHNIQUES.items():
            if options.only in (None, name):
                compare(lab, name, variants, metric, options.models, options.seeds)


if __name__ == "__main__":
    main()

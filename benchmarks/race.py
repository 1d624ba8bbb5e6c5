"""`--learning_rate auto` against a sweep of nine learning rates in complete runs, and against a range test.

python -m benchmarks.race --dataset_name DATA [--models article_cnn] [--data digits] [--epochs 5]
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import disable_progress_bars
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import set_seed

from benchmarks.measure import conditions, summary, write
from hf_cifar import RunConfig, build_model, finetune_classifier, plan_run
from hf_cifar.data.splits import DataSource
from hf_cifar.errors import UserError
from hf_cifar.logs import quieten
from hf_cifar.plan import Plan
from hf_cifar.training.build import build_trainer
from hf_cifar.training.guards import FiniteLoss
from hf_cifar.training.race import FACTORS, Unwatched, rates_around, short_run
from hf_cifar.training.trainer import ImageClassificationTrainer

Options = Mapping[str, object]
MODELS: dict[str, Options] = {
    "article_cnn": {"model_name_or_path": "scratch/article_cnn", "image_size": 32},
    "resnet10t": {"model_name_or_path": "scratch/resnet10t", "image_size": 32},
    "vit": {"model_name_or_path": "scratch/test_vit", "image_size": 64},
    "efficientnet_lite0, head": {
        "model_name_or_path": "bundled/efficientnet_lite0", "freeze": "backbone", "image_size": 64,
    },
    "efficientnet_lite0": {"model_name_or_path": "bundled/efficientnet_lite0", "image_size": 48},
}  # fmt: skip
# Of each data set: its options, epochs, and images per step.
DATA: dict[str, tuple[Options, float, int]] = {
    "cifar10": ({"max_eval_samples": 2500}, 5, 32),
    "digits": ({"dataset_name": "bundled/digits", "flip": 0}, 10, 8),
}
SHARED: Options = {
    "precision": "fp32", "eval_strategy": "no", "save_strategy": "no", "calibrate": "false",
    "load_best_model_at_end": "false", "disable_tqdm": "true", "do_predict": "true",
}  # fmt: skip
NUM_RATES = 9  # of the sweep
# Of the range test: the lowest and highest rate, relative to the default, and the loss, relative to the
# lowest one, at which it ends.
RANGE, RANGE_STEPS, TOO_HIGH = (1e-3, 1e3), 100, 4.0
SMOOTHING = 0.9  # of its losses


class RangeTest(ImageClassificationTrainer):
    """Trains while the rate grows exponentially, and records the loss of each step.

    Source: Smith, Cyclical Learning Rates for Training Neural Networks, 2017.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LRScheduler:
        if self.lr_scheduler is None:
            growth = RANGE[1] / RANGE[0]
            self.lr_scheduler = LambdaLR(
                optimizer or self.optimizer,
                lambda step: growth ** (step / (num_training_steps - 1)),
            )
        return self.lr_scheduler

    def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(float(loss.detach()))
        if self.losses[-1] > TOO_HIGH * min(self.losses):
            self.control.should_training_stop = True
        return loss


def range_test(config: RunConfig, source: DataSource, default: float) -> dict[str, float]:
    """Return the rates that a range test suggests: where the loss falls most steeply, and a tenth of the rate
    of its minimum."""
    with tempfile.TemporaryDirectory() as folder:
        plan, model, processor = planned(config.with_training(learning_rate=default), source)
        short = short_run(plan.config, folder, default * RANGE[0])
        short = short.with_training(max_steps=RANGE_STEPS, gradient_accumulation_steps=1)
        trainer = build_trainer(
            model, processor, source.splits, replace(plan, config=short), RangeTest
        )
        assert isinstance(trainer, RangeTest)
        trainer.remove_callback(FiniteLoss)
        trainer.finite_loss = Unwatched(default)
        trainer.train()
    losses = [loss for loss in trainer.losses if math.isfinite(loss)]
    rates = (
        default * RANGE[0] * (RANGE[1] / RANGE[0]) ** (np.arange(len(losses)) / (RANGE_STEPS - 1))
    )
    return suggestions(rates, np.array(losses))


def suggestions(rates: np.ndarray, losses: np.ndarray) -> dict[str, float]:
    """Return the suggested rates, from the smoothed losses [N] at rates [N] in ascending order."""
    average, smooth = 0.0, []
    for step, loss in enumerate(losses, 1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        smooth.append(average / (1 - SMOOTHING**step))
    lowest = int(np.argmin(smooth))
    slopes = np.gradient(np.array(smooth), np.log(rates))[: lowest + 1]
    found = {
        "range test, steepest": rates[int(np.argmin(slopes))],
        "range test, minimum / 10": rates[lowest] / 10,
    }
    return {name: float(f"{rate:.3g}") for name, rate in found.items()}


def planned(config: RunConfig, source: DataSource) -> tuple[Plan, Any, Any]:
    """Return the plan of a run with its model and image processor."""
    set_seed(config.train.seed)
    model, processor = build_model(config.model, source.splits.id2label)
    return plan_run(config, model, processor, source.splits), model, processor


def measure(model: str, data: str, options: argparse.Namespace) -> None:
    """Compare the picks for a model and a data set, and write one JSON line."""
    chosen, epochs, batch = DATA[data]
    given: dict[str, object] = {
        "dataset_name": options.dataset_name, **SHARED, **chosen, **MODELS[model],
        "num_train_epochs": options.epochs or epochs, "per_device_train_batch_size": batch,
        "seed": options.seed,
    }  # fmt: skip
    if options.max_train_samples and data == "cifar10":
        given["max_train_samples"] = options.max_train_samples
    argv = [f"--{name}={value}" for name, value in given.items()]
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig.parse([*argv, "--output_dir", folder])
        source = DataSource(config.data)
        default = planned(config, source)[0].config.train.learning_rate
        assert isinstance(default, float)
        start = time.perf_counter()
        race = planned(config.with_training(learning_rate="auto"), source)[0]
        seconds = time.perf_counter() - start
        picks: dict[str, Any] = {"default": default, "race": race.config.train.learning_rate}
        picks |= range_test(config, source, default)
        sweep = rates_around(default, NUM_RATES, FACTORS[NUM_RATES])
        recorded = {**given, "dataset_name": Path(str(given["dataset_name"])).name}
        known = known_runs(f"race: {model}, {data}", recorded, options.reuse)
        found: dict[float, dict[str, float]] = {}
        for rate in sorted({*sweep, *picks.values()}):
            found[rate] = known.get(f"{rate:g}") or accuracies(
                config, source, rate, Path(folder, f"{rate:g}")
            )
            print(f"race, {model}, {data}: {rate:g} {found[rate]}", flush=True)
    best = {split: max(found[rate][split] for rate in sweep) for split in ("validation", "test")}
    record = {
        "benchmark": f"race: {model}, {data}", "unit": "test accuracy", "n": 1, "options": recorded,
        "figures": {
            "best of the sweep": summary([best["test"]]),
            **{name: summary([found[rate]["test"]]) for name, rate in picks.items()},
        },
        "ratios": {}, "picks": picks, "race": race.race, "race_seconds": round(seconds, 1),
        "sweep": {f"{rate:g}": found[rate] for rate in sweep},
        "runs": {f"{rate:g}": each for rate, each in found.items()},
        "best": best, "loss": {
            name: {split: round(best[split] - found[rate][split], 4) for split in best}
            for name, rate in picks.items()
        },
    }  # fmt: skip
    write({**record, **conditions()}, options.output)
    print(f"race, {model}, {data}: picks {picks}, below the best {record['loss']}", flush=True)


def known_runs(
    benchmark: str, options: dict[str, object], records: Path | None
) -> dict[str, dict[str, float]]:
    """Return the accuracies of complete runs with these options by learning rate, from a file of records."""
    lines = records.read_text().splitlines() if records else []
    found: dict[str, dict[str, float]] = {}
    for record in map(json.loads, lines):
        if record["benchmark"] == benchmark and record["options"] == options:
            found |= record["sweep"] | record.get("runs", {})
    return found


def accuracies(
    config: RunConfig, source: DataSource, rate: float, folder: Path
) -> dict[str, float]:
    """Return the accuracy on validation and test after a complete run; 0 if it diverged."""
    config = config.with_training(learning_rate=rate, output_dir=str(folder))
    try:
        metrics = finetune_classifier(config, source).metrics
    except UserError as error:
        if "diverged" not in str(error):
            raise
        return {"validation": 0.0, "test": 0.0}
    return {split: round(metrics[split]["accuracy"], 4) for split in ("validation", "test")}


def main() -> None:
    """Measure the chosen models and data sets."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10", help="CIFAR-10")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--max_train_samples", type=int, default=5000, help="of CIFAR-10; 0: all")
    parser.add_argument("--epochs", type=float, help="default: 5 for CIFAR-10, 10 for digits")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", type=Path, help="folder for the JSON lines")
    parser.add_argument("--reuse", type=Path, help="records whose complete runs are not repeated")
    options = parser.parse_args()
    disable_progress_bars()
    quieten(True)
    for data in options.data:
        for model in options.models:
            measure(model, data, options)


if __name__ == "__main__":
    main()

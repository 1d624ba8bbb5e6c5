"""Validation accuracy after a short run, by optimiser and learning rate: the basis of the default rates.

python -m benchmarks.rates --dataset_name DATA [--output FOLDER]
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import conditions, summary, write
from hf_cifar import RunConfig, finetune_classifier
from hf_cifar.errors import UserError

# Options of each optimiser.
OPTIMIZERS = {
    "adamw": ["--optim", "adamw_torch"],
    "sgd": ["--optim", "sgd"],
    "sgd, momentum 0.9": ["--optim", "sgd", "--optim_args", "momentum=0.9"],
    "adam": ["--optim", "adam"],
    "rmsprop": ["--optim", "rmsprop"],
    "adagrad": ["--optim", "adagrad"],
    "lion": ["--optim", "lion"],
    "muon": ["--optim", "muon"],
}


@dataclass(frozen=True)
class Task:
    """A short run: its model and length, and the rates to try for each optimiser."""

    family: str
    options: list[str]
    rates: dict[str, list[float]]


TASKS = {
    "article_cnn": Task(
        "scratch",
        [
            "--model_name_or_path", "scratch/article_cnn", "--image_size", "32",
            "--max_train_samples", "5000", "--num_train_epochs", "4",
        ],
        {
            "adamw": [3e-4, 1e-3, 2e-3, 4e-3, 8e-3],
            "sgd": [0.05, 0.1, 0.2, 0.4],
            "sgd, momentum 0.9": [0.005, 0.01, 0.02, 0.04],
            "adam": [3e-4, 1e-3, 2e-3, 4e-3],
            "rmsprop": [1e-4, 3e-4, 1e-3, 3e-3],
            "adagrad": [3e-3, 0.01, 0.03, 0.1],
            "lion": [3e-5, 1e-4, 3e-4, 1e-3],
            "muon": [2.5e-3, 5e-3, 0.01, 0.02, 0.04],
        },
    ),
    "lite0_head": Task(
        "head",
        [
            "--model_name_or_path", "bundled/efficientnet_lite0", "--image_size", "96",
            "--freeze", "backbone", "--max_train_samples", "2500", "--num_train_epochs", "5",
        ],
        {
            "adamw": [1e-3, 2e-3, 4e-3, 8e-3],
            "sgd": [0.025, 0.1, 0.4, 1.6],
            "sgd, momentum 0.9": [0.0025, 0.01, 0.04, 0.16],
            "adam": [1e-3, 2e-3, 4e-3, 8e-3],
            "rmsprop": [3e-4, 1e-3, 3e-3, 0.01],
            "adagrad": [3e-3, 0.01, 0.03, 0.1],
            "lion": [1e-4, 3e-4, 1e-3, 3e-3],
            "muon": [2.5e-3, 5e-3, 0.01, 0.02, 0.04],
        },
    ),
    "lite0_lora": Task(
        "lora",
        [
            "--model_name_or_path", "bundled/efficientnet_lite0", "--image_size", "96",
            "--lora_rank", "8", "--max_train_samples", "2500", "--num_train_epochs", "2",
        ],
        {"adamw": [1e-3, 3e-3, 8e-3, 1.6e-2]},
    ),
    "lite0": Task(
        "convolution",
        [
            "--model_name_or_path", "bundled/efficientnet_lite0", "--image_size", "64",
            "--max_train_samples", "5000", "--num_train_epochs", "3",
        ],
        {
            "adamw": [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3],
            "sgd": [0.0125, 0.025, 0.05, 0.1],
            "sgd, momentum 0.9": [0.00125, 0.0025, 0.005, 0.01],
            "adam": [1.25e-4, 2.5e-4, 5e-4, 1e-3],
            "rmsprop": [3e-5, 1e-4, 3e-4, 1e-3],
            "adagrad": [1e-3, 3e-3, 0.01, 0.03],
            "lion": [3e-5, 1e-4, 3e-4, 1e-3],
            "muon": [6e-4, 1.25e-3, 2.5e-3, 5e-3],
        },
    ),
}  # fmt: skip


def accuracy(options: list[str], rate: float) -> float:
    """Return the validation accuracy of one run; 0 if it diverged."""
    with tempfile.TemporaryDirectory() as folder:
        argv = [
            *options, "--learning_rate", str(rate), "--output_dir", str(Path(folder, "run")),
            "--precision", "fp32", "--eval_strategy", "no", "--save_strategy", "no",
            "--calibrate", "false", "--disable_tqdm", "true",
        ]  # fmt: skip
        try:
            return finetune_classifier(RunConfig.parse(argv)).metrics["validation"]["accuracy"]
        except UserError as error:
            if "diverged" not in str(error):
                raise
            return 0.0


def measure(name: str, optimizer: str, data: list[str], folder: Path | None = None) -> None:
    """Try every rate of an optimiser on a task, and write one JSON line."""
    task, found = TASKS[name], {}
    options = [*data, *task.options, *OPTIMIZERS[optimizer]]
    for rate in task.rates[optimizer]:
        found[f"{rate:g}"] = summary([accuracy(options, rate)])
        print(f"{name}, {optimizer}, {rate:g}: {found[f'{rate:g}']['median']}", flush=True)
    record = {
        "benchmark": f"rates: {name}, {optimizer}", "unit": "accuracy", "n": 1,
        "family": task.family, "options": [*data[2:], *task.options],
        "figures": found, "ratios": {},
    }  # fmt: skip
    write({**record, **conditions()}, folder)


def main() -> None:
    """Measure every task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument(
        "--batch_size", default="64", help="images a step; the default rates are for 64"
    )
    parser.add_argument("--max_eval_samples", default="2500")
    parser.add_argument("--output", type=Path, help="folder for the JSON lines")
    options = parser.parse_args()
    data = [
        "--dataset_name", options.dataset_name, "--max_eval_samples", options.max_eval_samples,
        "--per_device_train_batch_size", options.batch_size,
    ]  # fmt: skip
    for name in options.tasks:
        for optimizer in filter(TASKS[name].rates.get, options.optimizers):
            measure(name, optimizer, data, options.output)


if __name__ == "__main__":
    main()

"""TPE against random search with equally many trials of `hf-cifar search`; the winner is evaluated on test.

For each seed, both start with the same ten random trials, so the differences are paired. There is no pruning.

python -m benchmarks.search --dataset_name DATA [--n_trials 24] [--seeds 5] [--max_train_samples 2000]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Literal

import yaml
from datasets import disable_progress_bars

from benchmarks.measure import conditions, summary, write
from benchmarks.techniques import paired_differences
from hf_cifar import RunConfig
from hf_cifar.config.studies import SearchConfig
from hf_cifar.data.splits import DataSource
from hf_cifar.logs import quieten
from hf_cifar.studies.search import run_search

MODEL = "article_cnn"
SPACE = {
    "learning_rate": {"low": 1e-5, "high": 0.1, "log": True},
    "weight_decay": {"low": 1e-4, "high": 1.0, "log": True},
    "label_smoothing_factor": {"low": 0.0, "high": 0.3},
    "warmup_steps": {"low": 0.0, "high": 0.5},
    "optim": ["adamw_torch", "sgd", "rmsprop"],
    "per_device_train_batch_size": [16, 32, 64],
}
SAMPLERS: dict[str, Literal["random", "tpe"]] = {"random search": "random", "TPE": "tpe"}
SHARED = {
    "model_name_or_path": f"scratch/{MODEL}", "image_size": 32, "do_predict": "true",
    "max_eval_samples": 2000, "eval_strategy": "no", "save_strategy": "no", "precision": "fp32",
    "load_best_model_at_end": "false", "calibrate": "false", "disable_tqdm": "true",
}  # fmt: skip


def main() -> None:
    """Search with both samplers for each seed, and write one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10", help="CIFAR-10")
    parser.add_argument("--n_trials", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--max_train_samples", type=int, default=2000)
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--output", type=Path, help="folder for the JSON lines")
    options = parser.parse_args()
    disable_progress_bars()
    quieten(False)
    given = {
        "dataset_name": options.dataset_name, **SHARED, "num_train_epochs": options.epochs,
        "max_train_samples": options.max_train_samples,
    }  # fmt: skip
    values: dict[str, dict[str, list[float]]] = {
        split: {name: [] for name in SAMPLERS} for split in ("validation", "test")
    }
    with tempfile.TemporaryDirectory() as folder:
        space = Path(folder, "space.yaml")
        space.write_text(yaml.safe_dump(SPACE))
        config = RunConfig.parse([f"--{name}={value}" for name, value in given.items()])
        source = DataSource(config.data)
        for seed in range(options.seeds):
            for name, sampler in SAMPLERS.items():
                place = Path(folder, f"{sampler}-{seed}")
                found = run_search(
                    config.with_training(output_dir=str(place), seed=seed),
                    SearchConfig(
                        n_trials=options.n_trials, sampler=sampler, prune=False, space=str(space)
                    ),
                    source,
                )
                for split, by_name in values.items():
                    by_name[name].append(found["best"]["metrics"][split]["accuracy"])
                shown = {split: values[split][name][-1] for split in values}
                print(f"search, seed {seed}, {name}: {shown}", flush=True)
    record = {
        "benchmark": f"search, {MODEL}", "unit": "accuracy", "n": options.seeds,
        "options": {**given, "dataset_name": Path(options.dataset_name).name, "space": SPACE},
        "n_trials": options.n_trials, "values": values["test"], "validation": values["validation"],
        "figures": {name: summary(found) for name, found in values["test"].items()}, "ratios": {},
        "differences": paired_differences(values["test"], next(iter(SAMPLERS))),
        "validation_differences": paired_differences(values["validation"], next(iter(SAMPLERS))),
    }  # fmt: skip
    write({**record, **conditions()}, options.output)


if __name__ == "__main__":
    main()

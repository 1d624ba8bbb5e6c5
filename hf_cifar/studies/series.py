"""A series: complete runs of one recipe, in the folders of one folder. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_cifar.config.metrics import shown
from hf_cifar.config.run import RunConfig
from hf_cifar.errors import UserError
from hf_cifar.runs.folder import RunFolder
from hf_cifar.runs.resume import check_same_run

# A resumed run may change these; a finished run that is kept must not.
LENGTHS = ("num_train_epochs", "max_steps")


def check_series(config: RunConfig, what: str) -> None:
    """Raises: UserError for options of a single run, or a folder that holds one. what: the option or command
    that asks for a series."""
    train = config.train
    if train.push_to_hub:
        raise UserError(
            f"--push_to_hub pushes one model; leave it out, or leave out {what} to push a single run"
        )
    if train.resumes and not train.resumes_last:
        raise UserError(
            f"{what} resumes with --resume_from_checkpoint last, not from a single checkpoint "
            f"({train.resume_from_checkpoint})"
        )
    if RunFolder(train.output_dir).has_run:
        raise UserError(f"{train.output_dir} holds a single run; pass another --output_dir")


def run_of(config: RunConfig, name: str, **changes: Any) -> RunConfig:
    """Return the options of one run of a series, in the folder `name`, with these training options."""
    train = config.train
    changes["output_dir"] = str(Path(train.output_dir) / name)
    if train.run_name is not None:
        changes["run_name"] = f"{train.run_name}/{name}"
    return config.with_training(**changes)


def is_kept(config: RunConfig) -> bool:
    """Return True if a resumed series already has this run, with every requested metric."""
    folder = RunFolder(config.train.output_dir)
    if not config.train.resumes or not folder.facts():
        return False
    return set(splits_of(config)) <= folder.metrics().keys()


def check_same(configs: Sequence[RunConfig]) -> None:
    """Raises: UserError if a folder holds a different run, or a finished one of another length."""
    for config in configs:
        folder = Path(config.train.output_dir)
        check_same_run(folder, config, in_series=True)
        if not is_kept(config):
            continue
        before = RunFolder(folder).load_config().train
        for name in LENGTHS:
            then, now = getattr(before, name), getattr(config.train, name)
            if now not in (None, then):
                raise UserError(
                    f"--{name} is {now:g}, but the finished run in {folder} had {then:g}; start a series of "
                    "that length in another --output_dir"
                )


def splits_of(config: RunConfig) -> list[str]:
    """Return the splits that a run evaluates."""
    return ["validation", "test"] if config.train.do_predict else ["validation"]


def metrics_of(configs: Sequence[RunConfig]) -> dict[str, dict[str, list[float]]]:
    """Return the headline metrics of finished runs, by split and name; those that every run has."""
    metrics = [RunFolder(config.train.output_dir).metrics() for config in configs]
    return {
        split: {
            name: [each[split][name] for each in metrics]
            for name in shown("headline", metrics[0][split])
            if all(each[split].get(name) is not None for each in metrics)
        }
        for split in splits_of(configs[0])
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return the values of a metric with their mean and standard deviation (of a sample: n - 1)."""
    return {
        "num_runs": len(values),
        "mean": float(np.mean(values)),
        "std": float(np.std(values, ddof=1)),
        "values": list(values),
    }

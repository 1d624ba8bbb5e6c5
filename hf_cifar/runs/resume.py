"""Checks of the run to resume and of the options that may differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_cifar.config.run import CONFIGS, RunConfig
from hf_cifar.config.training import TrainingConfig
from hf_cifar.errors import UserError
from hf_cifar.runs.folder import RunFolder
from hf_cifar.runs.lock import refuse_in_use
from hf_cifar.runs.processes import is_main_process

# Prefixes of inherited options that affect output, retention or speed, but not the result.
INHERITED_MAY_CHANGE = (
    "dataloader_", "eval_", "hub_", "log", "save_", "torch_compile", "tf32", "greater_is_better",
)  # fmt: skip


def run_to_resume(train: TrainingConfig) -> Path | None:
    """Return the folder of the run to be resumed, or None for a new run."""
    if not train.resumes or train.resume_from_checkpoint is None:
        return None
    if train.resumes_last:
        return Path(train.output_dir)
    return Path(train.resume_from_checkpoint).parent


def check_folder(config: RunConfig) -> list[str]:
    """Check that the output folder is free, or holds the run to be resumed; see `check_same_run`.

    Raises: UserError if it is in use, or holds another run.
    """
    folder, resumed = Path(config.train.output_dir), run_to_resume(config.train)
    changes = [] if resumed is None else check_same_run(resumed, config)
    if is_main_process():
        refuse_in_use(folder)
        if resumed is None:
            RunFolder(folder).refuse_occupied()
    return changes


def check_same_run(folder: Path, config: RunConfig) -> list[str]:
    """Compare the options of a resumed run with those in its config.yaml.

    Options left open are ignored. Returns the allowed differences, as `--NAME NEW, before: OLD`.
    Raises: UserError for the first option that may not change: it would be a different run.
    """
    run = RunFolder(folder)
    if not run.has_run:
        return []
    fields = {
        each.name: each for config_class in CONFIGS for each in dataclasses.fields(config_class)
    }
    saved, changes = run.options(), []
    for name, value in config.options().items():
        default = fields[name].default if name in fields else None
        before = saved.get(name, default)
        left_open = value == "auto" or (
            name == "torch_compile" and config.train.precision == "auto"
        )
        if value == before or left_open:
            continue
        if not _may_change(name, fields, config):
            raise UserError(
                f"--resume_from_checkpoint: --{name} is {value}, but the run in {folder} started with "
                f"{'the default' if before is None else before}; resume with --config {run.config_path}, or "
                "start again in another --output_dir"
            )
        changes.append(f"--{name} {value}, before: {'the default' if before is None else before}")
    return changes


def _may_change(name: str, fields: Mapping[str, Any], config: RunConfig) -> bool:
    if name == "dataloader_num_workers" and config.data.streaming:
        return False  # the order of a stream depends on how many workers share its shards
    if name in fields:
        return fields[name].metadata["may_change"]
    return name.startswith(INHERITED_MAY_CHANGE)

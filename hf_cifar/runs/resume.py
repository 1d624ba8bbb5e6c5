"""Checks of the run to resume and of the options that may differ."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from hf_cifar.config.objects import kind_of
from hf_cifar.config.run import CONFIGS, RunConfig
from hf_cifar.config.training import TrainingConfig
from hf_cifar.errors import UserError
from hf_cifar.runs.folder import RunFolder
from hf_cifar.runs.lock import refuse_in_use
from hf_cifar.runs.processes import is_main_process, launcher_restarts
from hf_cifar.text import enumerated

logger = logging.getLogger(__name__)
# Options whose product with the number of processes is the number of images per step.
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
# Prefixes of inherited options that affect output, retention or speed, but not the result.
INHERITED_MAY_CHANGE = (
    "dataloader_", "eval_", "hub_", "log", "save_", "torch_compile", "tf32", "greater_is_better",
)  # fmt: skip
# Options that say when to evaluate and save.
EVALUATION = {
    "eval_strategy", "eval_steps", "save_strategy", "save_steps", "load_best_model_at_end",
}  # fmt: skip


def with_restarts(config: RunConfig) -> RunConfig:
    """Make --resume_from_checkpoint last the default if the launcher restarts processes, so that each start
    continues or begins the run.

    This depends only on max-restarts, because a process on a new machine does not know of earlier restarts.
    """
    if config.train.resume_from_checkpoint is None and launcher_restarts():
        return config.with_training(resume_from_checkpoint="last")
    return config


def run_to_resume(train: TrainingConfig) -> Path | None:
    """Return the folder of the run to be resumed, or None for a new run."""
    if train.resumes_last:
        return Path(train.output_dir)
    requested = train.requested_checkpoint
    return None if requested is None else requested.parent


def check_folder(config: RunConfig) -> list[str]:
    """Check that the output folder is free, or holds the run to be resumed; see `check_same_run`.

    Raises: UserError if it is in use, holds another run, or there is no checkpoint where one was requested.
    """
    train = config.train
    folder, resumed = RunFolder(train.output_dir), run_to_resume(train)
    requested = train.requested_checkpoint
    if requested is not None and not requested.is_dir():
        raise UserError(
            f"--resume_from_checkpoint: no checkpoint in {requested}; pass its folder, or last"
        )
    changes = [] if resumed is None else check_same_run(resumed, config)
    if is_main_process():
        refuse_in_use(folder.path)
        if resumed is None or resumed.resolve() != folder.path.resolve():
            folder.refuse_occupied()
        elif not (folder.has_run or folder.checkpoints()) and folder.model_config_path.exists():
            raise UserError(
                f"--resume_from_checkpoint: {folder.path} has a model, but no run to resume; pass another "
                "--output_dir"
            )
    return changes


def check_same_run(folder: Path, config: RunConfig, *, in_series: bool = False) -> list[str]:
    """Compare the options of a resumed run with those in its config.yaml.

    in_series: the run is one of several of a command, which has no options of its own.

    Training options left open are ignored: the plan takes them from the run. Returns the allowed differences,
    as `--NAME NEW, before: OLD`. Raises: UserError for the first option that may not change: it would be a
    different run.
    """
    run = RunFolder(folder)
    if not run.has_run:
        return []
    fields = fields_by_name()
    settled = {each.name for each in dataclasses.fields(TrainingConfig)}
    saved, now, changes = run.options(), config.options(), []
    for name in {**saved, **now}:
        value = now.get(name)
        if value is None and (name in settled or name not in fields):
            continue
        before = saved.get(name, fields[name].default if name in fields else None)
        left_open = value == "auto" or (
            name == "torch_compile" and config.train.precision == "auto"
        )
        if name == "model_name_or_path" and kind_of(str(value)) == kind_of(str(before)):
            continue  # the weights of a model in memory come from the checkpoint
        if value == before or left_open or (before is None and _is_inherited_default(name, value)):
            continue
        if not may_change(name, config):
            found = f"--{name} is {_shown(value)}, but the run in {folder} started with {_shown(before)}"
            advice = f"resume with --config {run.config_path}"
            if in_series:
                advice = "pass the same value"
            else:
                found = f"--resume_from_checkpoint: {found}"
            raise UserError(f"{found}; {advice}, or start again in another --output_dir")
        changes.append(f"--{name} {_shown(value)}, before: {_shown(before)}")
    return changes


def with_options_of(before: RunConfig | None, config: RunConfig) -> RunConfig:
    """Return the options with the training options that they leave open taken from the resumed run.

    When to evaluate and save belongs together: setting one of these options leaves the others open.
    """
    if before is None:
        return config
    left_open = {name for name, value in vars(config.train).items() if value is None}
    left_open |= {"learning_rate"} if config.train.learning_rate == "auto" else set()
    if not left_open.issuperset(EVALUATION):
        left_open -= EVALUATION
    taken = {name: getattr(before.train, name) for name in left_open}
    both = {**before.trainer, **config.trainer}
    return dataclasses.replace(config.with_training(**taken), trainer=both)


def with_batch_of(run: Path | None, config: RunConfig, num_devices: int) -> RunConfig:
    """Return the options with as many images per step as the resumed run has, on any number of devices.

    Accumulation changes if that suffices: the statistics of norms and the random draws depend on the batch of
    a device. Raises: UserError if the images cannot be divided.
    """
    images = None if run is None else RunFolder(run).images_per_step()
    batch, accumulated = (getattr(config.train, name) for name in BATCH)
    if images is None or images == batch * accumulated * num_devices:
        return config
    before = images // (batch * accumulated)
    if config.data.streaming:
        raise UserError(
            f"--streaming: each process reads its own part of the stream, and the run in {run} has "
            f"{before} process(es), not {num_devices}; start {before}, or begin again in another --output_dir"
        )
    if images % num_devices:
        fewer = max(n for n in range(1, num_devices) if images % n == 0)
        raise UserError(
            f"a step of the run in {run} has {images} images, which {num_devices} processes cannot share "
            f"equally; start {fewer} process(es) instead"
        )
    each = images // num_devices
    largest = max(n for n in range(1, min(batch, each) + 1) if each % n == 0)
    changed = dict(zip(BATCH, (largest, each // largest), strict=True))
    logger.info(
        "resuming with %d process%s instead of %d: %s, so that a step still has %s images",
        num_devices, "" if num_devices == 1 else "es", before,
        enumerated(
            [
                f"--{name} {value} instead of {getattr(config.train, name)}"
                for name, value in changed.items()
                if value != getattr(config.train, name)
            ]
        ),
        f"{images:,}",
    )  # fmt: skip
    return config.with_training(**changed)


def _is_inherited_default(name: str, value: Any) -> bool:
    """Return True if an option of TrainingArguments has its default value."""
    from transformers import TrainingArguments

    return any(
        each.name == name and each.default == value
        for each in dataclasses.fields(TrainingArguments)
    )


def _shown(value: Any) -> str:
    return "the default" if value is None else str(value)


def fields_by_name() -> dict[str, dataclasses.Field]:
    """Return the fields of all our options."""
    return {
        each.name: each for config_class in CONFIGS for each in dataclasses.fields(config_class)
    }


def may_change(name: str, config: RunConfig) -> bool:
    """Return True if a resumed run may change an option."""
    fields = fields_by_name()
    if name == "dataloader_num_workers" and config.data.streaming:
        return False  # the order of a stream depends on how many workers share its shards
    if name in fields:
        return fields[name].metadata["may_change"]
    return name.startswith(INHERITED_MAY_CHANGE)

"""Resuming a run: which one, and what may differ."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hf_cifar.config.training import LIGHT_CONFIGS, FinetuneOptions
from hf_cifar.errors import UserError
from hf_cifar.runs.folder import CONFIG_FILE

if TYPE_CHECKING:
    from hf_cifar.config.run import RunConfig

# What may differ when a run goes on: how long, where, what is shown and kept. All else is the run itself.
MAY_CHANGE = re.compile(
    r"num_train_epochs|max_steps|output_dir|resume_.*|early_stopping_.*|(eval|save|logging|log|hub|dataloader)_.*|"
    r"do_.*|check_leakage|push_to_hub|load_best_.*|metric_.*|greater_.*|report_to|run_name|disable_tqdm|use_cpu|"
    r"trust_remote_code|per_device_eval_.*|pixel_store|precision|memory_format|attention|torch_compile.*|bf16|fp16|tf32"
)


def check_same_run(folder: Path, options: dict[str, Any]) -> list[str]:
    """Before a run goes on: the options that make it what it is must be those of its config.yaml.

    options: by name; None stands for a default. Returns what else differs, as `--NAME NEW, which was OLD`.
    Raises: UserError for the first that may not differ.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        return []
    changes = []
    # What a config.yaml does not name had its default.
    defaults = {
        f.name: f.default for c in (*LIGHT_CONFIGS, FinetuneOptions) for f in dataclasses.fields(c)
    }
    saved = yaml.safe_load(path.read_text()) or {}
    for name, value in options.items():
        before = saved.get(name, defaults.get(name, "its default"))
        # The order of a stream depends on how many workers share its shards.
        fixed = name == "dataloader_num_workers" and options.get("streaming")
        if value in (None, before):
            continue
        if fixed or not MAY_CHANGE.fullmatch(name):
            raise UserError(
                f"--resume_from_checkpoint: --{name} is {value}, but the run in {folder} began with "
                f"{before}; go on with --config {path}, or start anew in another --output_dir"
            )
        changes.append(f"--{name} {value}, which was {before}")
    return changes


def run_to_resume(output_dir: str, resume_from_checkpoint: str | None) -> Path | None:
    """The folder of the run that is to go on, or None for a new one."""
    value = resume_from_checkpoint
    if value is None or value.lower() in ("false", "no"):
        return None
    if value.lower() in ("true", "last", "latest"):
        return Path(output_dir)
    return Path(value).parent


def resume_point(config: RunConfig) -> bool | str | None:
    """What to resume from, in the Trainer's terms: a folder, True for the last checkpoint, or None."""
    value = config.train.resume_from_checkpoint
    if run_to_resume(config.train.output_dir, value) is None:
        return None
    return True if value.lower() in ("true", "last", "latest") else value

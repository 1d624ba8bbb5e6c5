"""What an option is: a dataclass field with a help text, and its bounds."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import field
from typing import Any

from hf_cifar.errors import UserError

BOUNDS = {
    "per_device_train_batch_size": (1, 2**20), "per_device_eval_batch_size": (1, 2**20),
    "gradient_accumulation_steps": (1, 2**20), "num_train_epochs": (1e-6, 1e6),
    "learning_rate": (1e-12, 1e3), "weight_decay": (0, 1e3), "label_smoothing_factor": (0, 0.999),
    "dataloader_num_workers": (0, 1024), "early_stopping_patience": (1, 10**6),
    "layer_decay": (0.01, 1), "max_grad_norm": (0, 1e6), "seed": (0, 2**32 - 1), "feature_views": (0, 1000),
    "seeds": (1, 1000), "ema_decay": (0, 0.999999),
}  # fmt: skip
# The Trainer's, but not ours: the model always trains, hub/push.py pushes once, batches are made to measure.
WITHOUT_EFFECT = ("do_train", "hub_strategy", "hub_always_push", "remove_unused_columns")


def option(default: Any, text: str) -> Any:
    """A dataclass field with its default and the text that `--help` and README show."""
    return field(default=default, metadata={"help": text})


def refuse_both_formats(config: Any) -> None:
    """Raises: UserError for --bf16 and --fp16 at once."""
    if config.bf16 and config.fp16:
        raise UserError("--bf16 and --fp16 exclude each other; pass one")


def check_bounds(name: str, value: float | None) -> None:
    """Raises: UserError for a training option out of its range."""
    low, high = BOUNDS.get(name, (-math.inf, math.inf))
    if value is not None and not low <= value <= high:
        raise UserError(f"--{name} is {value:g}; it must lie in {low:g}..{high:g}")


def field_names(config_class: type) -> list[str]:
    """Names of the options that a configuration class declares."""
    return [f.name for f in dataclasses.fields(config_class) if f.init]

"""Learning rate schedules by name."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_utils import SchedulerType

from hf_cifar.errors import UserError


def build_schedule(args: TrainingArguments, optimizer: Optimizer, num_steps: int) -> LRScheduler:
    """Return the schedule that `args` name, for a run of `num_steps` optimiser steps."""
    build = SCHEDULES[schedule_name(args)]
    options = args.lr_scheduler_kwargs or {}
    return build(optimizer, args.get_warmup_steps(num_steps), num_steps, options)


def check_schedule(args: TrainingArguments) -> None:
    """Raises: UserError for lr_scheduler_kwargs that the schedule does not take."""
    try:
        build_schedule(args, torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate), 10)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"--lr_scheduler_kwargs {args.lr_scheduler_kwargs} are not valid for --lr_scheduler_type "
            f"{schedule_name(args)}: {error}"
        ) from None


def schedule_name(args: TrainingArguments) -> str:
    """Return the name given by `--lr_scheduler_type`."""
    return getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)


def _transformers_schedule(
    name: str, optimizer: Optimizer, warmup_steps: int, num_steps: int, options: dict[str, Any]
) -> LRScheduler:
    return get_scheduler(name, optimizer, warmup_steps, num_steps, options)


# Functions of the optimiser, the warm-up steps, all steps and lr_scheduler_kwargs.
SCHEDULES = {
    name.value: functools.partial(_transformers_schedule, name.value) for name in SchedulerType
}

"""Learning rate schedules by name: functions of the step, after a linear warm-up.

Lengths in `lr_scheduler_kwargs` are steps after the warm-up, or shares of them if below 1 or a float of 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_utils import SchedulerType

from hf_cifar.errors import UserError

Share = Callable[[int], float]  # of the peak rate, at a step after the warm-up


def build_schedule(args: TrainingArguments, optimizer: Optimizer, num_steps: int) -> LRScheduler:
    """Return the schedule that `args` name, for a run of `num_steps` optimiser steps."""
    name, options = schedule_name(args), dict(args.lr_scheduler_kwargs or {})
    if name in FOLLOWS_A_METRIC and args.greater_is_better:
        options.setdefault("mode", "max")  # their default is for a loss
    return SCHEDULES[name](optimizer, args.get_warmup_steps(num_steps), num_steps, options)


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


def positive(**values: float) -> None:
    """Raises: ValueError for a value of 0 or below."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} is {value}; it must be above 0")


def in_steps(length: float, num_steps: int) -> float:
    """Convert a length, in steps or as a share of `num_steps`, to steps."""
    is_share = length < 1 or (isinstance(length, float) and length == 1)
    return length * num_steps if is_share else length


def exponential(
    num_steps: int, *, decay_rate: float = 0.01, decay_steps: float = 1.0, staircase: bool = False
) -> Share:
    """Multiply the rate by `decay_rate` per `decay_steps`, smoothly or at once at the end of each.

    Source: TensorFlow, ExponentialDecay.
    """
    positive(decay_rate=decay_rate, decay_steps=decay_steps)
    length = in_steps(decay_steps, num_steps)

    def share(step: int) -> float:
        periods = step / length
        return decay_rate ** (math.floor(periods) if staircase else periods)

    return share


def step(num_steps: int, *, decay_rate: float = 0.1, decay_steps: float = 1 / 3) -> Share:
    """Multiply the rate by `decay_rate` at once after each `decay_steps`. Source: torch, StepLR."""
    return exponential(num_steps, decay_rate=decay_rate, decay_steps=decay_steps, staircase=True)


def multistep(
    num_steps: int, *, decay_rate: float = 0.1, milestones: Sequence[float] = (0.5, 0.75)
) -> Share:
    """Multiply the rate by `decay_rate` at each milestone. Source: torch, MultiStepLR."""
    positive(decay_rate=decay_rate)
    ends = [in_steps(milestone, num_steps) for milestone in milestones]
    return lambda step: decay_rate ** sum(step >= end for end in ends)


def inverse_time(num_steps: int, *, decay_steps: float = 0.1) -> Share:
    """Divide the rate by 1 + step / decay_steps. Source: TensorFlow, InverseTimeDecay."""
    positive(decay_steps=decay_steps)
    length = in_steps(decay_steps, num_steps)
    return lambda step: length / (step + length)


def one_cycle(
    optimizer: Optimizer, warmup_steps: int, num_steps: int, options: dict[str, Any]
) -> LRScheduler:
    """Rise from 1 / div_factor of the peak rate to it in the warm-up, then fall to 1 / final_div_factor of
    the first rate, both along a cosine; momentum stays the same.

    Source: torch, OneCycleLR.
    """

    def share_of(div_factor: float = 25.0, final_div_factor: float = 1e4) -> Share:
        positive(div_factor=div_factor, final_div_factor=final_div_factor)
        first, last = 1 / div_factor, 1 / div_factor / final_div_factor
        peak, end = max(warmup_steps - 1, 1), num_steps - 1

        def share(step: int) -> float:
            if step <= peak:
                return _cosine(first, 1.0, step / peak)
            return _cosine(1.0, last, min(1.0, (step - peak) / max(1, end - peak)))

        return share

    return LambdaLR(optimizer, share_of(**options))


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def _after_warmup(
    shape: Callable[..., Share],
    optimizer: Optimizer,
    warmup_steps: int,
    num_steps: int,
    options: dict[str, Any],
) -> LRScheduler:
    """Build a schedule that follows `shape` from the end of the warm-up."""
    share = shape(max(1, num_steps - warmup_steps), **options)
    return LambdaLR(
        optimizer,
        lambda step: step / warmup_steps if step < warmup_steps else share(step - warmup_steps),
    )


class PlateauAfterWarmup(ReduceLROnPlateau):
    """Reduces the rate when a metric stops improving, after a linear warm-up.

    Steps are counted by the optimiser, because the Trainer only reports evaluations.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int, **options: Any) -> None:
        super().__init__(optimizer, **options)
        self.warmup_steps, self.num_steps = warmup_steps, 0
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        # accelerate's wrapper takes no hooks.
        getattr(optimizer, "optimizer", optimizer).register_step_pre_hook(self._warm_up)

    def _warm_up(self, optimizer: Optimizer, *_: Any) -> None:
        if self.num_steps <= self.warmup_steps:
            share = self.num_steps / self.warmup_steps if self.warmup_steps else 1.0
            for group, peak in zip(optimizer.param_groups, self.peaks, strict=True):
                group["lr"] = peak * share
        self.num_steps += 1

    def step(self, metrics: Any, epoch: int | None = None) -> None:
        """Compare the metric with the best one; not during the warm-up."""
        if self.num_steps > self.warmup_steps:
            super().step(metrics, epoch)


def _plateau(
    optimizer: Optimizer, warmup_steps: int, num_steps: int, options: dict[str, Any]
) -> LRScheduler:
    del num_steps
    return PlateauAfterWarmup(optimizer, warmup_steps, **options)


def _transformers_schedule(
    name: str, optimizer: Optimizer, warmup_steps: int, num_steps: int, options: dict[str, Any]
) -> LRScheduler:
    return get_scheduler(name, optimizer, warmup_steps, num_steps, options)


FOLLOWS_A_METRIC = ("reduce_lr_on_plateau", "greedy")
# Functions of the optimiser, the warm-up steps, all steps and lr_scheduler_kwargs.
SCHEDULES: dict[str, Callable[..., LRScheduler]] = {
    **{name.value: functools.partial(_transformers_schedule, name.value) for name in SchedulerType},
    # Transformers ignores the warm-up of these two.
    "constant": functools.partial(_transformers_schedule, "constant_with_warmup"),
    "reduce_lr_on_plateau": _plateau,
    **{
        shape.__name__: functools.partial(_after_warmup, shape)
        for shape in (exponential, step, multistep, inverse_time)
    },
    "one_cycle": one_cycle,
}

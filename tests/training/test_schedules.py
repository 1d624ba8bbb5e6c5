"""hf_cifar.training.schedules: every schedule of transformers, by name."""

import pytest
import torch
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_utils import SchedulerType

from hf_cifar.errors import UserError
from hf_cifar.training.schedules import SCHEDULES, build_schedule, check_schedule

NEEDED = {
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-4},
    "warmup_stable_decay": {"num_decay_steps": 5},
}


def arguments(tmp_path, name, options=None):
    return TrainingArguments(
        output_dir=tmp_path, lr_scheduler_type=name, lr_scheduler_kwargs=options, warmup_steps=0.2,
        eval_strategy="steps", eval_steps=1, use_cpu=True,
    )  # fmt: skip


def rates(schedule, optimizer):
    found = []
    for _ in range(20):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step(*([1.0] if "metrics" in schedule.step.__code__.co_varnames else []))
    return found


@pytest.mark.parametrize("name", [name.value for name in SchedulerType])
def test_every_schedule_is_that_of_transformers(tmp_path, name):
    args = arguments(tmp_path, name, NEEDED.get(name))
    ours, theirs = (torch.optim.SGD([torch.zeros(1)], lr=0.1) for _ in range(2))
    stock = get_scheduler(name, theirs, 4, 20, NEEDED.get(name))
    assert rates(build_schedule(args, ours, 20), ours) == rates(stock, theirs)
    assert name in SCHEDULES


def test_options_of_another_schedule_are_refused(tmp_path):
    check_schedule(arguments(tmp_path, "cosine_with_min_lr", {"min_lr": 1e-4}))
    with pytest.raises(UserError, match=r"min_lr.* are not valid for --lr_scheduler_type linear"):
        check_schedule(arguments(tmp_path, "linear", {"min_lr": 1e-4}))

"""hf_cifar.training.schedules: those of transformers, and ours against torch and the formulas."""

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


STOCK = {name.value for name in SchedulerType} - {"constant", "reduce_lr_on_plateau"}


@pytest.mark.parametrize("name", sorted(STOCK))
def test_every_schedule_is_that_of_transformers(tmp_path, name):
    args = arguments(tmp_path, name, NEEDED.get(name))
    ours, theirs = (torch.optim.SGD([torch.zeros(1)], lr=0.1) for _ in range(2))
    stock = get_scheduler(name, theirs, 4, 20, NEEDED.get(name))
    assert rates(build_schedule(args, ours, 20), ours) == rates(stock, theirs)
    assert name in SCHEDULES


def ours(name, options=None, *, warmup=0, num_steps=20, peak=0.1):
    """Return the rates of a schedule of ours."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
    return rates(SCHEDULES[name](optimizer, warmup, num_steps, options or {}), optimizer)


def torchs(build, peak=0.1):
    """Return the rates of a schedule of torch."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
    return rates(build(optimizer), optimizer)


TORCH = torch.optim.lr_scheduler


def test_exponential_step_and_multistep_are_those_of_torch():
    smooth = ours("exponential", {"decay_rate": 0.9, "decay_steps": 1})
    assert smooth == pytest.approx(torchs(lambda o: TORCH.ExponentialLR(o, 0.9)))
    stairs = ours("step", {"decay_rate": 0.5, "decay_steps": 4})
    assert stairs == pytest.approx(torchs(lambda o: TORCH.StepLR(o, 4, 0.5)))
    assert ours("step", {"decay_rate": 0.5, "decay_steps": 0.2}) == stairs
    jumps = ours("multistep", {"decay_rate": 0.2, "milestones": [0.25, 15]})
    assert jumps == pytest.approx(torchs(lambda o: TORCH.MultiStepLR(o, [5, 15], 0.2)))


@pytest.mark.parametrize("warmup", [2, 6, 19])
def test_one_cycle_is_that_of_torch(warmup):
    theirs = torchs(
        lambda o: TORCH.OneCycleLR(
            o, 0.1, 20, pct_start=warmup / 20, cycle_momentum=False, div_factor=10
        )
    )
    assert ours("one_cycle", {"div_factor": 10}, warmup=warmup) == pytest.approx(theirs)


def test_the_articles_formulas():
    # Ten epochs of two steps: lr0 * decay_step / (epoch + decay_step), and lr0 * decay_rate ** epoch.
    hyperbola = ours("inverse_time", {"decay_steps": 0.5})[::2]
    assert hyperbola == pytest.approx([0.1 * 5 / (epoch + 5) for epoch in range(10)])
    decay = ours("exponential", {"decay_rate": 0.96, "decay_steps": 0.1})[::2]
    assert decay == pytest.approx([0.1 * 0.96**epoch for epoch in range(10)])


@pytest.mark.parametrize("name", ["constant", "exponential", "step", "multistep", "inverse_time"])
def test_a_schedule_begins_after_the_warm_up(name):
    found = ours(name, warmup=4)
    assert found[:5] == pytest.approx([0, 0.025, 0.05, 0.075, 0.1])
    assert found[4:] == pytest.approx(ours(name, num_steps=16)[:16])


def test_a_rate_is_reduced_on_a_plateau_after_the_warm_up(tmp_path):
    args = arguments(tmp_path, "reduce_lr_on_plateau", {"patience": 1, "factor": 0.5})
    args.greater_is_better = True
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    schedule, found = build_schedule(args, optimizer, 20), []
    for accuracy in (0.9, 0.9, 0.9, 0.9, 0.5, 0.6, 0.6, 0.6, 0.95, 0.96):  # warm-up: 4 steps
        optimizer.step()
        found.append(optimizer.param_groups[0]["lr"])
        schedule.step(accuracy)
    assert found == pytest.approx([0, 0.025, 0.05, 0.075, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05])
    again = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    resumed = build_schedule(args, again, 20)
    resumed.load_state_dict(schedule.state_dict())
    again.load_state_dict(optimizer.state_dict())
    again.step()
    assert again.param_groups[0]["lr"] == pytest.approx(0.05)


def test_options_of_another_schedule_are_refused(tmp_path):
    check_schedule(arguments(tmp_path, "cosine_with_min_lr", {"min_lr": 1e-4}))
    with pytest.raises(UserError, match=r"min_lr.* are not valid for --lr_scheduler_type linear"):
        check_schedule(arguments(tmp_path, "linear", {"min_lr": 1e-4}))
    args = arguments(tmp_path, "linear", {"decay_steps": 0})
    args.lr_scheduler_type = "step"
    with pytest.raises(UserError, match=r"decay_steps is 0; it must be above 0"):
        check_schedule(args)

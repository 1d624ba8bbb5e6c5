"""hf_cifar.training.guards: events that end training early, and others that must not."""

import signal
import time

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_cifar.errors import UserError
from hf_cifar.runs.signals import Stopped
from hf_cifar.training.guards import FiniteLoss, StopSignals, worker_errors

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def args(tmp_path):
    return TrainingArguments(output_dir=tmp_path, use_cpu=True)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_the_step_and_the_rows_of_a_loss_that_is_not_finite_are_named(args, device, bad):
    guard = FiniteLoss(0.1)
    guard.on_train_begin(args, TrainerState(), TrainerControl())
    logits = torch.zeros(4, 3, device=device)
    row_ids = torch.tensor([70, 71, 72, 73], device=device)
    guard.watch(4, logits.mean(), logits, row_ids)
    logits = logits.clone()
    logits[2] = float(bad)
    with pytest.raises(
        UserError, match=rf"the loss is {bad} at step 5 in rows 72 of train; .* 0\.1$"
    ):
        guard.watch(5, logits.sum(), logits, row_ids)
        assert device == "cuda"  # a CPU has the value at once
        guard.on_train_end(args, TrainerState(), TrainerControl())


def test_an_infinite_loss_of_finite_logits_names_all_rows():
    with pytest.raises(UserError, match="in rows 5, 6 of train"):
        FiniteLoss(0.1).watch(1, torch.tensor(torch.inf), torch.zeros(2, 3), torch.tensor([5, 6]))
    with pytest.raises(UserError, match="at step 1; start again"):
        FiniteLoss(0.1).watch(1, torch.tensor(torch.inf), torch.zeros(2, 3), None)


@needs_gpu
def test_a_loss_is_watched_without_waiting_for_the_gpu():
    guard, logits = FiniteLoss(0.1), torch.zeros(2, 3, device="cuda")
    guard.watch(1, logits.mean(), logits, None)
    torch.cuda.synchronize()
    start = time.perf_counter()
    torch.cuda._sleep(2_000_000_000)  # about a second
    guard.watch(2, logits.mean(), logits, None)
    assert time.perf_counter() - start < 0.2
    torch.cuda.synchronize()


def test_a_signal_stops_training_only_between_steps(args):
    signals = StopSignals()
    events = (signals.on_step_end, signals.on_prediction_step)
    with signals.deferred():
        for event in events:
            event(args, TrainerState(), TrainerControl())
        signal.raise_signal(signal.SIGTERM)
        for event in events:
            with pytest.raises(Stopped):
                event(args, TrainerState(), TrainerControl())
    signals.on_prediction_step(args, TrainerState(), TrainerControl())  # outside training


def test_only_errors_of_a_dead_worker_are_reported_as_such():
    raising = compile("raise EOFError", "site-packages/torch/utils/data/dataloader.py", "exec")
    with pytest.raises(RuntimeError, match="DataLoader worker died"), worker_errors():
        exec(raising)
    with pytest.raises(BrokenPipeError), worker_errors():  # a closed pipe, not a worker
        raise BrokenPipeError

"""hf_cifar.training.averaging: the average of the weights, and when the model has it."""

import pytest
import torch
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_cifar.training.averaging import TRAINED_FILE, WeightAverage


@pytest.fixture
def args(tmp_path):
    return TrainingArguments(output_dir=tmp_path, use_cpu=True)


def train(average, args, values, model=None):
    """Run steps that set the weight of a model to each of `values`."""
    model = model or nn.Linear(1, 1, bias=False)
    state = TrainerState()
    average.on_train_begin(args, state, TrainerControl(), model=model)
    for step, value in enumerate(values, start=1):
        model.weight.data.fill_(value)
        state.global_step = step
        average.on_step_end(args, state, TrainerControl(), model=model)
    return model, state


def averaged(values, decay):
    average = values[0]
    for step, value in enumerate(values, start=1):
        kept = min(decay, 1 - step**-0.75)  # a decay that grows with the steps
        average = kept * average + (1 - kept) * value
    return average


def test_the_average_is_evaluated_but_not_trained(args):
    average = WeightAverage(0.9)
    values = [1.0, 2.0, 4.0, 8.0]
    model, _ = train(average, args, values)
    with pytest.raises(ZeroDivisionError), average.applied(model):
        assert model.weight.item() == pytest.approx(averaged(values, 0.9))
        raise ZeroDivisionError
    assert model.weight.item() == 8.0


@pytest.mark.parametrize("best", [None, "checkpoint-2"])
def test_training_ends_with_the_average_unless_the_best_checkpoint_is_loaded(args, best):
    args.load_best_model_at_end = True
    average = WeightAverage(0.5)
    model, state = train(average, args, [1.0, 3.0])
    state.best_model_checkpoint = best
    average.on_train_end(args, state, TrainerControl(), model=model)
    expected = 3.0 if best else averaged([1.0, 3.0], 0.5)
    assert model.weight.item() == pytest.approx(expected)
    with average.applied(model):
        assert model.weight.item() == pytest.approx(expected)


def test_a_resumed_average_equals_an_uninterrupted_one(args, tmp_path):
    values = [1.0, 3.0, 5.0, 2.0]
    average = WeightAverage(0.9)
    uninterrupted, _ = train(average, args, values)
    first = WeightAverage(0.9)
    model, _ = train(first, args, values[:2])
    first.save_trained(model, tmp_path)
    with first.applied(model):
        saved = {name: value.clone() for name, value in model.state_dict().items()}
    resumed = WeightAverage(0.9)
    resumed.checkpoint = str(tmp_path)
    model = nn.Linear(1, 1, bias=False)
    model.load_state_dict(saved)  # as the Trainer does
    state = TrainerState()
    resumed.on_train_begin(args, state, TrainerControl(), model=model)
    assert model.weight.item() == 3.0
    for step in (3, 4):
        model.weight.data.fill_(values[step - 1])
        state.global_step = step
        resumed.on_step_end(args, state, TrainerControl(), model=model)
    with average.applied(uninterrupted), resumed.applied(model):
        assert torch.equal(uninterrupted.weight, model.weight)


def test_without_a_decay_there_is_no_average(args, tmp_path):
    average = WeightAverage(0.0)
    model, state = train(average, args, [1.0, 3.0])
    with average.applied(model):
        assert model.weight.item() == 3.0
    average.save_trained(model, tmp_path)
    average.on_train_end(args, state, TrainerControl(), model=model)
    assert model.weight.item() == 3.0
    assert not (tmp_path / TRAINED_FILE).exists()

"""hf_cifar.training.unfreezing: what trains when, and that nothing else moves."""

import logging

import pytest
import torch
from tiny import tiny_trainer
from transformers import TrainerCallback

from hf_cifar.errors import UserError
from hf_cifar.training.unfreezing import turns_of

SHORT = ["--eval_strategy", "no", "--save_strategy", "no", "--warmup_steps", "0"]
RESNET = ["--model_name_or_path", "scratch/test_resnet", "--image_size", "32"]
TURNS = {
    "classifier": 0,
    "vit.layernorm": 1,
    "vit.layers.1.": 1,
    "vit.layers.0.": 2,
    "vit.embeddings": 3,
}


class Steps(TrainerCallback):
    """Records which parameters have moved in each step, by name, and which have gradients."""

    def __init__(self, model):
        self.before = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.moved, self.with_gradient = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = model.named_parameters()
        self.with_gradient.append({name for name, p in named if p.grad is not None})

    def on_step_end(self, args, state, control, model=None, **kwargs):
        now = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.moved.append({name for name in now if not torch.equal(now[name], self.before[name])})
        self.before = now


def steps_of(folder, data, model, *flags):
    trainer = tiny_trainer(folder / "run", data, model, *SHORT, *flags)
    steps = Steps(trainer.model)
    trainer.add_callback(steps)
    trainer.train()
    return trainer, steps


def expected(model, turn, turns):
    return {name for name, p in model.named_parameters() if turns[p] <= turn}


def test_the_order_of_the_layers(tmp_path, stripes, tiny_vit):
    model = tiny_trainer(tmp_path / "run", stripes, tiny_vit).model
    turns = turns_of(model)
    for name, parameter in model.named_parameters():
        turn = next(t for prefix, t in TURNS.items() if name.startswith(prefix))
        assert turns[parameter] == turn, name


@pytest.mark.parametrize("flags", [
    [], ["--optim", "sgd", "--optim_args", "momentum=0.9"], ["--optim", "adam"], ["--optim", "muon"],
    ["--optim", "lion"], ["--optim", "lamb"], ["--l1_decay", "0.1"], ["--layer_decay", "0.9"],
    ["--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "4"], ["--sam_rho", "0.1"],
])  # fmt: skip
def test_one_more_block_trains_after_each_third_of_an_epoch(flags, tmp_path, stripes, tiny_vit):
    """An epoch has 9 steps. Decay, momentum and L1 do not move what is frozen."""
    options = [
        "--unfreeze_epochs",
        str(1 / 3),
        "--max_steps",
        "11",
        "--weight_decay",
        "0.5",
        *flags,
    ]
    trainer, steps = steps_of(tmp_path, stripes, tiny_vit, *options)
    turns = turns_of(trainer.model)
    assert len(steps.moved) == 11
    for step, (moved, with_gradient) in enumerate(
        zip(steps.moved, steps.with_gradient, strict=True)
    ):
        trains = expected(trainer.model, step // 3, turns)
        assert with_gradient == trains, step
        assert moved <= trains, step
        assert len(moved) > 0.5 * len(trains), step  # the gradient of a key's bias is 0
    assert len(trainer.optimizer.param_groups[0]["params"]) > 0
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainer.model.parameters()}


def test_norms_of_frozen_blocks_keep_their_statistics(tmp_path, stripes):
    flags = [*RESNET, "--unfreeze_epochs", "0.25", "--max_steps", "5"]  # 2.25 and 4.5 steps
    trainer, _ = steps_of(tmp_path, stripes, "", *flags)
    counts = {
        name.split(".")[1]: int(value)
        for name, value in trainer.model.named_buffers()
        if name.endswith("num_batches_tracked")
    }
    assert counts.pop("layer4") == 2
    assert len(counts) > 3 and set(counts.values()) == {0}


def test_blocks_that_never_train_are_counted(tmp_path, stripes, tiny_vit, caplog):
    caplog.set_level(logging.INFO, "hf_cifar")
    flags = ["--unfreeze_epochs", "0.5", "--max_steps", "9"]
    steps_of(tmp_path / "short", stripes, tiny_vit, *flags)
    lines = [record.message for record in caplog.records if record.name.endswith("unfreezing")]
    assert lines == [
        "gradual unfreezing: the head trains first, then one more of 2 blocks every 0.5 epochs",
        "gradual unfreezing: only the last 1 of 2 blocks will train, because the run has 1 epochs; the "
        "first layers would train after 1.5",
        "gradual unfreezing: the last 1 of 2 blocks trained",
    ]
    caplog.clear()
    steps_of(tmp_path / "long", stripes, tiny_vit, "--unfreeze_epochs", "0.3", "--max_steps", "12")
    lines = [record.message for record in caplog.records if record.name.endswith("unfreezing")]
    assert len(lines) == 2 and lines[1].endswith("the last 2 of 2 blocks trained")


def test_a_second_run_of_the_same_trainer_starts_with_the_head(tmp_path, stripes, tiny_vit):
    flags = ["--unfreeze_epochs", "1", "--max_steps", "3"]
    trainer, steps = steps_of(tmp_path, stripes, tiny_vit, *flags)
    trainer.optimizer = None
    trainer.train()
    assert all(
        moved <= {"classifier.weight", "classifier.bias"}
        for moved in steps.moved[:3] + steps.moved[4:]
    )
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainer.model.parameters()}


def test_a_model_without_blocks_is_refused(tmp_path, stripes):
    with pytest.raises(UserError, match=r"has no stages or blocks.*--unfreeze_epochs"):
        tiny_trainer(tmp_path, stripes, "scratch/article_mlp", "--unfreeze_epochs", "1")


def test_a_stream_has_epochs_too(tmp_path, shards, tiny_vit):
    flags = [
        "--streaming",
        "--max_eval_samples",
        "8",
        "--unfreeze_epochs",
        "0.5",
        "--max_steps",
        "6",
    ]
    trainer, steps = steps_of(tmp_path, shards, tiny_vit, *flags)
    turns = turns_of(trainer.model)
    for step, with_gradient in enumerate(steps.with_gradient):  # an epoch has 9 steps
        assert with_gradient == expected(trainer.model, step // 5, turns), step

"""Techniques that are options: a resumed run ends with the bits of an uninterrupted one."""

import pytest
import torch
from tiny import tiny_trainer

from hf_cifar import RunConfig
from hf_cifar.errors import UserError

LONG_TAIL = ["--imbalance_factor", "4", "--class_balance"]
TIMM = ["--model_name_or_path", "scratch/test_resnet", "--image_size", "32"]
TECHNIQUES = {
    "exponential": ["--lr_scheduler_type", "exponential"],
    "step": ["--lr_scheduler_type", "step", "--lr_scheduler_kwargs", '{"decay_steps": 3}'],
    "multistep": ["--lr_scheduler_type", "multistep"],
    "inverse_time": ["--lr_scheduler_type", "inverse_time"],
    "one_cycle": ["--lr_scheduler_type", "one_cycle"],
    "plateau": [
        "--lr_scheduler_type", "reduce_lr_on_plateau", "--warmup_steps", "3",
        "--lr_scheduler_kwargs", '{"patience": 0, "factor": 0.5, "threshold": 0.5}',
    ],
    "adam": ["--optim", "adam"],
    "lion": ["--optim", "lion"],
    "muon": ["--optim", "muon"],
    "nesterov": ["--optim", "nesterov"],
    "lamb": ["--optim", "lamb"],
    "adopt": ["--optim", "adopt"],
    "l1_decay": ["--l1_decay", "0.01"],
    "backbone_learning_rate": ["--backbone_learning_rate", "1e-3", "--layer_decay", "0.5"],
    # An epoch has 9 steps: blocks begin to train at steps 3 and 6.
    "unfreezing": ["--unfreeze_epochs", "0.3"],
    "unfreezing, momentum": ["--unfreeze_epochs", "0.3", "--optim", "nesterov"],
    "unfreezing, norms": ["--unfreeze_epochs", "0.15", *TIMM],
    "unfreezing, average": ["--unfreeze_epochs", "0.3", "--ema_decay", "0.9"],
    "sam": ["--sam_rho", "0.05"],
    "sam, norms": ["--sam_rho", "0.05", "--dropout", "0.2", *TIMM],
    "dropout": ["--dropout", "0.3"],
    "drop_path": ["--drop_path", "0.3", "--dropout", "0.3", *TIMM],
    "focal": ["--loss", "focal"],
    "oversample": [*LONG_TAIL, "oversample"],
    "undersample": [*LONG_TAIL, "undersample"],
    "weights": [*LONG_TAIL, "weights"],
    "effective": [*LONG_TAIL, "effective"],
    "logit_adjustment": [*LONG_TAIL, "logit_adjustment"],
    "lora": ["--lora_rank", "4"],
}  # fmt: skip
STEPS = ["--max_steps", "8", "--save_strategy", "steps", "--save_steps", "2"]
STEPS += ["--save_total_limit", "9", "--load_best_model_at_end", "false"]


@pytest.mark.slow
@pytest.mark.parametrize("name", TECHNIQUES)
def test_resumed_training_has_the_same_bits(name, tmp_path, stripes, tiny_vit):
    flags = [*STEPS, *TECHNIQUES[name]]
    complete = tiny_trainer(tmp_path / "run", stripes, tiny_vit, *flags)
    before = {key: value.clone() for key, value in complete.model.state_dict().items()}
    complete.train()
    resumed = tiny_trainer(tmp_path / "run", stripes, tiny_vit, *flags)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    weights = complete.model.state_dict()
    common = weights.keys() & before.keys()  # merged LoRA has other names
    assert any(not torch.equal(weights[key], before[key]) for key in common)
    for key, value in resumed.model.state_dict().items():
        assert torch.equal(value, weights[key]), key


def test_the_solved_head_takes_no_other_loss(tmp_path, stripes, tiny_vit):
    solver = ["--freeze", "backbone", "--head_solver", "lbfgs"]
    for flags in (["--loss", "focal"], ["--class_balance", "weights"]):
        with pytest.raises(
            UserError, match="lbfgs minimises plain cross-entropy; leave out --loss"
        ):
            tiny_trainer(tmp_path / "run", stripes, tiny_vit, *solver, *flags)


@pytest.mark.parametrize(
    "flags",
    [
        ["--sam_rho", "0.05"], ["--ema_decay", "0.9"], ["--l1_decay", "0.1"],
        ["--early_stopping_patience", "2"],
    ],
)  # fmt: skip
def test_options_of_steps_are_refused_for_a_solved_head(flags):
    solver = ["--freeze", "backbone", "--head_solver", "lbfgs"]
    with pytest.raises(UserError, match=f"{flags[0]} has no effect with --head_solver lbfgs"):
        RunConfig.parse([*solver, *flags])


def test_a_decay_by_layer_is_refused_for_a_head():
    with pytest.raises(UserError, match="--layer_decay has no effect with --freeze backbone"):
        RunConfig.parse(["--freeze", "backbone", "--layer_decay", "0.8"])


def test_unequal_classes_are_stated_with_what_to_do(tmp_path, stripes, tiny_vit, caplog):
    caplog.set_level("INFO", logger="hf_cifar")
    tiny_trainer(tmp_path / "run", stripes, tiny_vit)
    tiny_trainer(tmp_path / "run", stripes, tiny_vit, *LONG_TAIL, "weights")
    assert "rare classes" not in caplog.text
    trainer = tiny_trainer(tmp_path / "run", stripes, tiny_vit, "--imbalance_factor", "8")
    counts = torch.bincount(torch.as_tensor(trainer.train_dataset.labels)).tolist()
    names = list(trainer.model.config.id2label.values())
    assert (
        f"train: class {names[0]!r} has {counts[0]} images, {names[1]!r} has {counts[1]}; rare classes"
    ) in caplog.text

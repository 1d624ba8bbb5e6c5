"""Techniques that are options: a resumed run ends with the bits of an uninterrupted one."""

import pytest
import torch
from tiny import tiny_trainer

from hf_cifar.errors import UserError

LONG_TAIL = ["--imbalance_factor", "4", "--class_balance"]
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
    assert not torch.equal(weights["classifier.weight"], before["classifier.weight"])
    for key, value in resumed.model.state_dict().items():
        assert torch.equal(value, weights[key]), key


def test_the_solved_head_takes_no_other_loss(tmp_path, stripes, tiny_vit):
    solver = ["--freeze", "backbone", "--head_solver", "lbfgs"]
    for flags in (["--loss", "focal"], ["--class_balance", "weights"]):
        with pytest.raises(
            UserError, match="lbfgs minimises plain cross-entropy; leave out --loss"
        ):
            tiny_trainer(tmp_path / "run", stripes, tiny_vit, *solver, *flags)

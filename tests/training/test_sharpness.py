"""hf_cifar.training.sharpness: steps with gradients from uphill, compared with plain torch."""

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_trainer
from torch import nn
from torch.utils.data import SequentialSampler

from hf_cifar.training.sharpness import SharpnessAware

RATE, RHO = 0.1, 0.05
PLAIN = [
    "--optim", "sgd", "--learning_rate", str(RATE), "--lr_scheduler_type", "constant", "--warmup_steps", "0",
    "--weight_decay", "0", "--max_grad_norm", "0", "--label_smoothing_factor", "0", "--crop_padding", "0",
    "--flip", "0", "--max_steps", "1", "--per_device_train_batch_size", "24", "--eval_strategy", "no",
    "--save_strategy", "no",
]  # fmt: skip
RESNET = ["--model_name_or_path", "scratch/test_resnet", "--image_size", "32"]


def trained(folder, data, model, *flags):
    """A Trainer after its run, whose images come in order, and the weights before."""
    trainer = tiny_trainer(folder / "run", data, model, *PLAIN, "--probe_images", "0", *flags)
    trainer.sampler = SequentialSampler(trainer.train_dataset)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    return trainer, before


def batches(trainer, count):
    """The first images of train, prepared, and their labels, in batches of 24."""
    store = trainer.train_dataset
    for i in range(count):
        batch = store.__getitems__(list(range(24 * i, 24 * i + 24)))
        yield trainer.preprocessing(batch["pixel_values"], trainer.memory_format), batch["labels"]


def gradients(model, pixel_values, labels):
    model.zero_grad()
    F.cross_entropy(model(pixel_values=pixel_values).logits, labels).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def by_hand(model, before, given):
    """The weights after one step of SGD with gradients from uphill, averaged over batches."""
    model.load_state_dict(before)
    model.train()
    weights, total, given = dict(model.named_parameters()), {}, list(given)
    for pixel_values, labels in given:
        uphill = gradients(model, pixel_values, labels)
        norm = sum(g.square().sum() for g in uphill.values()).sqrt()
        with torch.no_grad():
            for name, parameter in weights.items():
                parameter.copy_(before[name] + RHO * uphill[name] / norm)
        for name, gradient in gradients(model, pixel_values, labels).items():
            total[name] = total.get(name, 0) + gradient / len(given)
        with torch.no_grad():
            for name, parameter in weights.items():
                parameter.copy_(before[name])
    return {name: before[name] - RATE * total[name] for name in weights}


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("model", ["vit", "resnet"])
def test_a_step_is_that_of_plain_torch(model, micro_batches, tmp_path, stripes, tiny_vit):
    flags = ["--gradient_accumulation_steps", str(micro_batches), "--sam_rho", str(RHO)]
    flags += RESNET if model == "resnet" else []
    trainer, before = trained(tmp_path, stripes, tiny_vit, *flags)
    after = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    expected = by_hand(trainer.model, before, batches(trainer, micro_batches))
    moved = 0.0
    for name, value in expected.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=2e-6)
        moved = max(moved, (value - before[name]).abs().max().item())
    assert moved > 1e-3


def test_without_a_radius_nothing_changes(tmp_path, stripes, tiny_vit):
    plain, _ = trained(tmp_path / "0", stripes, tiny_vit, "--max_steps", "3")
    off, _ = trained(tmp_path / "1", stripes, tiny_vit, "--max_steps", "3", "--sam_rho", "0")
    on, _ = trained(tmp_path / "2", stripes, tiny_vit, "--max_steps", "3", "--sam_rho", "0.05")
    for name, value in plain.model.state_dict().items():
        assert torch.equal(off.model.state_dict()[name], value), name
    weights = [run.model.classifier.weight for run in (plain, on)]
    assert not torch.equal(*weights)


def test_batch_norms_count_each_batch_once_and_at_the_weights_themselves(tmp_path, stripes):
    runs = [
        trained(tmp_path / rho, stripes, "", *RESNET, "--sam_rho", rho)[0] for rho in ("0", "0.5")
    ]
    statistics = [dict(run.model.named_buffers()) for run in runs]
    assert statistics[0]["timm_model.bn1.num_batches_tracked"] == 1
    for name, value in statistics[0].items():
        assert torch.equal(statistics[1][name], value), name
    assert all(norm.track_running_stats for norm in runs[1]._norms)


@pytest.mark.parametrize("flags", [["--bf16"], ["--freeze", "1"], ["--freeze", "backbone"]])
def test_it_works_in_bfloat16_with_a_frozen_backbone_and_on_features(
    flags, tmp_path, stripes, tiny_vit
):
    """The third trains the head alone, on features that are computed once."""
    plain, before = trained(tmp_path / "0", stripes, tiny_vit, *flags)
    sharp, _ = trained(tmp_path / "1", stripes, tiny_vit, *flags, "--sam_rho", "0.5")
    after = sharp.model.state_dict()
    for name, parameter in sharp.model.named_parameters():
        assert torch.equal(after[name], before[name]) is not parameter.requires_grad, name
    weights = [run.model.classifier.weight for run in (plain, sharp)]
    assert not torch.equal(*weights)


def test_both_passes_drop_the_same_units():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 1))
    sharpness, seen = SharpnessAware(0.1), []

    def loss(model):
        seen.append(model[0](torch.ones(8)))
        return model[1](seen[-1]).sum()

    with sharpness.step():
        sharpness.climb(model, loss)
        loss(model)
    assert torch.equal(*seen) and 0 < seen[0].count_nonzero() < 8


def test_the_weights_return_bit_by_bit_after_an_error():
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    sharpness = SharpnessAware(0.1)
    with pytest.raises(ZeroDivisionError), sharpness.step():
        sharpness.climb(model, lambda model: model(torch.ones(3)).sum())
        moved = torch.cat([(model.weight - before).flatten(), model.bias - model.bias])
        raise ZeroDivisionError
    assert moved.norm() > 0.05
    assert torch.equal(model.weight, before)
    sharpness.climb(model, lambda model: model(torch.ones(3)).sum())  # outside of a step
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("factor", [0.0, float("inf"), 65536.0, 1e-9])
def test_the_length_of_the_gradient_does_not_matter(factor):
    """Scaled losses move the weights as far; without a direction, they stay."""
    model = nn.Linear(3, 2)
    before = nn.utils.parameters_to_vector(model.parameters()).clone()
    sharpness = SharpnessAware(0.1)
    with sharpness.step():
        sharpness.climb(model, lambda model: model(torch.ones(3)).sum() * factor)
        moved = nn.utils.parameters_to_vector(model.parameters()) - before
    expected = 0.1 if factor in (65536.0, 1e-9) else 0.0
    assert moved.norm().item() == pytest.approx(expected, rel=1e-3)

"""hf_cifar.training.trainer: the changes of the subclass, compared with plain torch."""

import json
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_trainer
from transformers import ResNetConfig, ResNetForImageClassification


def make_trainer(folder, data, model, *flags):
    brief = ("--max_steps", "2", "--eval_strategy", "no", "--save_strategy", "no")
    return tiny_trainer(folder / "run", data, model, "--learning_rate", "1e-3", *brief, *flags)


@pytest.fixture(scope="module")
def tiny_resnet(tmp_path_factory):
    """A transformers ResNet: its forward takes **kwargs and ignores num_items_in_batch."""
    from transformers import ConvNextImageProcessor

    folder = tmp_path_factory.mktemp("tiny_resnet")
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    ResNetForImageClassification(config).save_pretrained(folder)
    ConvNextImageProcessor(size={"shortest_edge": 16}, crop_pct=1.0).save_pretrained(folder)
    return folder


def first_batch(trainer):
    return next(iter(trainer.get_train_dataloader()))


def test_the_loader_moves_uint8(tmp_path, stripes, tiny_vit):
    batch = first_batch(make_trainer(tmp_path, stripes, tiny_vit))
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["pixel_values"].shape == (8, 3, 16, 16)


def test_training_batches_are_augmented_and_evaluation_batches_are_not(tmp_path, stripes, tiny_vit):
    trainer = make_trainer(tmp_path, stripes, tiny_vit)
    batch = first_batch(trainer)
    plain = trainer.preprocessing(batch["pixel_values"])
    trainer.model.eval()
    assert torch.equal(trainer._prepare_inputs(batch)["pixel_values"], plain)
    trainer.model.train()
    assert not torch.equal(trainer._prepare_inputs(batch)["pixel_values"], plain)


AUGMENTATIONS = [
    ["--crop_padding", "0.2"], ["--crop_scale", "0.3"], ["--flip", "0.5"], ["--rotation", "20"],
    ["--shear", "0.3"], ["--zoom", "0.3"], ["--color_jitter", "0.4"], ["--hue", "0.3"],
    ["--grayscale", "0.5"], ["--auto_augment", "trivial_augment"],
    ["--auto_augment", "rand_augment"], ["--random_erasing", "0.9"],
    ["--mixup_alpha", "0.8"], ["--cutmix_alpha", "1"],
]  # fmt: skip


@pytest.mark.parametrize("flags", AUGMENTATIONS, ids=" ".join)
def test_every_augmentation_option_changes_the_batch(tmp_path, colours, tiny_vit, flags):
    quiet = ["--crop_padding", "0", "--flip", "0"]
    trainer = make_trainer(tmp_path, colours, tiny_vit, *quiet, *flags)
    batch = first_batch(trainer)
    plain = trainer.preprocessing(batch["pixel_values"])
    trainer.model.train()
    inputs = trainer._prepare_inputs(batch)
    assert not torch.allclose(inputs["pixel_values"], plain, atol=1e-2)
    assert torch.isfinite(trainer.compute_loss(trainer.model, inputs))


@pytest.mark.parametrize(
    "flags", [["--rand_augment_ops", "5"], ["--rand_augment_magnitude", "25"]], ids=" ".join
)
def test_rand_augment_takes_its_options(tmp_path, colours, tiny_vit, flags):
    inputs = []
    for chosen in ([], flags):
        trainer = make_trainer(
            tmp_path, colours, tiny_vit, "--auto_augment", "rand_augment", *chosen
        )
        batch = first_batch(trainer)
        trainer.model.train()
        inputs.append(trainer._prepare_inputs(batch)["pixel_values"])
    assert not torch.equal(*inputs)


def test_a_mixed_batch_trains_on_soft_targets(tmp_path, stripes, tiny_vit):
    trainer = make_trainer(tmp_path, stripes, tiny_vit, "--mixup_alpha", "1")
    trainer.model.train()
    inputs = trainer._prepare_inputs(first_batch(trainer))
    logits = trainer.model(inputs["pixel_values"]).logits
    targets = inputs["labels"]
    assert targets.shape == (8, 2)
    assert ((targets > 0.01) & (targets < 0.99)).any()
    smoothed = 0.9 * targets + 0.1 / 2
    by_hand = -(smoothed * logits.log_softmax(dim=1)).sum(dim=1).mean()
    assert torch.allclose(trainer.compute_loss(trainer.model, inputs), by_hand, atol=1e-6)
    trainer.model.eval()
    assert trainer._prepare_inputs(first_batch(trainer))["labels"].ndim == 1


def test_randomness_depends_only_on_seed_step_micro_batch_and_rank(tmp_path, stripes, tiny_vit):
    trainer = make_trainer(tmp_path, stripes, tiny_vit)

    def draw(step):
        trainer.state.global_step = step
        return torch.rand(4, generator=trainer._step_generator())

    first, second_micro, next_step = draw(3), draw(3), draw(4)
    assert not torch.equal(first, second_micro)
    assert not torch.equal(first, next_step)
    other = make_trainer(tmp_path, stripes, tiny_vit)
    other.state.global_step = 3
    torch.rand(100)  # the global generator is not used
    assert torch.equal(torch.rand(4, generator=other._step_generator()), first)


def test_loss_is_cross_entropy_smoothed_only_in_training(tmp_path, stripes, tiny_vit):
    trainer = make_trainer(tmp_path, stripes, tiny_vit, "--label_smoothing_factor", "0.2")
    inputs = {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.tensor([0, 1, 0, 1])}
    for training, smoothing in ((True, 0.2), (False, 0.0)):
        trainer.model.train(training)
        loss, outputs = trainer.compute_loss(trainer.model, inputs, return_outputs=True)
        wanted = F.cross_entropy(outputs["logits"], inputs["labels"], label_smoothing=smoothing)
        assert torch.allclose(loss, wanted)


def gradient_norm(trainer):
    """Return the gradient norm of the first optimiser step, before clipping."""
    trainer.train()
    return next(log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log)


@pytest.mark.parametrize("model", ["tiny_vit", "tiny_resnet"])
def test_gradients_are_the_same_with_and_without_accumulation(tmp_path, stripes, model, request):
    folder = request.getfixturevalue(model)
    # BatchNorm statistics depend on the micro-batch; a frozen backbone keeps them out of the comparison.
    flags = ["--freeze", "backbone", "--crop_padding", "0", "--flip", "0", "--logging_steps", "1"]
    flags += ["--max_steps", "1", "--max_grad_norm", "1000"]
    complete = make_trainer(tmp_path, stripes, folder, *flags)
    parts = make_trainer(
        tmp_path, stripes, folder, *flags, "--per_device_train_batch_size", "2",
        "--gradient_accumulation_steps", "4",
    )  # fmt: skip
    parts.model.load_state_dict(complete.model.state_dict())
    assert gradient_norm(parts) == pytest.approx(gradient_norm(complete), rel=1e-4)


def test_weight_decay_applies_only_to_weights(tmp_path, stripes, tiny_vit):
    trainer = make_trainer(tmp_path, stripes, tiny_vit, "--weight_decay", "0.3")
    optimizer = trainer.create_optimizer()
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0)
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    assert {names[id(p)] for p in plain["params"]} >= {
        "vit.embeddings.cls_token",
        "vit.embeddings.position_embeddings",
        "classifier.bias",
    }
    assert all(names[id(p)].endswith("weight") and p.ndim > 1 for p in decayed["params"])


def test_frozen_batchnorm_keeps_its_statistics_in_training(tmp_path, stripes, tiny_resnet):
    trainer = make_trainer(tmp_path, stripes, tiny_resnet, "--freeze", "backbone")
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.train()
    after = trainer.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"classifier.1.weight", "classifier.1.bias"}


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_in_mid_epoch_is_bit_exact_with_augmentation(tmp_path, stripes, tiny_vit, workers):
    flags = ["--save_strategy", "steps", "--save_steps", "3", "--max_steps", "7"]
    flags += ["--save_total_limit", "9"]
    flags += ["--crop_scale", "0.6", "--rotation", "10", "--dataloader_num_workers", str(workers)]
    complete = make_trainer(tmp_path, stripes, tiny_vit, *flags)
    complete.train()
    resumed = make_trainer(tmp_path, stripes, tiny_vit, *flags)
    checkpoint = tmp_path / "run" / "checkpoint-3"
    kept = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]
    start = time.perf_counter()
    resumed.train(resume_from_checkpoint=str(checkpoint))
    before = kept["Resuming"]["attributes"]["seconds"]
    assert before > 0  # the time of both parts
    assert before < resumed.resuming.seconds < before + time.perf_counter() - start
    for name, value in complete.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_bf16_trains(tmp_path, stripes, tiny_vit):
    trainer = make_trainer(tmp_path, stripes, tiny_vit, "--bf16", "--max_steps", "30")
    dtypes = []
    trainer.model.classifier.register_forward_hook(lambda m, i, output: dtypes.append(output.dtype))
    before = trainer.model.classifier.weight.clone()
    trainer.train()
    assert set(dtypes) == {torch.bfloat16}
    assert trainer.model.classifier.weight.dtype == torch.float32
    assert not torch.equal(before, trainer.model.classifier.weight)


def test_earlier_blocks_learn_more_slowly(tmp_path, stripes, tiny_vit):
    trainer = make_trainer(
        tmp_path, stripes, tiny_vit, "--layer_decay", "0.5", "--learning_rate", "0.1", "--optim", "sgd",
        "--lr_scheduler_type", "constant", "--warmup_steps", "0", "--max_grad_norm", "0",
        "--weight_decay", "0", "--max_steps", "1",
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    gradients = {}
    for name, parameter in trainer.model.named_parameters():
        parameter.register_hook(lambda grad, name=name: gradients.update({name: grad.clone()}))
    trainer.create_optimizer()
    trainer.create_optimizer()  # twice, as the Trainer may do: the rates decay once
    trainer.train()
    depths = {
        "vit.embeddings": 3,
        "vit.layers.0.": 2,
        "vit.layers.1.": 1,
        "vit.layernorm": 0,
        "classifier": 0,
    }
    for name, parameter in trainer.model.named_parameters():
        depth = next(d for prefix, d in depths.items() if name.startswith(prefix))
        expected = before[name] - 0.1 * 0.5**depth * gradients[name]
        torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-6)


def test_it_learns(tmp_path, stripes, tiny_vit):
    trainer = make_trainer(
        tmp_path, stripes, tiny_vit, "--max_steps", "100", "--learning_rate", "3e-3"
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == 1.0
    assert metrics["eval_cross_entropy"] < 0.2


def test_training_metrics_are_those_of_the_predictions(tmp_path, stripes, tiny_vit):
    trainer = make_trainer(tmp_path, stripes, tiny_vit)
    output = trainer.predict(trainer.eval_dataset)
    assert np.array_equal(output.label_ids, trainer.eval_dataset.labels.numpy())
    right = (output.predictions.argmax(1) == output.label_ids).mean()
    assert output.metrics["test_accuracy"] == pytest.approx(right)

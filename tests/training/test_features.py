"""hf_cifar.training.features: a head trained on cached features is the head of the uncached run."""

import dataclasses
import json

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from tiny import tiny_config, tiny_trainer
from transformers import AutoModelForImageClassification

from hf_cifar.cli import main
from hf_cifar.config.data import DataConfig
from hf_cifar.data.splits import load_splits
from hf_cifar.data.store import ResidentStore
from hf_cifar.errors import UserError
from hf_cifar.finetune import finetune_classifier
from hf_cifar.models.build import build_model
from hf_cifar.models.heads import linear_head
from hf_cifar.plan import plan_run
from hf_cifar.training.build import build_trainer
from hf_cifar.training.features import (
    PENALTIES,
    FeatureStore,
    HeadSolver,
    accepting_features,
    draw_view,
    features_suffice,
    fit_head,
)
from hf_cifar.training.losses import evaluation_loss

MODELS = ["tiny_vit", "scratch/resnet10t", "scratch/densenet121", "scratch/efficientnet_lite0"]


def parse(folder, data, model, *flags):
    head = ("--freeze", "backbone", "--learning_rate", "0.05", "--num_train_epochs", "3")
    return tiny_config(folder / "run", data, model, *head, *flags)


def make_trainer(config):
    torch.manual_seed(0)
    splits = load_splits(config.data)
    model, processor = build_model(config.model, splits.id2label)
    return build_trainer(
        model, processor, splits, plan_run(config, model, processor, splits)
    ), splits


@pytest.mark.parametrize("name", MODELS)
def test_features_give_the_logits_of_the_model(tmp_path, stripes, request, name):
    model = name if "/" in name else request.getfixturevalue(name)
    trainer, splits = make_trainer(parse(tmp_path, stripes, model, "--image_size", "32"))
    assert isinstance(trainer.train_dataset, FeatureStore)
    batch = trainer.train_dataset.__getitems__([3, 1, 7])
    images = torch.from_numpy(splits.train.pictures("")[[3, 1, 7]]).permute(0, 3, 1, 2)
    trainer.model.eval()
    with torch.inference_mode():
        whole = trainer.model(pixel_values=trainer.preprocessing(images)).logits
        with accepting_features(trainer.model, trainer.train_dataset):
            fast = trainer.model(pixel_values=batch["pixel_values"][:, 0]).logits
    assert torch.allclose(fast, whole, atol=1e-4)
    assert batch["labels"].tolist() == splits.train.labels[[3, 1, 7]].tolist()


@pytest.mark.parametrize("name", ["tiny_vit", "scratch/resnet10t"])
def test_training_on_features_equals_training_the_frozen_model(tmp_path, stripes, request, name):
    """With the same order and no augmentation, the head is the same; the complete model is saved."""
    model = name if "/" in name else request.getfixturevalue(name)
    results = []
    for views in ("1", "0"):
        config = parse(
            tmp_path / views, stripes, model, "--feature_views", views, "--crop_padding", "0",
            "--flip", "0", "--num_train_epochs", "2", "--image_size", "32",
        )  # fmt: skip
        results.append(finetune_classifier(config))
    cached, uncached = (result.model.state_dict() for result in results)
    assert cached.keys() == uncached.keys()
    for key, value in cached.items():
        assert torch.allclose(value.float(), uncached[key].float(), atol=2e-4), key
    metrics = [result.metrics["validation"] for result in results]
    assert metrics[0]["accuracy"] == metrics[1]["accuracy"]
    assert "forward" not in vars(results[0].model)
    loaded = AutoModelForImageClassification.from_pretrained(results[0].output_dir)
    head = linear_head(loaded).weight
    assert torch.equal(head, linear_head(results[0].model).weight)


def test_the_next_run_reuses_features(tmp_path, stripes, tiny_vit):
    flags = ["--seed", "5", "--max_train_samples", "30", "--precision", "fp32"]
    config = parse(tmp_path, stripes, tiny_vit, *flags)
    first, _ = make_trainer(config)
    calls = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: (
            calls.append(len(output.logits))
            if type(module).__name__ == "ViTForImageClassification"
            else None
        )
    )
    try:
        again, _ = make_trainer(config)
    finally:
        hook.remove()
    assert torch.equal(first.train_dataset.features, again.train_dataset.features)
    assert all(size <= 2 for size in calls)  # only the check of the architecture


@pytest.mark.parametrize(
    "change",
    [["--image_size", "24"], ["--feature_views", "2"], ["--max_train_samples", "30"], ["--bf16"]],
)
def test_changed_conditions_give_new_features(tmp_path, stripes, tiny_vit, change):
    one, _ = make_trainer(parse(tmp_path, stripes, tiny_vit))
    other, _ = make_trainer(parse(tmp_path, stripes, tiny_vit, *change))
    features = one.train_dataset.features, other.train_dataset.features
    assert features[0].shape != features[1].shape or not torch.equal(*features)


def test_another_range_of_values_gives_new_features(tmp_path, tiny_vit):
    """Also for images that are not stored."""
    scans = [np.arange(i, i + 1024, dtype=np.uint16).reshape(32, 32) for i in range(24)]
    parts = []
    for values in ("0,2000", "0,9000"):
        config = parse(tmp_path, "", tiny_vit)
        data = DataConfig((scans, [0, 1] * 12), pixel_store="streamed", value_range=values)
        config = dataclasses.replace(config, data=data)
        parts.append(make_trainer(config)[0].train_dataset.features)
    assert not torch.equal(*parts)


def test_views_are_drawn_per_image_only_in_training(tmp_path, stripes, tiny_vit):
    trainer, _ = make_trainer(parse(tmp_path, stripes, tiny_vit, "--feature_views", "4"))
    features = trainer.train_dataset.features
    assert features.shape == (4, 72, 32)
    assert trainer.eval_dataset.features.shape == (1, 8, 32)
    assert not torch.allclose(features[1], features[2], atol=1e-3)
    batch = trainer.train_dataset.__getitems__(list(range(8)))
    trainer.model.eval()
    assert torch.equal(trainer._prepare_inputs(batch)["pixel_values"], features[0, :8])
    trainer.model.train()
    drawn = [trainer._prepare_inputs(batch)["pixel_values"] for _ in range(6)]
    views = {
        (row, view)
        for values in drawn
        for row in range(8)
        for view in range(4)
        if torch.equal(values[row], features[view, row])
    }
    assert len(views) > 16  # of 32


def test_views_do_not_depend_on_the_evaluation_batch(tmp_path, stripes, tiny_vit, monkeypatch):
    found = []
    for size in ("64", "5"):
        monkeypatch.setenv("HF_CIFAR_CACHE", str(tmp_path / size))
        flags = ["--freeze", "backbone", "--feature_views", "2", "--rotation", "20"]
        flags += ["--per_device_eval_batch_size", size]
        trainer = tiny_trainer(tmp_path / "run", stripes, tiny_vit, *flags)
        found.append(trainer.train_dataset.features)
    assert torch.allclose(*found, atol=1e-5)
    assert not torch.allclose(found[0][0], found[0][1], atol=1e-3)


def test_draw_view_without_a_generator_is_the_first():
    features = torch.arange(24.0).view(2, 3, 4)
    assert torch.equal(draw_view(features, None), features[:, 0])


def test_the_complete_model_runs_if_more_than_the_head_trains(tmp_path, stripes, tiny_vit):
    trainer, _ = make_trainer(parse(tmp_path, stripes, tiny_vit, "--freeze", "1"))
    assert isinstance(trainer.train_dataset, ResidentStore)
    assert not features_suffice(trainer.model, trainer.preprocessing)


@pytest.mark.parametrize("flags", [["--mixup_alpha", "0.2"], ["--feature_views", "0"]])
def test_the_solver_needs_features(tmp_path, stripes, tiny_vit, flags):
    config = parse(tmp_path, stripes, tiny_vit, "--head_solver", "lbfgs", *flags)
    with pytest.raises(UserError, match="--head_solver lbfgs needs --freeze backbone"):
        finetune_classifier(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("penalty", [1e-1, 1e-3])
def test_the_solved_head_equals_that_of_scikit_learn(penalty):
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, 300)
    features = generator.normal(size=(300, 6)) + np.eye(4, 6)[labels] * 1.5
    solver = HeadSolver(torch.tensor(features), torch.from_numpy(labels), 4, F.cross_entropy)
    solution = solver.solve(penalty)
    strength = 300 * penalty * np.square(features).mean()  # penalties are for scaled features
    reference = LogisticRegression(C=1 / strength, tol=1e-8, max_iter=5000)
    reference.fit(features, labels)
    assert np.allclose(solution[:, :-1], reference.coef_, atol=2e-3)
    bias = solution[:, -1].numpy()
    assert np.allclose(
        bias - bias.mean(), reference.intercept_ - reference.intercept_.mean(), atol=2e-3
    )


def test_the_solved_multi_label_head_equals_those_of_scikit_learn():
    """The mean over K classes makes each class's penalty K times as strong."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, (300, 3))
    features = generator.normal(size=(300, 6)) + np.pad(labels, ((0, 0), (0, 3))) * 1.5
    solver = HeadSolver(
        torch.tensor(features), torch.from_numpy(labels), 3, evaluation_loss(multi_label=True)
    )
    solution = solver.solve(1e-2)
    strength = 300 * 3 * 1e-2 * np.square(features).mean()
    for number, own in enumerate(solution.numpy()):
        reference = LogisticRegression(C=1 / strength, tol=1e-8, max_iter=5000)
        reference.fit(features, labels[:, number])
        assert np.allclose(own[:-1], reference.coef_[0], atol=2e-3)
        assert np.allclose(own[-1], reference.intercept_, atol=2e-3)


def test_a_solver_of_some_rows_equals_one_on_these_rows_alone():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 5, generator=generator, dtype=torch.double) + 3
    labels, chosen = torch.arange(200) % 3, torch.arange(200) % 5 > 0
    both = HeadSolver(features, labels, 3, F.cross_entropy)
    alone = HeadSolver(features[chosen], labels[chosen], 3, F.cross_entropy)
    ratio = float((both.scale / alone.scale) ** 2)
    found, expected = both.of(chosen).solve(1e-2 * ratio), alone.solve(1e-2)
    assert torch.allclose(found[:, :-1], expected[:, :-1], atol=1e-3)
    biases = found[:, -1] - expected[:, -1]  # a constant for all classes changes nothing
    assert torch.allclose(biases, biases.mean(), atol=1e-3)
    assert not both.weights.any()


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_features_that_are_not_finite_are_refused(bad):
    features = torch.randn(6, 5)
    features[2, 3] = float(bad)
    with pytest.raises(UserError, match="features of 1 of 6 images are not finite; pass"):
        HeadSolver(features, torch.arange(6) % 2, 2, F.cross_entropy)


def test_features_without_information_give_the_shares_of_the_classes():
    solver = HeadSolver(torch.zeros(8, 5), torch.arange(8) % 4 // 3, 2, F.cross_entropy)
    head = solver.solve(1.0)
    assert not head[:, :-1].any()
    assert torch.allclose(head[:, -1].softmax(0), torch.tensor([0.75, 0.25]), atol=1e-4)


def test_the_penalty_is_chosen_on_validation(tiny_vit):
    """Few noisy training images, many dimensions: a weak penalty overfits."""
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForImageClassification.from_pretrained(tiny_vit)
    labels = torch.arange(60) % 3

    def features(labels, seed):
        generator.manual_seed(seed)
        noise = torch.randn(1, len(labels), 32, generator=generator)
        return FeatureStore(noise + torch.eye(3, 32)[labels] * 1.2, labels)

    train, validation = features(labels, 0), features(torch.arange(600) % 3, 1)
    penalty = fit_head(model, train, validation)

    def loss(head):
        logits = validation.features[0] @ head[:, :-1].T + head[:, -1]
        return F.cross_entropy(logits, validation.labels).item()

    head = linear_head(model)
    chosen = loss(torch.cat((head.weight, head.bias[:, None]), dim=1).detach())
    for other in PENALTIES:
        solver = HeadSolver(train.features[0], labels, 3, F.cross_entropy)
        assert chosen <= loss(solver.solve(other)) + 1e-4
    assert 1e-6 < penalty <= 1


def test_a_model_accepts_features_until_the_block_ends(tiny_vit):
    model = AutoModelForImageClassification.from_pretrained(tiny_vit)
    store = FeatureStore(torch.zeros(1, 2, 32), torch.tensor([0, 1]))
    with accepting_features(model, store):
        assert model(pixel_values=torch.zeros(2, 32)).logits.shape == (2, 3)
        assert model(pixel_values=torch.zeros(2, 3, 16, 16)).logits.shape == (2, 3)
    with pytest.raises((ValueError, RuntimeError)):
        model(pixel_values=torch.zeros(2, 32))


@pytest.mark.slow
def test_a_solved_head_from_the_command_line(tmp_path, capsys):
    argv = [
        "finetune", "--dataset_name", "bundled/digits", "--model_name_or_path", "scratch/resnet10t",
        "--image_size", "32", "--freeze", "backbone", "--head_solver", "lbfgs", "--do_predict",
        "--output_dir", str(tmp_path / "run"), "--max_train_samples", "600",
    ]  # fmt: skip
    assert main(argv) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["test"]["accuracy"] > 0.8  # random features of digits
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["steps"] == 0
    assert facts["train_seconds"] > 0
    model = timm.create_model("resnet10t", num_classes=10)
    from safetensors.torch import load_file

    model.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"))

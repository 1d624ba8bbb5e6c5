"""hf_cifar.training.probing: a pretrained model trains from a head that is already fitted."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from tiny import tiny_config, tiny_run, tiny_trainer

from hf_cifar import load_splits, reproduce_run
from hf_cifar.data.stratify import representative_rows
from hf_cifar.errors import UserError
from hf_cifar.models.blocks import batch_norms
from hf_cifar.models.heads import has_new_head, linear_head
from hf_cifar.training import build
from hf_cifar.training.build import balanced_cross_entropy
from hf_cifar.training.features import PENALTIES, FeatureStore
from hf_cifar.training.probing import probe_head

LITE0 = "bundled/efficientnet_lite0"
SMALL = ["--image_size", "32", "--eval_strategy", "no", "--save_strategy", "no", "--max_steps", "2"]


def head_of(trainer):
    head = linear_head(trainer.model)
    return torch.cat([head.weight.detach(), head.bias.detach()[:, None]], dim=1).cpu()


def logits_of(trainer, split):
    images = torch.from_numpy(np.stack(list(split.pictures("")))).permute(0, 3, 1, 2)
    trainer.model.eval()
    with torch.inference_mode():
        pixel_values = trainer.preprocessing(images.to(trainer.args.device))
        return trainer.model(pixel_values=pixel_values).logits.cpu()


@pytest.mark.parametrize("flags", [[], ["--freeze", "1"], ["--lora_rank", "2"]])
def test_training_starts_from_a_fitted_head(tmp_path, stripes, caplog, flags):
    with caplog.at_level(logging.INFO):
        trainer = tiny_trainer(tmp_path / "run", stripes, LITE0, *SMALL, *flags)
    train = load_splits(tiny_config(tmp_path / "run", stripes, LITE0, *SMALL).data).train
    right = logits_of(trainer, train).argmax(dim=1).numpy() == train.labels
    assert right.mean() > 0.95
    assert f"head: fitted to the features of {len(train)} training images" in caplog.text
    assert not has_new_head(trainer.model)


def test_probe_images_0_leaves_the_head_random(tmp_path, stripes):
    trainer = tiny_trainer(tmp_path / "run", stripes, LITE0, *SMALL, "--probe_images", "0")
    assert has_new_head(trainer.model)


def test_the_head_is_fitted_to_a_stratified_sample(tmp_path, stripes, monkeypatch):
    """The features that it is fitted to are those of the images that the labels belong to."""
    seen = []
    monkeypatch.setattr(build, "probe_head", lambda model, store, *_: seen.append(store))
    flags = [*SMALL, "--probe_images", "20", "--precision", "fp32"]
    trainer = tiny_trainer(tmp_path / "run", stripes, LITE0, *flags)
    train = load_splits(tiny_config(tmp_path / "run", stripes, LITE0, *flags).data).train
    rows = representative_rows(train.labels, 20, 42)
    assert len(rows) == 20 and rows.tolist() != list(range(20))
    head, (store,) = linear_head(trainer.model), seen
    assert torch.equal(store.labels, torch.from_numpy(train.labels[rows]))
    expected = logits_of(trainer, train)[rows]
    torch.testing.assert_close(head(store.features[0]), expected, rtol=1e-3, atol=1e-4)


def test_the_penalty_is_chosen_on_a_fifth_of_the_images():
    """The head equals scikit-learn's on all images, at the penalty with the lowest loss on the fifth."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    means = torch.randn(4, 30, generator=generator)
    features = means[labels] + 3 * torch.randn(400, 30, generator=generator)
    model = Network(30, 4)
    probe_head(model, FeatureStore(features[None], labels), 1, torch.nn.functional.cross_entropy)

    x = (features / features.square().mean().sqrt()).numpy()
    held_out = np.isin(np.arange(400), representative_rows(labels.numpy(), 80, 1))
    probabilities = {
        p: solved(x, labels, ~held_out, p).predict_proba(x[held_out]) for p in PENALTIES
    }
    best = min(PENALTIES, key=lambda p: log_loss(labels[held_out], probabilities[p]))
    assert PENALTIES[0] > best > PENALTIES[-1]
    expected = solved(x, labels, held_out | True, best).coef_ / features.square().mean().sqrt()
    assert np.abs(model.classifier.weight.detach().numpy() - expected.numpy()).max() < 1e-3


def solved(x, labels, chosen, penalty):
    """scikit-learn's solution; it minimises C * the sum of cross-entropies + |weights|^2 / 2."""
    fitted = LogisticRegression(C=1 / (penalty * chosen.sum()), tol=1e-8, max_iter=5000)
    return fitted.fit(x[chosen], labels.numpy()[chosen])


class Network(torch.nn.Module):
    """A head alone, as `linear_head` expects it."""

    base_model_prefix = "backbone"

    def __init__(self, width, classes):
        super().__init__()
        self.config = SimpleNamespace(model_type="vit", num_labels=classes, problem_type=None)
        self.classifier = torch.nn.Linear(width, classes)


def test_a_head_of_the_same_labels_is_kept(tmp_path, stripes):
    """Training that goes on from a finished model does not fit its head again."""
    first = tiny_run(tmp_path / "first", stripes, LITE0, "--image_size", "32")
    head = head_of(first)
    trainer = tiny_trainer(tmp_path / "second", stripes, tmp_path / "first", *SMALL)
    assert torch.equal(head_of(trainer), head)


def test_a_random_network_has_no_head_to_fit(tmp_path, stripes, caplog):
    with caplog.at_level(logging.INFO):
        tiny_trainer(tmp_path / "run", stripes, "scratch/resnet10t", *SMALL)
    assert "head:" not in caplog.text


def test_multi_label_data_start_from_a_fitted_head(tmp_path, lights, caplog):
    with caplog.at_level(logging.INFO):
        trainer = tiny_trainer(tmp_path / "run", lights, LITE0, *SMALL)
    train = load_splits(tiny_config(tmp_path / "run", lights, LITE0, *SMALL).data).train
    assert ((logits_of(trainer, train) > 0).numpy() == train.labels).mean() > 0.95
    assert (
        f"head: fitted to the features of {len(train)} training images; cross-entropy on"
        in caplog.text
    )


@pytest.mark.parametrize("balance", ["none", "logit_adjustment", "oversample"])
def test_the_head_counts_classes_as_the_run_does(tmp_path, stripes, balance):
    """Without information in the features, a head predicts the classes' shares in its loss."""
    flags = ["--imbalance_factor", "9", "--class_balance", balance, *SMALL]
    config = tiny_config(tmp_path / "run", stripes, LITE0, *flags)
    splits = load_splits(config.data)
    model = Network(5, 2)
    loss = balanced_cross_entropy(model, splits.train, config.train)
    labels = torch.from_numpy(splits.train.labels)
    probe_head(model, FeatureStore(torch.zeros(1, len(labels), 5), labels), 0, loss)
    shares = np.bincount(labels) / len(labels) if balance == "none" else [0.5, 0.5]
    found = model.classifier.bias.detach().softmax(0)
    torch.testing.assert_close(found, torch.tensor(shares).float(), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--probe_images", "1"], "there are too few images (1) for the number of classes (2)"),
        (["--max_train_samples", "2", "--probe_images", "9"], None),
    ],
)
def test_too_few_images_are_not_fitted_to(tmp_path, stripes, caplog, flags, reason):
    with caplog.at_level(logging.INFO):
        trainer = tiny_trainer(tmp_path / "run", stripes, LITE0, *SMALL, *flags)
    assert has_new_head(trainer.model) == bool(reason)
    if reason:
        assert f"head: not fitted before training, because {reason}" in caplog.text


def test_a_stream_starts_from_a_random_head(tmp_path, shards, caplog):
    flags = ["--streaming", "--max_eval_samples", "8", *SMALL]
    with caplog.at_level(logging.INFO):
        trainer = tiny_trainer(tmp_path / "run", shards, LITE0, *flags)
    assert (
        "head: not fitted before training, because a stream is not read in advance" in caplog.text
    )
    assert has_new_head(trainer.model)


def test_a_race_starts_from_the_fitted_head_and_the_run_does_too(
    tmp_path, stripes, caplog, monkeypatch
):
    """The short runs leave the model as it was, so that the run itself fits the head again."""
    monkeypatch.setattr("hf_cifar.training.race.MIN_STEPS", 10)
    flags = ["--image_size", "32", "--learning_rate", "auto", "--max_steps", "400"]
    with caplog.at_level(logging.INFO):
        trainer = tiny_trainer(
            tmp_path / "run", stripes, LITE0, *flags, "--per_device_train_batch_size", "1"
        )
    assert caplog.text.count("head: fitted to the features") == 2
    assert "won the race" in caplog.text
    assert not has_new_head(trainer.model)


def test_a_run_with_a_fitted_head_is_reproduced(tmp_path, stripes):
    tiny_run(tmp_path / "run", stripes, LITE0, "--image_size", "32")
    assert reproduce_run(tmp_path / "run", tmp_path / "again")["weights"]["identical"]


@pytest.mark.parametrize("frozen", [None, "true", "false"])
def test_batch_norms_keep_the_statistics_of_a_pretrained_model(tmp_path, stripes, frozen):
    flags = [] if frozen is None else ["--freeze_batch_norm", frozen]
    trainer = tiny_trainer(tmp_path / "run", stripes, LITE0, *SMALL, *flags)
    before = [
        (n.running_mean.clone(), n.weight.detach().clone()) for n in batch_norms(trainer.model)
    ]
    trainer.train()
    after = [(n.running_mean, n.weight.detach()) for n in batch_norms(trainer.model)]
    kept = all(torch.equal(a[0].cpu(), b[0].cpu()) for a, b in zip(before, after, strict=True))
    assert kept is (frozen != "false")
    assert not all(torch.equal(a[1].cpu(), b[1].cpu()) for a, b in zip(before, after, strict=True))


def test_batch_norms_of_a_random_network_follow_the_batches(tmp_path, stripes):
    trainer = tiny_trainer(tmp_path / "run", stripes, "scratch/resnet10t", *SMALL)
    trainer.train()
    assert all(norm.running_mean.any() for norm in batch_norms(trainer.model))


@pytest.mark.parametrize("model", ["scratch/resnet10t", "tiny_vit"])
def test_a_model_without_statistics_cannot_keep_them(tmp_path, stripes, request, model):
    model = model if "/" in model else request.getfixturevalue(model)
    with pytest.raises(UserError, match="has no BatchNorm statistics to keep; leave it out"):
        tiny_trainer(tmp_path / "run", stripes, model, *SMALL, "--freeze_batch_norm", "true")

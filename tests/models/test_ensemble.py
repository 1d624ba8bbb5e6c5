"""hf_cifar.models.ensemble: one transformers model of several."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from hf_cifar.config.model import ModelConfig
from hf_cifar.models.article import ArticleCNNConfig, ArticleCNNForImageClassification
from hf_cifar.models.build import build_model
from hf_cifar.models.ensemble import (
    VIEWS,
    EnsembleConfig,
    EnsembleForImageClassification,
    cropped,
    mean_logits,
)
from hf_cifar.models.fingerprint import model_hash

NAMES = {0: "ant", 1: "bee", 2: "cow"}
LOADED = """
import sys, torch
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert "hf_cifar" not in sys.modules
torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[2])
"""


@pytest.fixture(scope="module")
def members():
    torch.manual_seed(0)
    vit = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32,
        patch_size=8, id2label=NAMES,
    )  # fmt: skip
    timm = build_model(ModelConfig(model_name_or_path="scratch/resnet10t", image_size=32), NAMES)
    cnn = ArticleCNNForImageClassification(ArticleCNNConfig(image_size=32, id2label=NAMES))
    return [each.eval() for each in (cnn, ViTForImageClassification(vit), timm.model)]


def ensemble(members, views, **options):
    config = EnsembleConfig(
        members=[member.config.to_dict() for member in members],
        scales=[[1] * 3, [2] * 3, [1] * 3], shifts=[[0] * 3, [0.5, 0, -0.5], [0] * 3],
        views=views, id2label=NAMES, **options,
    )  # fmt: skip
    model = EnsembleForImageClassification(config).eval()
    for copied, member in zip(model.members, members, strict=True):
        copied.load_state_dict(member.state_dict())
    return model


@torch.inference_mode()
def test_probabilities_are_the_mean_of_those_of_all_members_and_views(members):
    images = torch.randn(4, 3, 32, 32)
    shift = torch.tensor([0.5, 0, -0.5]).view(3, 1, 1)
    expected = torch.stack(
        [
            member(pixel_values=own).logits.softmax(1)
            for view in (images, images.flip(3))
            for member, own in zip(members, (view, view * 2 + shift, view), strict=True)
        ]
    ).mean(0)
    model = ensemble(members, ["image", "flip"])
    torch.testing.assert_close(model(images).logits.softmax(1), expected)
    labels = torch.tensor([0, 1, 2, 0])
    loss = model(images, labels=labels).loss
    torch.testing.assert_close(loss, -expected[range(4), labels].log().mean())


def test_mean_logits_of_multiple_labels():
    logits = torch.randn(3, 5, 4) * 20
    mean = logits.double().sigmoid().mean(0)
    torch.testing.assert_close(mean_logits(logits.double(), multi_label=True), torch.logit(mean))
    assert mean_logits(torch.full((2, 1, 2), 500.0), multi_label=True).isfinite().all()


def test_views_keep_the_size_and_crops_are_where_their_name_says():
    images = torch.zeros(1, 3, 32, 32)
    images[:, :, 0, 0] = 1
    for name, view in VIEWS.items():
        seen = view(images)
        assert seen.shape == images.shape
        assert (seen.max() > 0) == (name in ("image", "flip", "top_left"))
    constant = torch.full((1, 3, 20, 30), 2.0)
    torch.testing.assert_close(cropped(constant, 1, 0), constant)


@torch.inference_mode()
def test_it_loads_with_and_without_the_package(members, tmp_path):
    model = ensemble(members, ["image", "flip"], logits_divisor=0.5)
    images = torch.randn(2, 3, 32, 32)
    expected = model(images).logits
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(again(images).logits, expected)
    torch.save(images, tmp_path / "images")
    command = [sys.executable, "-c", LOADED, str(tmp_path / "model"), str(tmp_path / "images")]
    subprocess.run(command, check=True, cwd=tmp_path, env={"HF_HOME": str(tmp_path), "PATH": ""})
    torch.testing.assert_close(torch.load(tmp_path / "images"), expected)


def test_views_and_temperature_belong_to_the_identity(members):
    plain = model_hash(ensemble(members, ["image"]), {})
    assert model_hash(ensemble(members, ["image"]), {}) == plain
    for other in (
        ensemble(members, ["image", "flip"]),
        ensemble(members, ["image"], logits_divisor=2.0),
    ):
        assert model_hash(other, {}) != plain

"""Folded models have the same outputs; a fold that would change them is undone."""

import pytest
import torch
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from hf_cifar.config.model import ModelConfig
from hf_cifar.models.build import build_model
from hf_cifar.models.folding import fold_norms

LABELS = {0: "cat", 1: "dog", 2: "owl"}


def with_statistics(model, images):
    """Set weights and running statistics with which a wrong fold changes the logits."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        model.train()
        for _ in range(3):
            model(pixel_values=images)
    return model.eval()


def num_norms(model):
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.fixture
def images():
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("architecture", "norms", "left"),
    [
        ("tf_efficientnet_lite0", 49, 0),  # padded convolutions, norms with an activation
        ("resnet10t", 14, 0),
        ("densenet121", 121, 62),  # norms before convolutions stay
        ("transformers", 6, 0),
    ],
)
def test_folded_model_has_the_same_logits(images, architecture, norms, left):
    if architecture == "transformers":
        config = ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
        )
        model = ResNetForImageClassification(config)
    else:
        path = f"scratch/{architecture}"
        model, _ = build_model(ModelConfig(model_name_or_path=path, image_size=64), LABELS)
    model = with_statistics(model, images)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folded = fold_norms(model, images[:2])
    assert (num_norms(model), num_norms(folded)) == (norms, left)
    with torch.no_grad():
        expected, found = model(pixel_values=images).logits, folded(pixel_values=images).logits
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_model_without_norms_is_returned_unchanged(tiny_vit):
    model, _ = build_model(ModelConfig(model_name_or_path=str(tiny_vit)), LABELS)
    assert fold_norms(model, torch.randn(1, 3, 16, 16)) is model


class SharedOutput(nn.Module):
    """The convolution's output also bypasses the norm."""

    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, pixel_values):
        features = self.convolution(pixel_values)
        logits = (self.norm(features) + features).mean(dim=(2, 3))
        return type("Output", (), {"logits": logits})


class TwoPasses(SharedOutput):
    """The layers are used twice; a folded convolution would still be correct, a removed norm would not."""

    def forward(self, pixel_values):
        features = self.norm(self.convolution(pixel_values))
        logits = self.norm(features).mean(dim=(2, 3))
        return type("Output", (), {"logits": logits})


@pytest.mark.parametrize("kind", [SharedOutput, TwoPasses])
def test_fold_that_changes_the_logits_is_undone(images, kind):
    model = with_statistics(kind(), images)
    assert fold_norms(model, images) is model

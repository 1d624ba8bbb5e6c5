"""hf_cifar.deploy.channels: networks lose channels, and the result loads from its config."""

import pytest
import torch
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_cifar.deploy.channels import (
    Logits,
    closest_ratio,
    count_parameters,
    pruned_copy,
    ratios_of,
)

pytest.importorskip("torch_pruning")
SIZE = (32, 32)


def timm_model(architecture, **args):
    config = TimmWrapperConfig(architecture=architecture, num_labels=5, model_args=args or None)
    return TimmWrapperForImageClassification(config)


def resnet(layer_type):
    widths = {"hidden_sizes": [32, 64, 96, 128], "embedding_size": 32}
    config = ResNetConfig(**widths, depths=[1, 2, 1, 1], layer_type=layer_type, num_labels=5)
    return ResNetForImageClassification(config)


def vit():
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32,
        patch_size=8, num_labels=5,
    )  # fmt: skip
    return ViTForImageClassification(config)


MODELS = {
    "transformers ResNet, basic": lambda: resnet("basic"),
    "transformers ResNet, bottleneck": lambda: resnet("bottleneck"),
    "transformers ViT": vit,
    "transformers ConvNeXt": lambda: ConvNextForImageClassification(
        ConvNextConfig(hidden_sizes=[16, 32, 64, 96], depths=[1, 1, 2, 1], num_labels=5)
    ),
    "timm ResNet, basic": lambda: timm_model("resnet18"),
    "timm ResNet, bottleneck": lambda: timm_model("resnet26"),
    "timm ViT": lambda: timm_model("test_vit", img_size=32),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_pruned_network_loads_from_its_config(name, tmp_path):
    model = MODELS[name]().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ratios = ratios_of(model)
    for ratio in (ratios[0], ratios[len(ratios) // 2], ratios[-1]):
        pruned = pruned_copy(model, ratio, SIZE)
        assert type(pruned) is type(model)
        assert count_parameters(pruned) < count_parameters(model)
        pruned.save_pretrained(tmp_path / f"{ratio}")
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / f"{ratio}").eval()
        images = torch.randn(2, 3, *SIZE)
        assert torch.allclose(loaded(images).logits, pruned(images).logits, atol=1e-5)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@torch.no_grad()
def test_a_network_that_no_config_describes_is_a_plain_module():
    model = timm_model("test_efficientnet").eval()
    pruned = pruned_copy(model, 0.5, SIZE)
    assert type(pruned) is Logits
    assert count_parameters(pruned) < 0.5 * count_parameters(model)
    assert pruned(torch.randn(2, 3, *SIZE)).shape == (2, 5)


@torch.no_grad()
def test_channels_of_small_weights_are_removed():
    """Channels with weights of 0 change nothing, and are the first to go: the logits stay the same."""
    model = vit().eval()
    for layer in model.vit.layers:
        chosen = torch.randperm(64)[:32]
        layer.mlp.fc1.weight[chosen], layer.mlp.fc1.bias[chosen] = 0.0, 0.0
        layer.mlp.fc2.weight[:, chosen] = 0.0
    images = torch.randn(4, 3, *SIZE)
    pruned = pruned_copy(model, 0.5, SIZE)
    assert pruned.config.intermediate_size == 32
    assert torch.allclose(pruned(images).logits, model(images).logits, atol=1e-5)


def test_the_smallest_ratio_that_fits():
    ratios = [0.1, 0.2, 0.3, 0.4]
    for target, expected in ((0.05, 0.1), (0.1, 0.1), (0.25, 0.3), (0.4, 0.4), (0.5, None)):
        assert closest_ratio(ratios, lambda ratio, t=target: ratio >= t) == expected

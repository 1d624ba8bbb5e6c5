"""hf_cifar.deploy.channels: networks lose channels, and the result loads from its config."""

import pytest
import torch
from torch import nn
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
from hf_cifar.deploy.importance import measure_importances
from hf_cifar.errors import UserError

pytest.importorskip("torch_pruning")
SIZE = (32, 32)


def importances_of(model, size=SIZE):
    batches = [(torch.randn(4, 3, *size), torch.arange(4)) for _ in range(2)]
    return measure_importances(model, batches)


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
    ratios, importances = ratios_of(model), importances_of(model)
    for ratio in (ratios[0], ratios[len(ratios) // 2], ratios[-1]):
        pruned = pruned_copy(model, ratio, SIZE, importances)
        assert type(pruned) is type(model)
        assert count_parameters(pruned) < count_parameters(model)
        pruned.save_pretrained(tmp_path / f"{ratio}")
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / f"{ratio}").eval()
        images = torch.randn(2, 3, *SIZE)
        assert torch.allclose(loaded(images).logits, pruned(images).logits, atol=1e-5)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


# Inverted residuals, squeeze and excitation, concatenation, grouped convolutions, shifted windows.
WITHOUT_CONFIG = {
    "test_efficientnet": 32, "mobilenetv3_small_050": 32, "densenet121": 32, "regnety_002": 32,
    "swin_tiny_patch4_window7_224": 224,
}  # fmt: skip


@pytest.mark.parametrize("architecture", WITHOUT_CONFIG)
@torch.no_grad()
def test_a_network_that_no_config_describes_is_a_plain_module(architecture):
    model, size = timm_model(architecture).eval(), (WITHOUT_CONFIG[architecture],) * 2
    importances = importances_of(model, size)
    sizes = []
    for ratio in (0.3, 0.6):
        pruned = pruned_copy(model, ratio, size, importances)
        assert type(pruned) is Logits
        assert pruned(torch.randn(2, 3, *size)).shape == (2, 5)
        sizes.append(count_parameters(pruned) / count_parameters(model))
    assert 1 > sizes[0] > sizes[1]


@torch.no_grad()
def test_residual_connections_keep_their_width_and_layers_lose_whole_blocks():
    model = timm_model("mobilenetv3_small_050").eval()
    pruned = pruned_copy(model, 0.5, SIZE, importances_of(model))
    before, after = (dict(each.named_modules()) for each in (model, pruned.model))
    lost = {
        name: layer.out_channels - after[name].out_channels
        for name, layer in before.items()
        if isinstance(layer, nn.Conv2d)
    }
    assert not any(count for name, count in lost.items() if name.endswith("conv_pwl"))
    assert any(lost.values())
    for name, count in lost.items():
        if count and name.endswith("conv_pw"):
            assert after[name].out_channels % 8 == 0


@torch.no_grad()
def test_channels_that_the_loss_ignores_are_removed():
    """Channels that nothing reads change nothing, and are the first to go: the logits stay the same."""
    model = vit().eval()
    for layer in model.vit.layers:
        layer.mlp.fc2.weight[:, torch.randperm(64)[:32]] = 0.0
    images = torch.randn(4, 3, *SIZE)
    pruned = pruned_copy(model, 0.5, SIZE, importances_of(model))
    assert pruned.config.intermediate_size == 32
    assert torch.allclose(pruned(images).logits, model(images).logits, atol=1e-5)


def test_the_importance_is_the_squared_first_order_change_of_the_loss():
    """It is that of scaling a channel, which a derivative by its scale computes directly."""
    model = vit().eval()
    images, labels = torch.randn(6, 3, *SIZE), torch.arange(6) % 5
    name = "vit.layers.1.mlp.fc2"
    found = measure_importances(model, [(images[:4], labels[:4]), (images[4:], labels[4:])])[name]
    layer, expected = model.get_submodule(name), torch.zeros(64)
    for image, label in zip(images, labels, strict=True):
        scale = torch.ones(64, requires_grad=True)
        hook = layer.register_forward_pre_hook(lambda _, inputs, scale=scale: (inputs[0] * scale,))
        loss = nn.functional.cross_entropy(model(image[None]).logits, label[None])
        expected += torch.autograd.grad(loss, scale)[0].square() / 6
        hook.remove()
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-9)
    assert all(p.grad is None for p in model.parameters())


def test_a_network_that_cannot_be_traced_is_refused():
    model = timm_model("mixer_s32_224").eval()
    importances = importances_of(model, (224, 224))
    with pytest.raises(UserError, match="timm's mixer_s32_224 cannot be pruned"):
        pruned_copy(model, 0.5, (224, 224), importances)


def test_the_smallest_ratio_that_fits():
    ratios = [0.1, 0.2, 0.3, 0.4]
    for target, expected in ((0.05, 0.1), (0.1, 0.1), (0.25, 0.3), (0.4, 0.4), (0.5, None)):
        assert closest_ratio(ratios, lambda ratio, t=target: ratio >= t) == expected

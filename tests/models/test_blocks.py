import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from hf_cifar.config.model import ModelConfig
from hf_cifar.errors import UserError
from hf_cifar.models.blocks import (
    backbone_blocks,
    batch_norms,
    block_depths,
    describe_trainable,
    freeze,
    is_frozen,
)
from hf_cifar.models.build import build_model
from hf_cifar.models.heads import divide_logits, head_parameter_names, output_layers

LABELS = {0: "cat", 1: "dog", 2: "owl"}
# Checkpoint, prefixes of its blocks, and the layers before and after them.
STRUCTURE = {
    "vit": ([f"vit.layers.{i}" for i in range(3)], ["vit.embeddings"], ["vit.layernorm"]),
    "resnet": ([f"resnet.encoder.stages.{i}" for i in range(3)], ["resnet.embedder"], []),
    "timm/test_resnet": (
        [f"timm_model.layer{i}" for i in range(1, 5)],
        ["timm_model.conv1", "timm_model.bn1"],
        [],
    ),
    "timm/densenet121": (
        [f"timm_model.features.denseblock{i}" for i in range(1, 5)],
        ["timm_model.features.conv0", "timm_model.features.norm0"],
        ["timm_model.features.norm5"],
    ),
}  # fmt: skip


@pytest.fixture
def load(checkpoints):
    def load_model(name):
        where = name if name.startswith("scratch/") else str(checkpoints(name))
        return build_model(ModelConfig(model_name_or_path=where, image_size=32), LABELS).model

    return load_model


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("name", STRUCTURE)
def test_blocks_from_input_to_output(name, load):
    blocks = STRUCTURE[name][0]
    assert [block.rstrip(".") for block in backbone_blocks(load(name))] == blocks


@pytest.mark.parametrize(
    ("name", "count"),
    [("timm/test_vit", 6), ("timm/test_efficientnet", 5), ("scratch/test_convnext", 4),
     ("scratch/resnet18", 4), ("scratch/vit_tiny_patch16_224", 12), ("scratch/article_cnn", 4)],
)  # fmt: skip
def test_number_of_blocks(name, count, load):
    blocks = backbone_blocks(load(name))
    assert len(blocks) == len(set(blocks)) == count


@pytest.mark.parametrize("name", STRUCTURE)
def test_depth_grows_from_the_head_to_the_input(name, load):
    blocks, before, behind = STRUCTURE[name]
    model = load(name)
    depths = block_depths(model)
    assert list(depths) == [n for n, _ in model.named_parameters()]
    expected = dict.fromkeys(before, len(blocks) + 1) | dict.fromkeys(behind, 0)
    expected |= {block: len(blocks) - i for i, block in enumerate(blocks)}
    for prefix, depth in expected.items():
        assert {d for n, d in depths.items() if n.startswith(f"{prefix}.")} == {depth}, prefix
    assert {depths[n] for n in head_parameter_names(model)} == {0}


def test_dense_transitions_belong_to_the_previous_block(load):
    depths = block_depths(load("timm/densenet121"))
    assert depths["timm_model.features.transition2.conv.weight"] == 3
    assert depths["timm_model.features.denseblock2.denselayer1.conv1.weight"] == 3


@pytest.mark.parametrize("name", STRUCTURE)
def test_none_trains_all_and_backbone_trains_the_head(name, load):
    model = load(name)
    everything = {n for n, _ in model.named_parameters()}
    freeze(model, "none")
    assert trainable(model) == everything
    for what in ("backbone", "0"):
        freeze(model, what)
        assert trainable(model) == head_parameter_names(model)


@pytest.mark.parametrize("name", STRUCTURE)
def test_last_blocks_train_with_the_layers_after_them(name, load):
    blocks, before, behind = STRUCTURE[name]
    model = load(name)
    for count in range(1, len(blocks) + 1):
        freeze(model, str(count))
        names = trainable(model)
        for prefix in blocks[-count:] + behind:
            block = {n for n, _ in model.named_parameters() if n.startswith(f"{prefix}.")}
            assert block
            assert block <= names
        for prefix in before + blocks[:-count]:
            assert not any(n.startswith(f"{prefix}.") for n in names)
        assert head_parameter_names(model) <= names


def test_a_transition_belongs_to_its_dense_block(load):
    model = load("timm/densenet121")
    freeze(model, "2")
    names = trainable(model)
    assert any("transition3" in name for name in names)
    assert not any("transition2" in name for name in names)


def test_freezing_can_be_undone(load):
    model = load("vit")
    freeze(model, "backbone")
    freeze(model, "none")
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["resnet", "timm/test_resnet", "timm/test_efficientnet"])
def test_frozen_norms_keep_their_statistics(name, load):
    model = load(name)
    freeze(model, "1")
    model.train()
    for norm in filter(is_frozen, batch_norms(model)):
        norm.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model(pixel_values=torch.randn(4, 3, 32, 32) * 3 + 1)
    kinds = set()
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            frozen = not module.weight.requires_grad
            kinds.add(frozen)
            assert module.training != frozen
            same = torch.equal(before[f"{path}.running_mean"], module.running_mean)
            assert same == frozen, path
    assert kinds == {True, False}


def test_norms_that_train_are_not_frozen(load):
    assert not any(map(is_frozen, batch_norms(load("resnet"))))


def test_describe_trainable_counts_parameters(load):
    model = load("vit")
    freeze(model, "backbone")
    total = sum(p.numel() for p in model.parameters())
    assert (
        describe_trainable(model) == f"99 of {total:,} parameters are trainable ({99 / total:.1%})"
    )


def test_more_blocks_than_the_model_has_are_refused(load):
    with pytest.raises(UserError, match=r"--freeze 4: ViTForImageClassification has 3 stages"):
        freeze(load("vit"), "4")


def test_network_without_blocks_is_refused(load):
    model = load("vit")
    model.vit.layers = torch.nn.ModuleList([model.vit.layers[0]])
    with pytest.raises(UserError, match=r"use --freeze none or backbone.*--layer_decay"):
        backbone_blocks(model)


@pytest.mark.parametrize(
    ("name", "layers"),
    [("vit", 1), ("resnet", 1), ("timm/test_efficientnet", 1), ("scratch/article_cnn", 1),
     ("scratch/article_mlp", 1), ("scratch/deit_tiny_distilled_patch16_224", 2)],
)  # fmt: skip
def test_logits_are_divided_in_the_output_layers(name, layers, load):
    model = load(name).eval()
    assert len(output_layers(model)) == layers
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        before = model(pixel_values=images).logits
        assert divide_logits(model, 1.7)
        after = model(pixel_values=images).logits
    torch.testing.assert_close(after, before / 1.7)
    assert torch.equal(after.argmax(1), before.argmax(1))


def test_logits_of_other_layers_are_not_divided(load):
    model = load("vit")
    model.classifier = torch.nn.Sequential(torch.nn.Conv1d(32, 3, 1))
    weights = model.classifier[0].weight.clone()
    assert not divide_logits(model, 2.0)
    assert torch.equal(model.classifier[0].weight, weights)

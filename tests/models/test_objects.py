"""Models in memory: transformers and timm models and torch modules in place of a name."""

import copy

import pytest
import timm
import torch
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTModel

from hf_cifar import ModelConfig, UserError, build_model
from hf_cifar.models.modules import ModuleForImageClassification

LABELS = {0: "ant", 1: "bee", 2: "cat"}


def build(model, labels=LABELS, **options):
    return build_model(ModelConfig(model_name_or_path=model, **options), labels)


def vit(checkpoints, **options):
    return AutoModelForImageClassification.from_pretrained(checkpoints("vit"), **options)


def same(first, second, without=()):
    first, second = first.state_dict(), second.state_dict()
    return {n for n in first if not torch.equal(first[n], second[n])} == set(without)


def test_a_transformers_model_equals_its_checkpoint(checkpoints):
    model = vit(checkpoints)
    torch.manual_seed(0)
    by_name = build(str(checkpoints("vit")))
    before = copy.deepcopy(model)
    torch.manual_seed(0)
    built, processor = build(model)
    assert same(built, by_name.model) and same(model, before) and model.config.num_labels == 5
    assert processor.to_dict() == by_name.image_processor.to_dict()  # of the folder it came from
    assert built.config.id2label == LABELS and built is not model


def test_a_head_of_the_right_size_without_names_is_kept(checkpoints):
    model = vit(checkpoints, num_labels=3, ignore_mismatched_sizes=True,
                id2label={i: f"LABEL_{i}" for i in range(3)})  # fmt: skip
    assert same(build(model).model, model)
    model.config.id2label = {0: "x", 1: "y", 2: "z"}
    assert same(build(model).model, model, {"classifier.weight"})


def test_a_processor_may_come_with_the_model(checkpoints, caplog):
    model = vit(checkpoints)
    model.name_or_path = ""
    _, processor = build(model)
    assert not any(processor.image_mean) and "not normalised" in caplog.text
    own = AutoImageProcessor.from_pretrained(checkpoints("vit"))
    own.image_mean = [0.1, 0.2, 0.3]
    assert build((model, own)).image_processor.image_mean == (0.1, 0.2, 0.3)


def test_a_backbone_gets_a_head():
    backbone = ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                  intermediate_size=16, image_size=16, patch_size=8))  # fmt: skip
    built, _ = build(backbone)
    assert built.config.num_labels == 3
    assert torch.equal(built.vit.embeddings.cls_token, backbone.embeddings.cls_token)


@pytest.mark.parametrize("classes", [3, 5])
def test_a_timm_model_keeps_its_weights(classes):
    model = timm.create_model("test_vit.r160_in1k", num_classes=classes)
    built, processor = build(model)
    head = {"head.weight", "head.bias"} if classes == 5 else set()
    assert {n for n, w in built.timm_model.state_dict().items() if n not in head
            and not torch.equal(w, model.state_dict()[n])} == set()  # fmt: skip
    assert built.timm_model.num_classes == 3
    assert tuple(processor.data_config["mean"]) == tuple(model.pretrained_cfg["mean"])
    assert build(model, image_size=96).model.config.pretrained_cfg["input_size"] == [3, 96, 96]


def test_a_timm_model_of_other_options_is_refused():
    model = timm.create_model("test_vit", img_size=64)
    with pytest.raises(UserError, match="made with options that change pos_embed; pass timm"):
        build(model)


class Net(nn.Module):
    def __init__(self, num_labels=3, form=lambda logits: logits):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1)
        )
        self.classifier = nn.Linear(4, num_labels)
        self.form = form

    def forward(self, x):
        return self.form(self.classifier(self.features(x).flatten(1)))


@pytest.mark.parametrize("form", [lambda x: x, lambda x: {"logits": x}, lambda x: (x, None)])
def test_a_module_is_a_classifier(form, caplog):
    net = Net(form=form)
    model, processor = build(net, image_size=16, freeze="backbone")
    assert isinstance(model, ModuleForImageClassification) and same(model.network, net)
    assert model.network is not net and processor.size["height"] == 16
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"network.classifier.weight", "network.classifier.bias"}
    assert "which has no config" in caplog.text and "load_state_dict" in caplog.text


def test_a_module_that_is_a_classifier_already_is_not_wrapped_again(caplog):
    first, processor = build(Net(), image_size=16)
    caplog.clear()
    caplog.set_level("INFO")
    again, _ = build((first, processor))
    assert type(again.network) is Net and same(again.network, first.network)
    assert again.config.module_class == first.config.module_class
    assert again.config.id2label == first.config.id2label
    assert "Net: all" in caplog.text and "memory/" not in caplog.text
    assert "which has no config" not in caplog.text


def test_half_precision_and_frozen_parameters_are_changed_with_a_line(caplog):
    net = Net().half()
    net.features.requires_grad_(False)
    model, _ = build(net, image_size=16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in model.parameters())
    assert "120 parameters of the model were frozen and are trained now" in caplog.text
    assert net.classifier.weight.dtype == torch.float16 and not net.features[0].weight.requires_grad


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (Net(), {}, "a Net does not say the size of its input; pass image_size"),
        (Net(7), {"image_size": 16}, r"returns logits of shape \[1, 7\] .* the data has 3 classes"),
        (nn.Linear(4, 3), {"image_size": 16}, r"torch.nn.modules.linear.Linear fails on 16 x 16"),
        ({"a": 1}, {}, "a dict is not a model; pass a name, a transformers or timm model"),
    ],
)
def test_what_cannot_classify_is_refused(model, options, words):
    with pytest.raises(UserError, match=words) as caught:
        build(model, **options)
    assert "\n" not in str(caught.value)

"""hf_cifar.models.dropout: rates as timm and transformers set them."""

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessor,
    LevitConfig,
)

from hf_cifar.config.model import ModelConfig
from hf_cifar.errors import UserError
from hf_cifar.models.build import build_model, load_classifier, wrap_network
from hf_cifar.models.dropout import drop_path_rates, dropout_rates, set_dropout

LABELS = {0: "cat", 1: "dog", 2: "owl"}
TIMM = ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "resnet18"]


def build(where, **options):
    size = {} if where.startswith("bundled") else {"image_size": 32}
    config = ModelConfig(model_name_or_path=where, **size, **options)
    return build_model(config, LABELS)


@pytest.fixture
def pixels():
    return torch.rand(8, 3, 32, 32)


@pytest.mark.parametrize("name", TIMM)
def test_stochastic_depth_is_that_of_timm(name, checkpoints):
    reference = timm.create_model(name, drop_path_rate=0.3, num_classes=3)
    expected = [m.drop_prob for m in reference.modules() if isinstance(m, DropPath)]
    assert len(expected) > 2 and 0 < min(expected) < 0.3
    for where in (f"scratch/{name}", str(checkpoints(f"timm/{name}"))):
        model = build(where, drop_path=0.3).model
        found = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
        assert found == drop_path_rates(model) == expected, where


@pytest.mark.parametrize("name", TIMM)
def test_dropout_is_that_of_timm(name, checkpoints):
    reference = timm.create_model(name, drop_rate=0.3, num_classes=3)
    for where in (f"scratch/{name}", str(checkpoints(f"timm/{name}"))):
        model = build(where, dropout=0.3).model
        assert dropout_rates(model) == dropout_rates(reference) != [], where
        assert set(dropout_rates(model)) == {0.3}


def test_the_bundled_model_has_them():
    model = build("bundled/efficientnet_lite0", dropout=0.2, drop_path=0.2).model
    reference = timm.create_model("tf_efficientnet_lite0", drop_rate=0.2, drop_path_rate=0.2)
    assert dropout_rates(model) == dropout_rates(reference) == [0.2]
    assert drop_path_rates(model) == drop_path_rates(reference)


def test_dropout_of_transformers_is_in_its_layers(checkpoints):
    model = build(str(checkpoints("vit")), dropout=0.3).model
    assert dropout_rates(model) == [0.3] * 4  # of the embeddings, and in each of the three layers
    assert (model.config.hidden_dropout_prob, model.config.attention_probs_dropout_prob) == (
        0.3,
        0.0,
    )


def test_stochastic_depth_of_transformers(tmp_path):
    config = ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 2, 1], num_labels=3)
    ConvNextForImageClassification(config).save_pretrained(tmp_path)
    ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=1.0).save_pretrained(tmp_path)
    model = build(str(tmp_path), drop_path=0.4).model
    assert drop_path_rates(model) == pytest.approx([0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"drop_path": 0.5}])
@pytest.mark.parametrize("where", ["timm/test_resnet", "timm/test_vit"])
def test_training_varies_and_evaluation_does_not(where, options, checkpoints, pixels, tmp_path):
    """The saved model loads by from_pretrained, with its rates, and evaluates as without them."""
    folder = str(checkpoints(where))
    torch.manual_seed(0)
    plain = build(folder).model.eval()
    torch.manual_seed(0)
    model, processor = build(folder, **options)
    with torch.inference_mode():
        model.train()
        for norm in [*plain.modules(), *model.modules()]:
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.ones_(norm.weight)  # timm begins with zeros at the end of a block
                norm.eval()  # it would vary in training too
        assert not torch.equal(model(pixels).logits, model(pixels).logits)
        model.eval()
        assert torch.equal(model(pixels).logits, model(pixels).logits)
        assert torch.equal(model(pixels).logits, plain(pixels).logits)
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(loaded(pixels).logits, model(pixels).logits, rtol=0, atol=1e-6)
        loaded = load_classifier(str(tmp_path)).model.eval()
        torch.testing.assert_close(loaded(pixels).logits, plain(pixels).logits, rtol=0, atol=1e-6)
    again = build(str(tmp_path)).model  # the checkpoint's own rates
    assert dropout_rates(again) == dropout_rates(loaded) == dropout_rates(model)
    assert drop_path_rates(again) == drop_path_rates(loaded) == drop_path_rates(model)
    none = build(str(tmp_path), dropout=0.0, drop_path=0.0).model
    assert dropout_rates(none) == drop_path_rates(none) == []


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit", "resnet18"])
def test_a_timm_model_in_memory_keeps_its_rates(name):
    network = timm.create_model(name, num_classes=3, drop_rate=0.2, drop_path_rate=0.3)
    model = wrap_network(network, None, LABELS).model
    assert drop_path_rates(model) == pytest.approx(drop_path_rates(network))
    assert dropout_rates(model) == dropout_rates(network)
    config = ModelConfig(model_name_or_path=network, dropout=0.5)
    model = build_model(config, LABELS).model
    assert set(dropout_rates(model)) == {0.5}
    assert drop_path_rates(model) == pytest.approx(drop_path_rates(network))


REFUSED = [
    (
        "scratch/article_cnn",
        {"dropout": 0.1},
        "--dropout: article_cnn has no dropout to set; leave it out",
    ),
    ("vit", {"drop_path": 0.1}, "--drop_path: vit has no stochastic depth to set"),
    ("resnet", {"dropout": 0.1}, "--dropout: resnet has no dropout to set"),
    ("scratch/vgg11", {"drop_path": 0.1}, "--drop_path: timm's vgg11 has no stochastic depth"),
    (
        "timm/densenet121",
        {"drop_path": 0.1},
        "--drop_path: timm's densenet121 has no stochastic depth",
    ),
]


@pytest.mark.parametrize(("where", "options", "message"), REFUSED)
def test_a_model_without_them_is_refused(where, options, message, checkpoints):
    where = where if where.startswith("scratch") else str(checkpoints(where))
    with pytest.raises(UserError, match=message):
        build(where, **options)


def test_a_module_and_a_field_of_another_type_are_refused():
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(3 * 32 * 32, 3))
    config = ModelConfig(model_name_or_path=network, image_size=32, dropout=0.1)
    with pytest.raises(UserError, match=r"--dropout: torch.*Sequential has no dropout to set"):
        build_model(config, LABELS)
    with pytest.raises(UserError, match="--drop_path: levit has no stochastic depth to set"):
        set_dropout(LevitConfig(), ModelConfig(drop_path=0.1))  # of whole numbers

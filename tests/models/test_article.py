import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

from hf_cifar.models.article import (
    ArticleCNNConfig,
    ArticleCNNForImageClassification,
    ArticleMLPConfig,
    ArticleMLPForImageClassification,
)
from hf_cifar.models.processor import plain_processor

MODELS = {
    "article_cnn": (ArticleCNNConfig, ArticleCNNForImageClassification),
    "article_mlp": (ArticleMLPConfig, ArticleMLPForImageClassification),
}
PIXELS = "torch.linspace(0, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)"


def new_model(name, **options):
    torch.manual_seed(0)
    config_class, model_class = MODELS[name]
    return model_class(config_class(num_labels=10, **options))


def run_python(code, cache):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("name", "count"),
    [("article_cnn", 122_570), ("article_mlp", 3 * 32 * 32 * 64 + 64 + 64 * 10 + 10)],
)
def test_number_of_parameters(name, count):
    assert sum(p.numel() for p in new_model(name).parameters()) == count


def test_cnn_is_the_articles_sequence_of_layers():
    model = new_model("article_cnn").eval()
    kinds = [type(layer).__name__ for layer in model.backbone]
    assert kinds == [
        "Conv2d", "ReLU", "MaxPool2d", "Conv2d", "ReLU", "MaxPool2d", "Conv2d", "ReLU",
        "Flatten", "Linear", "ReLU",
    ]  # fmt: skip
    convolutions = [(m.in_channels, m.out_channels, m.kernel_size) for m in model.backbone
                    if isinstance(m, torch.nn.Conv2d)]  # fmt: skip
    assert convolutions == [(3, 32, (3, 3)), (32, 64, (3, 3)), (64, 64, (3, 3))]


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_initialised_as_in_keras(name):
    state = new_model(name).state_dict()
    for key, value in state.items():
        if key.endswith("bias"):
            assert not value.any()
        else:
            receptive = value[0, 0].numel() if value.ndim == 4 else 1
            bound = (6 / ((value.shape[0] + value.shape[1]) * receptive)) ** 0.5
            assert value.abs().max() <= bound
            assert value.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)


@pytest.mark.parametrize("name", MODELS)
def test_loss_is_the_mean_cross_entropy(name):
    model = new_model(name).eval()
    pixels, labels = torch.rand(4, 3, 32, 32), torch.tensor([0, 3, 9, 3])
    out = model(pixel_values=pixels, labels=labels)
    picked = out.logits.log_softmax(dim=1)[torch.arange(4), labels]
    torch.testing.assert_close(out.loss, -picked.mean())
    assert out.logits.shape == (4, 10)
    assert model(pixel_values=pixels).loss is None


def test_cnn_learns():
    model = new_model("article_cnn")
    pixels = torch.rand(16, 3, 32, 32) * 0.5
    labels = torch.arange(16) % 2
    pixels[labels == 1, 0] += 0.5
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(40):
        optimizer.zero_grad()
        model(pixel_values=pixels, labels=labels).loss.backward()
        optimizer.step()
    assert (model(pixel_values=pixels).logits.argmax(dim=1) == labels).all()


@pytest.mark.parametrize("size", [18, 28, 64])
def test_cnn_accepts_other_image_sizes(size):
    model = new_model("article_cnn", image_size=size)
    assert model(pixel_values=torch.rand(1, 3, size, size)).logits.shape == (1, 10)


def test_cnn_refuses_too_small_images():
    with pytest.raises(ValueError, match="at least 18 px, not 17"):
        new_model("article_cnn", image_size=17)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Both models on disk, and their expected logits."""
    root, logits = tmp_path_factory.mktemp("article"), {}
    pixels = torch.linspace(0, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
    for name in MODELS:
        model = new_model(name).eval()
        model.save_pretrained(root / name)
        processor = plain_processor(32)
        processor.save_pretrained(root / name)
        image = processor(Image.new("RGB", (32, 32), "teal"), return_tensors="pt")
        with torch.inference_mode():
            logits[name] = model(pixel_values=pixels).logits
            logits[f"{name} pipeline"] = model(**image).logits[0]
    return root, logits


def check_logits(answer, logits):
    for name, expected in logits.items():
        torch.testing.assert_close(torch.tensor(answer[name]), expected)


# Loads each model and prints its logits by name, from AutoModel and from pipeline.
LOAD = """
import json, sys, torch
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline
{register}
answer = {{"classes": []}}
for name in {names}:
    folder = f"{root}/{{name}}"
    model = AutoModelForImageClassification.from_pretrained(folder{flag}).eval()
    answer[name] = model(pixel_values={pixels}).logits.tolist()
    answer["classes"].append(type(model).__module__)
    classify = pipeline("image-classification", model=folder, function_to_apply="none", top_k=10{flag})
    scores = {{entry["label"]: entry["score"] for entry in classify(Image.new("RGB", (32, 32), "teal"))}}
    answer[f"{{name}} pipeline"] = [scores[model.config.id2label[i]] for i in range(10)]
answer["hf_cifar"] = "hf_cifar" in sys.modules
print(json.dumps(answer))
"""


def load(root, cache, *, register="", flag=""):
    names = list(MODELS)
    code = LOAD.format(register=register, names=names, root=root, flag=flag, pixels=PIXELS)
    return run_python(code, cache)


@pytest.mark.slow
def test_loads_without_hf_cifar_through_its_saved_code(saved, tmp_path):
    root, logits = saved
    answer = load(root, tmp_path, flag=", trust_remote_code=True")
    check_logits(answer, logits)
    assert not answer["hf_cifar"]


@pytest.mark.slow
def test_loads_without_its_saved_code_after_an_import(saved, tmp_path):
    root, logits = saved
    answer = load(root, tmp_path, register="import hf_cifar.models.article")
    check_logits(answer, logits)
    assert answer["classes"] == ["hf_cifar.models.article"] * 2


def test_a_bare_import_registers_nothing(tmp_path):
    code = """
import json, sys
finders = list(sys.meta_path)
import hf_cifar
print(json.dumps([finders == sys.meta_path, "torch" in sys.modules, "transformers" in sys.modules]))
"""
    assert run_python(code, tmp_path) == [True, False, False]

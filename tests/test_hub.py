"""The model card, and the push: the unmodified client against a Hub on the loopback."""

import dataclasses
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from hub_server import TOKEN, Hub, card_errors
from huggingface_hub import ModelCard, constants
from PIL import Image
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from hf_cifar.config import FinetuneConfig, RunConfig
from hf_cifar.data.splits import load_splits
from hf_cifar.errors import UserError
from hf_cifar.hub import check_push, environment, prepare_push, public_name, render_model_card
from hf_cifar.options import DataConfig, ModelConfig

NAMES = [
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
]  # fmt: skip
MODEL_FILES = {"config.json", "model.safetensors", "README.md", "metrics.json"}
PROCESSOR = "preprocessor_config.json"
CLOSED = "http://127.0.0.1:9"  # the discard port: nothing listens there

# Command lines, one after the other in one process; the end of each is marked in both streams.
COMMANDS = """
import json, os, sys, time
from hf_cifar.cli import main
for token, argv in json.loads(sys.argv[1]):
    os.environ.pop("HF_TOKEN", None)
    os.environ.update({"HF_TOKEN": token} if token else {})
    start = time.perf_counter()
    status = main(argv)
    print(f"<<{json.dumps([status, time.perf_counter() - start])}>>", flush=True)
    print("<<>>", file=sys.stderr, flush=True)
"""
# What a stranger does with a model: transformers alone, no import of hf_cifar.
STRANGER = """
import json, sys
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
image, answers = Image.open(sys.argv[1]), {}
for name, options in json.loads(sys.argv[2]):
    model = AutoModelForImageClassification.from_pretrained(name, **options).eval()
    processor = AutoImageProcessor.from_pretrained(name, **options)
    with torch.inference_mode():
        logits = model(**processor(image, return_tensors="pt")).logits[0].tolist()
    top = pipeline("image-classification", model=name, top_k=1, **options)(image)[0]
    answers[name] = {"logits": logits, "top": top["label"], "labels": model.config.id2label}
print(json.dumps([answers, "hf_cifar" in sys.modules]))
"""


@dataclasses.dataclass
class Command:
    """What one command line did."""

    status: int
    seconds: float
    stdout: str
    stderr: str


def hub_environment(home, endpoint):
    """An environment with a Hub at `endpoint`, a cache in `home`, and a token."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE"))}
    return kept | {
        "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip


def run_commands(commands, environment):
    """Run (token, argv) one after the other, in one process."""
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    stdout, stderr = re.split(r"<<(.*)>>\n", done.stdout), done.stderr.split("<<>>\n")
    return [
        Command(*json.loads(report), text, errors)
        for text, report, errors in zip(stdout[::2], stdout[1::2], stderr, strict=False)
    ]


def cifar_layout(folder):
    """uoft-cs/cifar10's layout: plain_text/*.parquet with img and label, declared in README.md."""
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
    )
    generator = np.random.default_rng(0)
    (folder / "plain_text").mkdir(parents=True)
    for split, count in (("train", 60), ("test", 20)):
        labels = np.arange(count) % len(NAMES)
        pixels = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        images = [Image.fromarray(image) for image in pixels]
        rows = datasets.Dataset.from_dict({"img": images, "label": labels}, features=features)
        rows.to_parquet(folder / f"plain_text/{split}-00000-of-00001.parquet")
    files = [{"split": s, "path": f"plain_text/{s}-*"} for s in ("train", "test")]
    config = {"config_name": "plain_text", "default": True, "data_files": files}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': [config]})}---\n")


def pretrained_vit(folder):
    """A headless ViT for 224 px, as google/vit-base-patch16-224-in21k is, but tiny."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ViTModel(ViTConfig(**sizes, intermediate_size=64)).save_pretrained(folder)
    ViTImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)


@dataclasses.dataclass
class Published:
    """A Hub, a private folder with one run per command, and what each command did."""

    hub: Hub
    root: Path
    commands: dict[str, Command]

    def files(self, repo_id):
        return self.hub.repos["models", repo_id].files


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The default data set and model on a Hub, and runs that push to it, or try to."""
    root = tmp_path_factory.mktemp("private")
    cifar_layout(root / "cifar10")
    pretrained_vit(root / "pretrained")
    short, push = ["--num_train_epochs", "1"], "--push_to_hub"
    local = [*short, "--dataset_name", str(root / "cifar10"), push]
    article = [*local, "--model_name_or_path", "scratch/article_cnn"]
    digits = ["--dataset_name", "bundled/digits", "--max_train_samples", "40"]
    test_vit = [*short, *digits, "--max_eval_samples", "20", "--model_name_or_path"]
    runs = {
        "vit": (TOKEN, [*short, "--do_predict", push, "--hub_model_id", "me/vit"]),
        "timm": (None, [*test_vit, "scratch/test_vit", push, "--hub_model_id", "me/timm",
                        "--hub_token", TOKEN]),
        "article": (TOKEN, article),  # the repo is named after the folder
        "full disk": (TOKEN, [*local, "--model_name_or_path", str(root / "vit"),
                              "--hub_model_id", "me/full"]),
        "foreign": (TOKEN, [*article, "--hub_model_id", "them/vit"]),
        "anonymous": (None, article),
        "no such model": (TOKEN, [*digits, "--model_name_or_path", "google/vit-bas"]),
        "no such revision": (TOKEN, [*digits, "--model_revision", "v7"]),
    }  # fmt: skip
    commands = [
        (token, ["finetune", *argv, "--output_dir", str(root / name)])
        for name, (token, argv) in runs.items()
    ]
    with Hub() as hub:
        hub.fill("datasets", "uoft-cs/cifar10", root / "cifar10")
        hub.fill("models", "google/vit-base-patch16-224-in21k", root / "pretrained")
        hub.refused["commit", "me/full"] = 500
        done = run_commands(commands, hub_environment(root / "home", hub.endpoint))
        yield Published(hub, root, dict(zip(runs, done, strict=True)))


@pytest.fixture(scope="module")
def strangers_answers(published):
    """What transformers makes of one image, for each pushed repo and its folder."""
    names = []
    for name in ("vit", "timm", "article"):
        options = {"trust_remote_code": True} if name == "article" else {}
        names += [(f"me/{name}", options), (str(published.root / name), options)]
    image = published.root / "image.png"
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(image)
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(image), json.dumps(names)],
        env=hub_environment(published.root / "another_home", published.hub.endpoint),
        cwd=published.root, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers, imported = json.loads(done.stdout)
    assert not imported
    return answers


def error_line(command, after_start=False):
    """The one line that a failed command said, behind its notes on model and training if it got there."""
    assert command.status == 2, command.stderr
    *before, line = command.stderr.splitlines()
    assert line.startswith("hf-cifar: error: ")
    if after_start:
        assert "Traceback" not in command.stderr
    else:
        assert not before and not command.stdout
    return line


@pytest.mark.parametrize(
    ("name", "more"),
    [("vit", {PROCESSOR}), ("timm", set()), ("article", {PROCESSOR, "article.py"})],
)
def test_pushes_what_a_stranger_needs_and_nothing_else(published, name, more):
    assert published.commands[name].status == 0, published.commands[name].stderr
    assert set(published.files(f"me/{name}")) == MODEL_FILES | more
    local = published.root / name
    for path, content in published.files(f"me/{name}").items():
        if path != "README.md":
            assert (local / path).read_bytes() == content, path
    # What stays at home is there to be left out.
    assert (local / "config.yaml").exists() and (local / "predictions").is_dir()
    assert list(local.glob("checkpoint-*"))


def test_no_local_path_and_no_token_in_what_is_pushed_or_printed(published):
    secrets = [TOKEN, str(published.root), published.root.name]
    for (kind, repo_id), repo in published.hub.repos.items():
        for path, content in repo.files.items():
            for secret in secrets:
                assert secret.encode() not in content, (kind, repo_id, path)
    for name, command in published.commands.items():
        assert TOKEN not in command.stdout + command.stderr, name
    for path in published.root.glob("*/*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no such model", "no model google/vit-bas on the Hub, or it is private or gated"),
        ("no such revision", "has no revision 'v7'"),
    ],
)
def test_a_hub_model_that_is_not_there_is_found_out_first(published, name, words):
    assert words in error_line(published.commands[name])
    assert not (published.root / name).exists()


@pytest.mark.parametrize("name", ["vit", "timm", "article"])
def test_from_pretrained_gives_the_same_logits(published, strangers_answers, name):
    pushed, local = strangers_answers[f"me/{name}"], strangers_answers[str(published.root / name)]
    assert pushed["logits"] == local["logits"]
    assert len(set(pushed["logits"])) == 10
    labels = list(pushed["labels"].values())
    assert labels == ([str(digit) for digit in range(10)] if name == "timm" else NAMES)
    assert pushed["top"] == local["top"] == labels[int(np.argmax(pushed["logits"]))]


def test_default_command_line_reads_data_and_model_from_the_hub(published):
    asked = " ".join(published.hub.requests)
    assert re.search(r"GET /datasets/uoft-cs/cifar10/resolve/\w+/plain_text/\S+parquet 20", asked)
    assert re.search(r"GET /google/vit-base-patch16-224-in21k/resolve/\w+/model\S+ 20", asked)
    config = yaml.safe_load((published.root / "vit/config.yaml").read_text())
    assert config["dataset_name"] == "uoft-cs/cifar10"
    assert config["model_name_or_path"] == "google/vit-base-patch16-224-in21k"
    metrics = json.loads(published.files("me/vit")["metrics.json"])
    assert metrics["validation"]["num_images"] == 10 and metrics["test"]["num_images"] == 20


@pytest.mark.parametrize("name", ["vit", "timm", "article"])
def test_pushed_card_is_valid_and_true(published, name):
    text = published.files(f"me/{name}")["README.md"].decode()
    facts = json.loads((published.root / name / "run.json").read_text())
    metrics = json.loads(published.files(f"me/{name}")["metrics.json"])
    assert card_errors(text) == []
    card = ModelCard(text)
    assert {r.dataset_split: r.metric_value for r in card.data.eval_results} == {
        split: pytest.approx(figures["accuracy"], abs=1e-6) for split, figures in metrics.items()
    }
    assert facts["split_hash"] in text
    code = ", trust_remote_code=True" if name == "article" else ""
    assert f'pipeline("image-classification", model="me/{name}"{code})' in text


def test_card_links_data_set_and_base_model_only_where_they_are_on_the_hub(published):
    cards = {n: ModelCard(published.files(f"me/{n}")["README.md"].decode()).data for n in
             ("vit", "timm", "article")}  # fmt: skip
    assert cards["vit"].base_model == "google/vit-base-patch16-224-in21k"
    assert cards["vit"].datasets == ["uoft-cs/cifar10"]
    for name in ("timm", "article"):
        assert cards[name].base_model is None and cards[name].datasets is None


def test_one_commit_a_push(published):
    for name in ("vit", "timm", "article"):
        assert published.hub.repos["models", f"me/{name}"].num_commits == 1


def test_refused_repo_fails_before_training(published):
    command = published.commands["foreign"]
    line = error_line(command, after_start=True)
    assert "them/vit" in line and "403" in line
    assert not (published.root / "foreign").exists()


def test_missing_token_fails_before_training(published):
    line = error_line(published.commands["anonymous"])
    assert "needs a token" in line and "hf auth login" in line
    assert not (published.root / "anonymous").exists()


def test_failed_push_keeps_the_model_and_its_retry_line_works(published):
    folder = published.root / "full disk"
    line = error_line(published.commands["full disk"], after_start=True)
    assert "me/full" in line and "500" in line and f"the model is saved in {folder}" in line
    assert (folder / "model.safetensors").exists() and (folder / "metrics.json").exists()
    assert published.files("me/full") == {}
    del published.hub.refused["commit", "me/full"]
    program, *retry = shlex.split(line.partition("retry with: ")[2])
    assert program == "hf"
    done = subprocess.run(
        [sys.executable, "-m", "huggingface_hub.cli.hf", *retry],
        env=hub_environment(published.root / "home", published.hub.endpoint),
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert set(published.files("me/full")) == MODEL_FILES | {PROCESSOR}


def test_no_network_ends_quickly_and_says_how_to_go_offline(tmp_path):
    home, output = (
        hub_environment(tmp_path / "home", CLOSED),
        ["--output_dir", str(tmp_path / "run")],
    )
    digits, scratch = (
        ["--dataset_name", "bundled/digits"],
        ["--model_name_or_path", "scratch/test_vit"],
    )
    needs = {
        "data set uoft-cs/cifar10": [*output, *scratch],
        "model google/vit-base-patch16-224-in21k": [*output, *digits],
        "--push_to_hub": [*output, *digits, *scratch, "--push_to_hub"],
    }
    # The first mistake is another one: it has torch imported, which is not to be timed here.
    lines = [[*output, *digits, *scratch, "--fp16"], *needs.values()]
    first, *done = run_commands([(TOKEN, ["finetune", *argv]) for argv in lines], home)
    assert "fp16 needs a GPU" in error_line(first)
    for what, command in zip(needs, done, strict=True):
        line = error_line(command)
        assert f"{what} needs {CLOSED}, which cannot be reached" in line
        assert "set HF_HUB_OFFLINE=1" in line and "bundled/" in line
    # The client alone would retry for 23 s and more.
    assert max(command.seconds for command in done) < 10
    assert not (tmp_path / "run").exists()


# The card, from its parts.


@pytest.fixture(scope="module")
def local_run(tmp_path_factory):
    """A finished run's facts, data and model in local folders: (folder, config, splits)."""
    root = tmp_path_factory.mktemp("somewhere")
    cifar_layout(root / "my_birds")
    data = DataConfig(dataset_name=str(root / "my_birds"), split_seed=7)
    model = ModelConfig(model_name_or_path=str(root / "my_model"), freeze="backbone")
    train = FinetuneConfig(
        output_dir=str(root / "out"), seed=11, learning_rate=0.00123, use_cpu=True
    )
    config = RunConfig(data=data, model=model, train=train)
    return root, config, load_splits(data)


METRICS = {
    "validation": {"num_images": 10, "accuracy": 0.8, "f1_macro": 0.75, "roc_auc_macro": None,
                   "cross_entropy": 0.61, "ece": 0.05, "intervals": {"accuracy": [0.49, 0.943]}},
    "test": {"num_images": 1234, "accuracy": 0.7654321, "f1_macro": 0.5, "roc_auc_macro": 0.875,
             "cross_entropy": 0.9, "ece": 0.02, "ece_uncalibrated": 0.07, "temperature": 1.2345},
}  # fmt: skip
FACTS = {
    "train_seconds": 12.4, "steps": 1500, "trainable": "330 of 9,876 parameters train",
    "device": "CPU (3 cores)", "processes": 2,
    "environment": {"torch": "9.9.9", "commit": "abc123"},
}  # fmt: skip


def card_of(config, splits, custom_code=False):
    return render_model_card(config, splits, METRICS, FACTS, custom_code=custom_code)


def test_card_states_the_facts_of_the_run(local_run):
    _, config, splits = local_run
    text = card_of(config, splits)
    assert card_errors(text) == []
    assert splits.hash in text and "split seed 7" in text and "Seed 11" in text
    assert (
        f"{len(splits.train)} images to train on, {len(splits.validation)} for validation" in text
    )
    assert "| validation | 10 | 0.8000 [0.4900, 0.9430] | 0.7500 | - | 0.6100 | 0.0500 |" in text
    assert "| test | 1,234 | 0.7654 | 0.5000 | 0.8750 | 0.9000 | 0.0200 |" in text
    assert (
        "divided by 1.234, which took the expected calibration error on test from 0.0700 to 0.0200"
        in text
    )
    assert (
        "330 of 9,876 parameters train. 1,500 steps in 12 s on CPU (3 cores), 2 processes" in text
    )
    assert "| torch | 9.9.9 |" in text and "| commit | abc123 |" in text
    for name in ("learning_rate", "freeze", "flip", "weight_decay", "label_smoothing_factor"):
        assert f"| `{name}` | `{config.options()[name]}` |" in text
    assert all(name in text for name in NAMES)


def test_card_of_local_data_and_model_holds_no_path(local_run):
    root, config, splits = local_run
    text = card_of(config, splits)
    assert str(root) not in text and root.name not in text
    assert "`my_model`, fine-tuned to tell 10 classes of `my_birds`" in text
    data = ModelCard(text).data
    assert data.base_model is None and data.datasets is None


def test_card_holds_no_token(local_run):
    _, config, splits = local_run
    train = dataclasses.replace(config.train, hub_token=TOKEN)
    assert TOKEN not in card_of(dataclasses.replace(config, train=train), splits)


def test_card_says_what_scratch_training_own_validation_and_no_selection_are(local_run):
    _, config, splits = local_run
    own = dataclasses.replace(splits.validation, source_split="validation")
    text = card_of(
        dataclasses.replace(
            config,
            model=ModelConfig(model_name_or_path="scratch/article_cnn"),
            train=dataclasses.replace(config.train, load_best_model_at_end=False),
        ),
        dataclasses.replace(splits, validation=own),
        custom_code=True,
    )
    assert "`scratch/article_cnn`, trained from random weights" in text
    assert "the data set's own validation split" in text and "split seed" not in text
    assert "chose the checkpoint" not in text
    assert "trust_remote_code=True" in text


def test_bundled_model_is_linked_to_the_checkpoint_that_it_came_from(local_run):
    _, config, splits = local_run
    model = ModelConfig(model_name_or_path="bundled/efficientnet_lite0")
    text = card_of(dataclasses.replace(config, model=model), splits)
    assert ModelCard(text).data.base_model == "timm/tf_efficientnet_lite0.in1k"


def test_environment_is_what_runs_here():
    versions = environment()
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert versions["torch"] == torch.__version__.split("+")[0]
    assert versions["datasets"] == datasets.__version__
    assert versions["hf-cifar"] == importlib.metadata.version("hf-cifar")
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", versions.get("commit", "0" * 40))


def test_public_name_keeps_ids_and_strips_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "uoft-cs/cifar10",
        "bundled/digits",
        "scratch/article_cnn",
        "timm/resnet50.a1_in1k",
    ):
        assert public_name(name) == name
    (tmp_path / "a/birds").mkdir(parents=True)
    for path in (
        f"{tmp_path}/a/birds",
        f"{tmp_path}/a/birds/",
        "./a/birds",
        "a/birds",
        "~/x/birds",
    ):
        assert public_name(path) == "birds"
    assert public_name(".") == tmp_path.name


def test_push_under_offline_mode_names_both_ways_out(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    config = RunConfig(train=FinetuneConfig(push_to_hub=True, use_cpu=True))
    with pytest.raises(UserError, match=r"--push_to_hub needs the network, but HF_HUB_OFFLINE=1"):
        check_push(config)


def test_no_push_asks_nothing_of_the_network(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    config = RunConfig(train=FinetuneConfig(use_cpu=True))
    assert check_push(config) is None and prepare_push(config) is None

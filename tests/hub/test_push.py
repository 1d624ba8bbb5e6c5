"""hf_cifar.hub.push: the unmodified client against a local Hub server."""

import ast
import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from command_lines import Command, run_commands
from hub_server import DROP, READ_TOKEN, TOKEN, Hub, Repo, card_errors, hub_environment
from huggingface_hub import ModelCard, parse_eval_result_entries
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTImageProcessor, ViTModel

pytestmark = pytest.mark.slow  # twenty command lines against a server

NAMES = [
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
]  # fmt: skip
MODEL_FILES = {"config.json", "model.safetensors", "README.md", "metrics.json"}
PROCESSOR = "preprocessor_config.json"
EVAL_RESULTS = ".eval_results/cifar10.yaml"
ARTICLE_FILES = MODEL_FILES | {PROCESSOR, "article.py"}
CLOSED = "http://127.0.0.1:9"  # the discard port: nothing listens there

# Use of a model by others: only transformers, without importing hf_cifar; and the code of the cards,
# which opens image.png.
OUTSIDE_USE = """
import contextlib, io, json, sys
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
image, answers = Image.open(sys.argv[1]), {}
for name, options in json.loads(sys.argv[2]):
    model = AutoModelForImageClassification.from_pretrained(name, **options).eval()
    processor = AutoImageProcessor.from_pretrained(name, **options)
    with torch.inference_mode():
        logits = model(**processor(image, return_tensors="pt")).logits[0].tolist()
    top = pipeline("image-classification", model=name, top_k=1, **options)(image)[0]
    answers[name] = {"logits": logits, "labels": model.config.id2label}
    answers[name] |= {"top": top["label"], "score": top["score"]}
for name, code in json.loads(sys.argv[3]).items():
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {})
    answers[name]["card"] = printed.getvalue()
print(json.dumps([answers, "hf_cifar" in sys.modules]))
"""


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
    metadata = yaml.safe_dump({"configs": [config], "license": "unknown"})
    (folder / "README.md").write_text(f"---\n{metadata}---\n")


def pretrained_vit(folder):
    """A tiny headless ViT for 224 px, like google/vit-base-patch16-224-in21k."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ViTModel(ViTConfig(**sizes, intermediate_size=64)).save_pretrained(folder)
    ViTImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    (folder / "README.md").write_text(
        "---\nlicense: apache-2.0\n---\n# ViT\n```bibtex\n@misc{vit, title={ViT}}\n```\n"
    )


@dataclasses.dataclass
class Published:
    """A Hub, a private folder with one run per command, and the result of each command."""

    hub: Hub
    root: Path
    commands: dict[str, Command]

    def files(self, repo_id):
        return self.hub.repos["models", repo_id].files


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The default data set and model on a Hub, and runs that push to it or try to."""
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
        "lora": (TOKEN, [*short, *digits, push, "--hub_model_id", "me/lora", "--lora_rank", "4"]),
        "timm": (None, [*test_vit, "scratch/test_vit", push, "--hub_model_id", "me/timm",
                        "--hub_token", TOKEN]),
        "article": (TOKEN, article),  # the repo is named after the folder
        "full disk": (TOKEN, [*local, "--model_name_or_path", str(root / "vit"),
                              "--hub_model_id", "me/full"]),
        "foreign": (TOKEN, [*article, "--hub_model_id", "them/vit"]),
        "anonymous": (None, article),
        "no such model": (TOKEN, [*digits, "--model_name_or_path", "google/vit-bas"]),
        "no such revision": (TOKEN, [*digits, "--model_revision", "v7"]),
        "no such name": (TOKEN, [*article, "--hub_model_id", "me/a b"]),
        "refused card": (TOKEN, [*article, "--hub_model_id", "me/refused"]),
    }  # fmt: skip
    commands = [
        (token, ["finetune", *argv, "--output_dir", str(root / name)])
        for name, (token, argv) in runs.items()
    ]
    # Tested after the failed push: the card must still include it.
    folder = str(root / "full disk")
    commands.append((TOKEN, ["evaluate", "--model_name_or_path", folder, "--split", "test"]))
    with Hub() as hub:
        hub.fill("datasets", "uoft-cs/cifar10", root / "cifar10")
        hub.fill("models", "google/vit-base-patch16-224-in21k", root / "pretrained")
        hub.refused["commit", "me/full"] = 500
        hub.refused_cards.add("refused")
        done = run_commands(commands, hub_environment(root / "home", hub.endpoint))
        yield Published(hub, root, dict(zip([*runs, "evaluate"], done, strict=True)))


# Manual pushes of the article run's folder: token, and the arguments after `hf-cifar push FOLDER --repo_id`.
PUSHES = {
    "dry run": (TOKEN, ["dry", "--dry_run"]),
    "new": (TOKEN, ["me/new"]),
    "repeated": (TOKEN, ["me/new"]),
    "dry run for an existing repository": (TOKEN, ["me/new", "--dry_run"]),
    "branch": (TOKEN, ["me/new", "--revision", "v2"]),
    "public": (TOKEN, ["me/public", "--private", "false"]),
    "organisation": (TOKEN, ["team/model"]),
    "rate limit": (TOKEN, ["me/busy"]),
    "transient failure": (TOKEN, ["me/failing"]),
    "dropped connection": (TOKEN, ["me/dropped"]),
    "unanswered commit": (TOKEN, ["me/unanswered"]),
    "foreign": (TOKEN, ["them/model"]),
    "read-only organisation": (TOKEN, ["audience/model"]),
    "read-only repository": (TOKEN, ["audience/known"]),
    "read-only token": (READ_TOKEN, ["me/read"]),
    "wrong token": ("hf_wrongWrongWrongWrong", ["me/wrong"]),
    "no token": (None, ["me/none"]),
    "no such name": (TOKEN, ["me/a b"]),
    "forbidden": (TOKEN, ["me/forbidden"]),
    "conflict": (TOKEN, ["me/conflict"]),
    "edited": (TOKEN, ["me/edited"]),
    "broken card": (TOKEN, ["me/brokencard"]),
    "secret": (TOKEN, ["me/secret"]),
    "empty": (TOKEN, ["me/empty"]),
}
FAULTS = {
    ("preupload", "me/busy"): [429], ("commit", "me/busy"): [429],
    ("lfs", "me/failing"): [500], ("commit", "me/failing"): [500],
    ("upload", "me/dropped"): [DROP], ("commit", "me/dropped"): [DROP],
    ("answer", "me/unanswered"): [DROP],
    ("create", "me/forbidden"): [403], ("commit", "me/conflict"): [409],
}  # fmt: skip


@pytest.fixture(scope="module")
def pushes(published):
    """Results of `hf-cifar push` by the names of PUSHES, and the requests to the Hub."""
    root, hub = published.root, published.hub
    folders = dict.fromkeys(PUSHES, root / "article")
    for name in (
        "edited",
        "broken card",
        "secret",
        "empty",
        "transient failure",
        "dropped connection",
    ):
        folders[name] = root / name
        shutil.copytree(
            root / "article", root / name, ignore=shutil.ignore_patterns("checkpoint-*")
        )
    # Weights that the Hub does not have yet; it stores them by content.
    for name in ("transient failure", "dropped connection"):
        weights = load_file(root / name / "model.safetensors")
        weights["head.bias"] += len(name)
        save_file(weights, root / name / "model.safetensors", metadata={"format": "pt"})
    card = root / "edited/README.md"
    card.write_text(card.read_text() + "\nThanks to Ann.\n")
    card = root / "broken card/README.md"
    card.write_text(
        card.read_text().replace("pipeline_tag: image-classification", "pipeline_tag: refused")
    )
    (root / "secret/report.json").write_text(json.dumps({"path": str(root / "secret")}))
    (root / "empty/model.safetensors").unlink()
    (root / "article/report.html").write_text("<p>report")
    hub.faults |= {key: list(faults) for key, faults in FAULTS.items()}
    hub.repos["models", "audience/known"] = Repo()
    commands = [
        (token, ["push", str(folders[name]), "--repo_id", *argv])
        for name, (token, argv) in PUSHES.items()
    ]
    # The retry command printed by the run whose push failed.
    del hub.refused["commit", "me/full"]
    program, *retry = shlex.split(
        published.commands["full disk"].stderr.partition("retry with: ")[2]
    )
    assert program == "hf-cifar"
    commands.append((TOKEN, retry))
    asked = len(hub.requests)
    done = run_commands(commands, hub_environment(root / "home", hub.endpoint))
    return dict(zip([*PUSHES, "retry"], done, strict=True)), hub.requests[asked:]


@pytest.fixture(scope="module")
def outside_predictions(published, pushes):
    """Predictions of transformers for one image: for each pushed repo, its folder, and its card's code."""
    names, code = [], {}
    for name in ("vit", "timm", "article", "new"):
        options = {"trust_remote_code": True} if name in ("article", "new") else {}
        folder = "article" if name == "new" else name
        names += [(f"me/{name}", options), (str(published.root / folder), options)]
        card = published.files(f"me/{name}")["README.md"].decode()
        code[f"me/{name}"] = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    image = published.root / "image.png"
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(image)
    done = subprocess.run(
        [sys.executable, "-c", OUTSIDE_USE, str(image), json.dumps(names), json.dumps(code)],
        env=hub_environment(published.root / "another_home", published.hub.endpoint),
        cwd=published.root, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers, imported = json.loads(done.stdout)
    assert not imported
    return answers


def error_line(command, after_start=False):
    """The one-line error of a failed command, after its log of model and training, if any."""
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
    [("vit", {PROCESSOR, EVAL_RESULTS}), ("timm", set()), ("article", {PROCESSOR, "article.py"})],
)
def test_exactly_the_public_files_are_pushed(published, name, more):
    assert published.commands[name].status == 0, published.commands[name].stderr
    assert set(published.files(f"me/{name}")) == MODEL_FILES | more
    local = published.root / name
    for path, content in published.files(f"me/{name}").items():
        if path != "README.md":
            assert (local / path).read_bytes() == content, path
    # The private files exist, so they can be left out.
    assert (local / "config.yaml").exists() and (local / "predictions").is_dir()
    assert list(local.glob("checkpoint-*"))


def test_no_local_path_and_no_token_in_what_is_pushed_or_printed(published, pushes):
    secrets = [TOKEN, str(published.root), published.root.name]
    for (kind, repo_id), repo in published.hub.repos.items():
        for path, content in repo.files.items():
            for secret in secrets:
                assert secret.encode() not in content, (kind, repo_id, path)
    for name, command in [*published.commands.items(), *pushes[0].items()]:
        assert not re.search(r"hf_[lw]\w+", command.stdout + command.stderr), name
    for path in published.root.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no such model", "no model google/vit-bas on the Hub, or it is private or gated"),
        ("no such revision", "has no revision 'v7'"),
    ],
)
def test_missing_hub_model_fails_first(published, name, words):
    assert words in error_line(published.commands[name])
    assert not (published.root / name).exists()


@pytest.mark.parametrize("name", ["vit", "timm", "article", "new"])
def test_from_pretrained_has_the_same_logits(published, outside_predictions, name):
    folder = published.root / ("article" if name == "new" else name)
    pushed, local = outside_predictions[f"me/{name}"], outside_predictions[str(folder)]
    assert pushed["logits"] == local["logits"] and pushed["score"] == local["score"]
    assert len(set(pushed["logits"])) == 10
    labels = list(pushed["labels"].values())
    assert labels == ([str(digit) for digit in range(10)] if name == "timm" else NAMES)
    assert pushed["top"] == local["top"] == labels[int(np.argmax(pushed["logits"]))]


@pytest.mark.parametrize("name", ["vit", "timm", "article", "new"])
def test_the_code_in_the_card_runs(outside_predictions, name):
    answer = outside_predictions[f"me/{name}"]
    first = ast.literal_eval(answer["card"])[0]
    assert (first["label"], first["score"]) == (answer["top"], answer["score"])


def test_the_card_loads_the_adapter_on_its_base(published):
    """In plain transformers and peft, with the logits of the merged model."""
    assert published.commands["lora"].status == 0, published.commands["lora"].stderr
    files = published.files("me/lora")
    adapter = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert set(files) == MODEL_FILES | {PROCESSOR} | adapter
    assert len(files["adapter/adapter_model.safetensors"]) < len(files["model.safetensors"]) / 4
    card = files["README.md"].decode()
    assert ModelCard(card).data.tags == ["image-classification", "hf-cifar", "lora"]
    code = (
        re.findall(r"```python\n(.*?)```", card, re.DOTALL)[1]
        + """
import torch
merged = AutoModelForImageClassification.from_pretrained("me/lora")
images = torch.randn(3, 3, 224, 224)
with torch.inference_mode():
    both = [each.eval()(pixel_values=images).logits for each in (model, merged)]
print(both[0].std(0).max().item(), (both[0] - both[1]).abs().max().item())
"""
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=published.root,
        env=hub_environment(published.root / "third_home", published.hub.endpoint),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    spread, difference = (float(value) for value in done.stdout.split())
    assert difference < 1e-5 < spread


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
def test_pushed_card_is_valid_and_correct(published, name):
    text = published.files(f"me/{name}")["README.md"].decode()
    facts = json.loads((published.root / name / "run.json").read_text())
    metrics = json.loads(published.files(f"me/{name}")["metrics.json"])
    assert card_errors(text) == []
    card = ModelCard(text)
    assert {r.dataset_split: r.metric_value for r in card.data.eval_results} == {
        split: pytest.approx(own["accuracy"], abs=1e-6) for split, own in metrics.items()
    }
    assert facts["split_hash"] in text
    code = ", trust_remote_code=True" if name == "article" else ""
    assert f'pipeline("image-classification", model="me/{name}"{code})' in text


def test_card_links_data_set_and_base_model_only_if_they_are_on_the_hub(published):
    cards = {n: ModelCard(published.files(f"me/{n}")["README.md"].decode()).data for n in
             ("vit", "timm", "article")}  # fmt: skip
    assert cards["vit"].base_model == "google/vit-base-patch16-224-in21k"
    assert cards["vit"].datasets == ["uoft-cs/cifar10"]
    for name in ("timm", "article"):
        assert cards[name].base_model is None and cards[name].datasets is None


def test_licence_and_citations_are_those_of_the_base_models_card(published):
    texts = {n: published.files(f"me/{n}")["README.md"].decode() for n in ("vit", "timm")}
    assert ModelCard(texts["vit"]).data.license == "apache-2.0"
    assert "@misc{vit, title={ViT}}" in texts["vit"] and "Krizhevsky" in texts["vit"]
    assert ModelCard(texts["timm"]).data.license is None


def test_test_metrics_are_eval_results_of_the_hub_data_set(published):
    content = yaml.safe_load(published.files("me/vit")[EVAL_RESULTS])
    (entry,) = parse_eval_result_entries(content)
    metrics = json.loads(published.files("me/vit")["metrics.json"])
    assert entry.dataset_id == "uoft-cs/cifar10"
    assert entry.value == pytest.approx(metrics["test"]["accuracy"], abs=1e-6)


def test_push_is_one_commit_to_a_private_repo(published):
    for name in ("vit", "timm", "article"):
        repo = published.hub.repos["models", f"me/{name}"]
        assert repo.num_commits == 1 and repo.private


def test_refused_repo_fails_before_training(published):
    command = published.commands["foreign"]
    line = error_line(command, after_start=True)
    assert (
        "cannot push to them/vit: me has no write access to them; choose a name in me or team"
        in line
    )
    assert not (published.root / "foreign").exists()


def test_refused_name_and_card_fail_before_training(published):
    line = error_line(published.commands["no such name"], after_start=True)
    assert "'me/a b' is not a valid repository name" in line
    line = error_line(published.commands["refused card"], after_start=True)
    assert "the Hub rejects the model card's metadata" in line and "not this one" in line
    for name in ("no such name", "refused card"):
        assert not (published.root / name).exists()


def test_missing_token_fails_before_training(published):
    line = error_line(published.commands["anonymous"])
    assert "needs a token" in line and "hf auth login" in line
    assert not (published.root / "anonymous").exists()


def test_failed_push_keeps_the_model(published):
    folder = published.root / "full disk"
    line = error_line(published.commands["full disk"], after_start=True)
    assert "push to me/full failed: the Hub failed: try again" in line and "500" in line
    assert f"the model is saved in {folder}" in line
    assert (folder / "model.safetensors").exists() and (folder / "metrics.json").exists()


def test_retry_command_of_a_failed_push_works(published, pushes):
    assert pushes[0]["retry"].status == 0, pushes[0]["retry"].stderr
    assert set(published.files("me/full")) == MODEL_FILES | {PROCESSOR}
    assert published.hub.repos["models", "me/full"].num_commits == 1
    # The weights were uploaded before the commit failed.
    assert not [request for request in pushes[1] if request.startswith("PUT /lfs/me/full/")]


def test_later_evaluation_updates_the_card(published):
    assert published.commands["evaluate"].status == 0, published.commands["evaluate"].stderr
    text = (published.root / "full disk/README.md").read_text()
    metrics = json.loads((published.root / "full disk/metrics.json").read_text())
    assert f"**Accuracy on test: {metrics['test']['accuracy']:.4f}" in text
    assert {r.dataset_split for r in ModelCard(text).data.eval_results} == {"validation", "test"}


# hf-cifar push


def test_dry_run_reports_everything_and_uploads_nothing(published, pushes):
    command = pushes[0]["dry run"]
    assert command.status == 0 and not command.loaded_torch
    lines = command.stdout.splitlines()
    assert lines[:4] == [
        "repository  me/dry, new, private",
        "token       of me, not shown",
        "permission  to create it",
        "card        valid",
    ]
    assert re.fullmatch(r"files       7, \d+\.\d{3} MB, in one commit", lines[4])
    listed = {line.split()[-1]: float(line.split()[0]) for line in lines[5:-1]}
    assert set(listed) == ARTICLE_FILES | {"report.html"}
    size = (published.root / "article/model.safetensors").stat().st_size
    assert listed["model.safetensors"] == pytest.approx(size / 1e6, abs=1e-3)
    assert "nothing was uploaded" in lines[-1]
    assert ("models", "me/dry") not in published.hub.repos


def test_manual_push_is_one_private_commit_with_the_same_checks(published, pushes):
    command = pushes[0]["new"]
    assert command.status == 0, command.stderr
    assert command.stdout.startswith("repository  me/new, new, private\n")
    assert command.stdout.splitlines()[-1] == f"pushed to {published.hub.endpoint}/me/new"
    repo = published.hub.repos["models", "me/new"]
    assert repo.private and set(repo.files) == ARTICLE_FILES | {"report.html"}
    card = repo.files["README.md"].decode()
    assert 'model="me/new", trust_remote_code=True)' in card and card_errors(card) == []


def test_files_on_the_hub_are_not_sent_again(published, pushes):
    again, requests = pushes[0]["repeated"], pushes[1]
    assert again.status == 0, again.stderr
    assert published.hub.repos["models", "me/new"].num_commits == 1
    assert (
        "repository  me/new, existing, private"
        in pushes[0]["dry run for an existing repository"].stdout
    )
    # The run itself has uploaded the weights; another repo does not need them again.
    assert not [request for request in requests if request.startswith("PUT /lfs/me/new")]


def test_missing_branch_is_created(published, pushes):
    assert pushes[0]["branch"].status == 0, pushes[0]["branch"].stderr
    repo = published.hub.repos["models", "me/new"]
    assert set(repo.branches) == {"v2"} and set(repo.branches["v2"].files) == set(repo.files)


def test_push_to_a_public_repo_of_an_organisation(published, pushes):
    for name, repo_id in (("public", "me/public"), ("organisation", "team/model")):
        assert pushes[0][name].status == 0, pushes[0][name].stderr
        assert set(published.files(repo_id)) == ARTICLE_FILES | {"report.html"}
    assert not published.hub.repos["models", "me/public"].private
    assert published.hub.repos["models", "team/model"].private


@pytest.mark.parametrize(
    ("name", "repo_id"),
    [
        ("rate limit", "me/busy"),
        ("transient failure", "me/failing"),
        ("dropped connection", "me/dropped"),
        ("unanswered commit", "me/unanswered"),
    ],
)
def test_transient_fault_is_retried_with_one_commit(published, pushes, name, repo_id):
    assert pushes[0][name].status == 0, pushes[0][name].stderr
    repo = published.hub.repos["models", repo_id]
    assert repo.num_commits == 1 and "model.safetensors" in repo.files
    left = [faults for (_, owner), faults in published.hub.faults.items() if owner == repo_id]
    assert left and not any(left)
    sent = [r for r in pushes[1] if r.startswith(f"PUT /lfs/{repo_id}/") and r.endswith(" 200")]
    assert len(sent) == (1 if name in ("transient failure", "dropped connection") else 0)


REFUSALS = {
    "foreign": "cannot push to them/model: me has no write access to them; choose a name in me or team",
    "read-only organisation": "me has no write access to audience",
    "read-only repository": "cannot push to audience/known: the token has no write access",
    "read-only token": "cannot push to me/read: the token of me is read-only",
    "wrong token": "cannot push to me/wrong: the token is invalid or expired: run hf auth login",
    "no token": "a push needs a token; run: hf auth login, or set HF_TOKEN",
    "no such name": "'me/a b' is not a valid repository name",
    "forbidden": "push to me/forbidden failed: the token has no write access",
    "conflict": "push to me/conflict failed: the repository is being changed by another client: try again",
    "broken card": "the Hub rejects the model card's metadata",
    "secret": "secret/report.json contains a local path",
    "empty": "no finished model in",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_impossible_push_is_a_one_line_error(published, pushes, name):
    line = error_line(pushes[0][name], after_start=True)
    assert REFUSALS[name] in line
    repo_id = PUSHES[name][1][0]
    assert not published.hub.repos.get(("models", repo_id), Repo()).files
    if name in ("forbidden", "conflict"):
        assert line.endswith(
            f"retry with: hf-cifar push {published.root / 'article'} --repo_id {repo_id}"
        )


def test_edited_card_is_pushed(published, pushes):
    assert pushes[0]["edited"].status == 0, pushes[0]["edited"].stderr
    card = published.files("me/edited")["README.md"].decode()
    assert card.endswith("Thanks to Ann.\n") and 'model="me/edited"' in card


def test_missing_network_fails_quickly_and_explains_offline_mode(tmp_path):
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
    # The first command imports torch, which must not be timed here.
    lines = [[*output, *digits, *scratch, "--fp16"], *needs.values()]
    first, *done = run_commands([(TOKEN, ["finetune", *argv]) for argv in lines], home)
    assert "fp16 needs a GPU" in error_line(first)
    for what, command in zip(needs, done, strict=True):
        line = error_line(command)
        assert f"{what} needs {CLOSED}, which cannot be reached" in line
        if what == "--push_to_hub":
            assert "check the connection and HF_ENDPOINT" in line
        else:
            assert "set HF_HUB_OFFLINE=1" in line and "bundled/" in line
    # The client alone would retry for at least 23 s.
    assert max(command.seconds for command in done) < 10
    assert not (tmp_path / "run").exists()

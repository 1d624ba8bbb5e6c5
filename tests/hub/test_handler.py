"""hf_cifar.hub.handler: pushed with a run, fetched, and called as an endpoint does, without hf_cifar."""

import base64
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_lines import run_commands
from hub_server import TOKEN, Hub, hub_environment
from pictures import ORIENTATION, encode, png16, tiff
from PIL import Image
from test_preprocessor import files, noise
from tiny import tiny_run

from hf_cifar import PredictConfig, predict_files
from hf_cifar.errors import UserError
from hf_cifar.hub.endpoint import HANDLER, endpoint_files
from hf_cifar.hub.handler import EndpointHandler
from hf_cifar.report.card import load_card

TOLERANCE = 2e-6  # scores have six digits
DEEP = ("16-bit png", "float tiff")  # which plain Pillow does not read in full

# What the Inference Toolkit does: it imports the file by its path, and calls the class with the body of a
# request, or with the Pillow image that it made of it.
ENDPOINT = """
import importlib.util, json, pathlib, sys
from PIL import Image
folder, images = sys.argv[1:]
spec = importlib.util.spec_from_file_location("handler.EndpointHandler", folder + "/handler.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
handler, answers = module.EndpointHandler(folder), {}
for path in sorted(pathlib.Path(images).iterdir()):
    try:
        answers[path.name] = handler({"inputs": path.read_bytes()})
    except ValueError as error:
        answers[path.name] = {"error": str(error)}
picture = Image.open(images + "/turned jpeg").convert("RGB")
answers["picture"] = handler({"inputs": picture, "parameters": {"top_k": 2}})
print(json.dumps([answers, "hf_cifar" in sys.modules]))
"""
FETCH = """
import sys
from huggingface_hub import snapshot_download
for name in sys.argv[1:]:
    snapshot_download(f"me/{name}", local_dir=name)
"""


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """A folder with an image file of each kind."""
    folder = tmp_path_factory.mktemp("kinds")
    for name, content in files().items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, stripes, lights, tiny_vit):
    root = tmp_path_factory.mktemp("runs")
    tiny_run(root / "single", stripes, tiny_vit, "--num_train_epochs", "1")
    tiny_run(root / "timm", stripes, "scratch/test_vit", "--num_train_epochs", "1", "--reject")
    tiny_run(root / "multi", lights, tiny_vit, "--train_val_split", "0.2")
    return root


@pytest.fixture(scope="module")
def pushed(tmp_path_factory, runs):
    """The folder that `hf-cifar push --handler` published and a client fetched, by the name of the run."""
    root = tmp_path_factory.mktemp("pushed")
    names = ("single", "timm", "multi")
    with Hub() as hub:
        environment = hub_environment(root / "home", hub.endpoint)
        push = [
            ["push", str(runs / name), "--repo_id", f"me/{name}", "--handler"] for name in names
        ]
        commands = [(TOKEN, [*push[0], "--dry_run"]), *((TOKEN, argv) for argv in push)]
        dry, *done = run_commands(commands, environment)
        assert dry.status == 0 and "handler.py" in dry.stdout and "nothing was" in dry.stdout
        for command in done:
            assert command.status == 0, command.stderr
        subprocess.run([sys.executable, "-c", FETCH, *names], env=environment, cwd=root, check=True)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", ["single", "timm", "multi"])
def test_an_endpoint_answers_as_predict(pushed, runs, kinds, name):
    done = subprocess.run(
        [sys.executable, "-c", ENDPOINT, str(pushed / name), str(kinds)],
        capture_output=True, text=True, timeout=300, cwd=pushed,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers, imported = json.loads(done.stdout)
    assert not imported
    config = PredictConfig(str(runs / name), use_cpu=True)
    for record in predict_files(config, [str(kinds)]):
        kind = Path(record.pop("path")).name
        if kind in DEEP:
            assert answers[kind]["error"].startswith("cannot read image: only grey images of 16")
            continue
        assert_same(answers[kind], record)
    turned = next(iter(predict_files(config, [str(kinds / "turned jpeg")])))
    assert_same({**answers["picture"], "top_k": turned["top_k"]}, turned)
    assert len(answers["picture"]["top_k"]) == 2


def assert_same(answer, record):
    record = {key: value for key, value in record.items() if key != "path"}
    assert answer.keys() == record.keys()
    for key in ("labels", "top_k"):
        assert [each["label"] for each in answer.get(key, ())] == [
            each["label"] for each in record.get(key, ())
        ]
        for one, other in zip(answer.get(key, ()), record.get(key, ()), strict=True):
            assert one["score"] == pytest.approx(other["score"], abs=TOLERANCE)
    assert answer.get("label") == record.get("label")


@pytest.mark.slow
def test_the_run_has_what_was_pushed_and_its_card_stays_the_same(pushed, runs):
    for name in ("single", "timm", "multi"):
        assert (runs / name / "handler.py").read_bytes() == HANDLER.read_bytes()
        assert (pushed / name / "handler.py").read_bytes() == HANDLER.read_bytes()
        assert load_card(runs / name)[0].custom_code is False
        assert "trust_remote_code=True" not in (pushed / name / "README.md").read_text()
    assert (pushed / "timm/requirements.txt").read_text().startswith("timm==")
    assert not (pushed / "single/requirements.txt").exists()


@pytest.fixture(scope="module")
def handler(runs):
    return EndpointHandler(str(runs / "single"))


@pytest.fixture(scope="module")
def image(kinds):
    return (kinds / "jpeg").read_bytes()


@pytest.mark.parametrize("form", ["base64", "data URL", "list", "Pillow"])
def test_forms_of_an_image_have_the_same_answer(handler, kinds, image, form):
    text = base64.b64encode(image).decode()
    inputs = {
        "base64": text,
        "data URL": f"data:image/jpeg;base64,{text}",
        "list": [image, text],
        "Pillow": Image.open(kinds / "jpeg"),
    }[form]
    expected = handler({"inputs": image})
    assert handler({"inputs": inputs}) == ([expected] * 2 if form == "list" else expected)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        pytest.param({}, "cannot read image: it is of type NoneType", id="no image"),
        pytest.param({"inputs": b"text"}, "cannot read image: not a known image format", id="text"),
        pytest.param({"inputs": "https://host/cat.jpg"}, "Only base64 data is allowed", id="URL"),
        pytest.param({"inputs": "/etc/passwd"}, "cannot read image: ", id="path"),
        pytest.param(
            {"inputs": b"", "parameters": {"k": 1}}, "unknown parameter k; ", id="unknown"
        ),
        pytest.param({"inputs": b"", "parameters": {"top_k": 0}}, "top_k is 0; pass ", id="top_k"),
    ],
)
def test_a_wrong_request_is_a_value_error(handler, data, words):
    with pytest.raises(ValueError, match=words):
        handler(data)


def test_a_truncated_and_a_huge_image_are_refused(handler, image, monkeypatch):
    with pytest.raises(ValueError, match=r"cannot read image: .*[Tt]runcated"):
        handler({"inputs": image[: len(image) // 2]})
    monkeypatch.setattr("hf_cifar.hub.handler.MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(ValueError, match="more than 3,071 pixels"):
        handler({"inputs": image})


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_grey_of_16_bits_is_scaled_by_the_range_of_the_run(runs, tmp_path, kind):
    folder = tmp_path / "run"
    folder.mkdir()
    for path in (runs / "single").glob("*.*"):
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "value_range": [500, 9000]}))
    values = noise(36, 50, kind=np.uint16) // 7
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    deep = Image.fromarray(values)
    encoded = encode(deep, exif=turned) if kind == "png" else tiff(values[..., None])
    (tmp_path / "image").write_bytes(encoded)
    (record,) = predict_files(PredictConfig(str(folder), use_cpu=True), [str(tmp_path / "image")])
    assert_same(EndpointHandler(str(folder))({"inputs": encoded}), record)


def test_colours_of_16_bits_are_refused(handler):
    with pytest.raises(ValueError, match="only grey images of 16 bits"):
        handler({"inputs": png16(noise(36, 36, 3, kind=np.uint16))})


def test_a_model_whose_weights_have_other_names_is_refused(runs, tmp_path):
    from safetensors.torch import load_file, save_file

    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((runs / "single" / name).read_bytes())
    weights = load_file(runs / "single/model.safetensors")
    weights["other.weight"] = weights.pop("classifier.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"finds no weights for classifier\.weight"):
        EndpointHandler(str(tmp_path))


def test_another_handler_and_a_network_without_a_config_are_refused(runs, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((runs / "single" / name).read_bytes())
    (tmp_path / "handler.py").write_text("my own")
    with pytest.raises(UserError, match=r"handler\.py differs from the file that --handler writes"):
        endpoint_files(tmp_path)
    (tmp_path / "config.json").write_text('{"module_class": "Net"}')
    with pytest.raises(UserError, match=r"--handler needs a model that from_pretrained loads"):
        endpoint_files(tmp_path)

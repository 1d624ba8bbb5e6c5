"""hf-cifar demo --space: the written Space runs without hf_cifar, with the same answers, and is pushed."""

import json
import subprocess
import sys

import pytest
import yaml
from demo_page import demo_python, run_demo, scores_of, space_page
from hub_server import READ_TOKEN, TOKEN, Hub, hub_environment
from test_preprocessor import files
from tiny import tiny_run

from hf_cifar import PredictConfig, predict_files

pytestmark = pytest.mark.slow
KINDS = {
    kind: image for kind, image in files().items() if "16-bit" not in kind and "float" not in kind
}
FILES = {"app.py", "requirements.txt", "README.md"}
# As a program that uses the Space would.
CLIENT = """
import json, sys
from gradio_client import Client, handle_file
client = Client(sys.argv[1], verbose=False)
print(json.dumps([client.predict(handle_file(path), api_name="/predict") for path in sys.argv[2:]]))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory, stripes, tiny_vit):
    folder = tmp_path_factory.mktemp("runs") / "vit"
    tiny_run(folder, stripes, tiny_vit)
    return folder


@pytest.fixture(scope="module")
def cnn(tmp_path_factory, stripes):
    folder = tmp_path_factory.mktemp("runs") / "cnn"
    tiny_run(folder, stripes, "scratch/article_cnn")
    return folder


@pytest.fixture(scope="module")
def space(tmp_path_factory, run, cnn):
    folder = tmp_path_factory.mktemp("space") / "space"
    done = run_demo(run, cnn, "--space", folder, "--num_examples", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folder}\n"
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory, space):
    with space_page(tmp_path_factory.mktemp("page"), space) as running:
        yield running


def records(run, paths):
    config = PredictConfig(str(run), use_cpu=True)
    return [
        {each["label"]: each["score"] for each in record["top_k"]}
        for record in predict_files(config, [str(path) for path in paths])
    ]


def test_files(space):
    assert {each.name for each in space.iterdir()} == FILES | {"models", "examples"}
    assert len(list((space / "examples").glob("*.png"))) == 3
    assert {each.name for each in (space / "models").iterdir()} == {"vit", "cnn"}
    assert (space / "models/cnn/article.py").is_file()
    pins = (space / "requirements.txt").read_text().splitlines()
    assert all("==" in pin and "+" not in pin for pin in pins)
    assert {pin.split("==")[0] for pin in pins} == {
        "gradio", "pillow", "torch", "torchvision", "transformers",
    }  # fmt: skip
    metadata = yaml.safe_load((space / "README.md").read_text().split("---")[1])
    assert metadata["sdk"] == "gradio"
    assert f"gradio=={metadata['sdk_version']}" in pins
    assert (space / metadata["app_file"]).is_file()


def test_app_is_written_in_the_style_of_the_project(space):
    subprocess.run(
        [
            sys.executable,
            "-m",
            "ruff",
            "check",
            "--isolated",
            "--line-length",
            "110",
            space / "app.py",
        ],
        check=True,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_predict(page, run, cnn, tmp_path, kind):
    (tmp_path / "image").write_bytes(KINDS[kind])
    shown = [scores_of(label) for label in page.answer(KINDS[kind])]
    for answer, source in zip(shown, (run, cnn), strict=True):
        (expected,) = records(source, [tmp_path / "image"])
        assert answer == pytest.approx(expected, abs=1e-5)


def test_deep_and_unreadable_pictures_are_refused(page):
    for kind in ("16-bit tiff", "float tiff"):
        assert page.answer(files()[kind]) is None
    assert page.answer(b"text") is None


def test_client_of_gradio_gets_the_answers_of_predict(page, run, stripes):
    paths = sorted((stripes / "test").rglob("*.png"))[:6]
    done = subprocess.run(
        [demo_python(), "-c", CLIENT, page.url, *map(str, paths)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    answers = [scores_of(both[0]) for both in json.loads(done.stdout)]
    for answer, expected in zip(answers, records(run, paths), strict=True):
        assert answer == pytest.approx(expected, abs=1e-5)
    assert page.fetched == []


def test_timm_model_and_multiple_labels(tmp_path, lights):
    options = ("--image_size", "32", "--learning_rate", "1e-3")
    tiny_run(tmp_path / "run", lights, "scratch/test_resnet", *options)
    done = run_demo(tmp_path / "run", "--space", tmp_path / "space")
    assert done.returncode == 0, done.stderr
    assert "timm==" in (tmp_path / "space/requirements.txt").read_text()
    picture = next((tmp_path / "space/examples").glob("*.png"))
    with space_page(tmp_path, tmp_path / "space") as page:
        (shown,) = page.answer(picture.read_bytes())
    (expected,) = records(tmp_path / "run", [picture])
    assert any(0.01 < score < 0.99 for score in expected.values())
    assert scores_of(shown) == pytest.approx(expected, abs=1e-5)


def test_another_space_is_not_replaced(run, space):
    before = {path: path.read_bytes() for path in space.rglob("*") if path.is_file()}
    done = run_demo(run, "--space", space)
    assert done.returncode == 2 and "holds another Space, or its app.py was edited" in done.stderr
    assert {path: path.read_bytes() for path in space.rglob("*") if path.is_file()} == before


def test_existing_files_are_kept(tmp_path, run):
    (tmp_path / "mine.txt").write_text("mine")
    done = run_demo(run, "--space", tmp_path)
    assert done.returncode == 2 and "mine.txt" in done.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["mine.txt"]


def test_exported_file_is_refused(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"")
    done = run_demo(tmp_path / "model.onnx", "--space", tmp_path / "space")
    assert done.returncode == 2 and "is an exported file" in done.stderr
    assert not (tmp_path / "space").exists()


def test_push(tmp_path, run):
    with Hub() as hub:
        env = {**hub_environment(tmp_path / "home", hub.endpoint), "PYTHONPATH": "."}
        done = run_demo(run, "--space", tmp_path / "space", "--push", "digits", env=env)
        assert done.returncode == 0, done.stderr
        assert f"pushed to {hub.endpoint}/spaces/me/digits" in done.stdout
        repo = hub.repos["spaces", "me/digits"]
        written = {
            path.relative_to(tmp_path / "space").as_posix(): path.read_bytes()
            for path in (tmp_path / "space").rglob("*")
            if path.is_file()
        }
        assert repo.files == written
        assert repo.private and repo.num_commits == 1
        assert TOKEN not in done.stdout + done.stderr

        env["HF_TOKEN"] = READ_TOKEN
        done = run_demo(run, "--space", tmp_path / "again", "--push", "other", env=env)
        assert done.returncode == 2 and "read-only" in done.stderr
        assert ("spaces", "me/other") not in hub.repos

        env["HF_TOKEN"] = TOKEN
        hub.refused["commit", "me/third"] = 413
        done = run_demo(run, "--space", tmp_path / "third", "--push", "third", env=env)
        assert done.returncode == 2
        retry = f"retry with: hf upload third {tmp_path / 'third'} --repo-type space --private\n"
        assert retry in done.stderr
        assert (tmp_path / "third/app.py").is_file()

"""hf-cifar demo: the page, in Chromium and over HTTP, and its options. Gradio is in another environment."""

import re
import signal

import numpy as np
import pytest
from demo_page import run_demo, scores_of, showing
from PIL import Image
from test_preprocessor import files
from tiny import tiny_run

from hf_cifar import PredictConfig, predict_files
from hf_cifar.cli import main

pytestmark = pytest.mark.slow
KEY = "0123456789abcdef"
KINDS = files()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, stripes, tiny_vit):
    folder = tmp_path_factory.mktemp("runs")
    tiny_run(folder / "vit", stripes, tiny_vit)
    tiny_run(folder / "cnn", stripes, "scratch/article_cnn")
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory, runs):
    with showing(tmp_path_factory.mktemp("demo"), runs / "vit", runs / "cnn") as page:
        yield page


@pytest.fixture
def page(demo, tab):
    """The page in Chromium; nothing may come from elsewhere, or fail."""
    page, problems = tab
    page.on(
        "request", lambda each: problems.append(each.url) if not is_own(each.url, demo) else None
    )
    page.goto(demo.url)
    yield page
    assert problems == []


def is_own(url, demo):
    return url.startswith((demo.url, "data:", "blob:"))


def wait_for_bars(page, count=2):
    page.wait_for_function(
        "count => document.querySelectorAll('[data-testid=label-output-value]').length == count",
        arg=count,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_predict(demo, runs, tmp_path, kind):
    (tmp_path / "image").write_bytes(KINDS[kind])
    answers = demo.answer(KINDS[kind], False)
    for name, shown in zip(("vit", "cnn"), (answers[0], answers[2]), strict=True):
        config = PredictConfig(str(runs / name), use_cpu=True)
        (record,) = predict_files(config, [str(tmp_path / "image")])
        assert shown["label"] == record["label"]
        assert scores_of(shown) == pytest.approx(
            {each["label"]: each["score"] for each in record["top_k"]}, abs=1e-5
        )


def test_chosen_picture_gets_bars_of_both_models(page, picture):
    page.set_input_files("input[type=file]", str(picture))
    wait_for_bars(page)
    assert page.get_by_text("Heat map of vit").count() == 0


def test_heat_maps(page, picture):
    page.set_input_files("input[type=file]", str(picture))
    wait_for_bars(page)
    page.get_by_label("Heat map", exact=True).check()
    for name in ("vit", "cnn"):
        page.get_by_text(f"Heat map of {name}").wait_for()
    page.get_by_label("Heat map", exact=True).uncheck()
    page.get_by_text("Heat map of vit").wait_for(state="detached")


def test_examples_are_validation_images(page, demo):
    assert "6 examples from the validation split" in demo.log.read_text()
    page.locator(".gallery-item").first.click()
    wait_for_bars(page)


def test_camera(page):
    page.get_by_label("Capture from camera").click()
    page.get_by_text("Click to Access Webcam").click()
    page.wait_for_function("document.querySelector('video')?.currentTime > 0")
    page.get_by_label("capture photo").click()
    wait_for_bars(page)


def test_unreadable_picture_is_an_error_and_the_next_one_is_answered(demo, picture):
    assert demo.answer(b"text", False) is None
    assert demo.answer(picture.read_bytes(), False)[0]["label"] in ("across", "down")


def test_a_file_that_is_no_picture_is_one_line_without_its_path(page, tmp_path):
    (tmp_path / "notes.png").write_text("text")
    page.set_input_files("input[type=file]", str(tmp_path / "notes.png"))
    page.get_by_text("cannot read image").wait_for()
    assert "/tmp" not in page.inner_text("body")


@pytest.mark.parametrize(("width", "height"), [(1200, 900), (390, 844), (320, 600)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_the_screen(demo, browser, picture, width, height, scheme):
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    page.goto(demo.url)
    page.set_input_files("input[type=file]", str(picture))
    wait_for_bars(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    context.close()


def test_key_is_the_password(tmp_path, runs, picture):
    with showing(tmp_path, runs / "vit", "--num_examples", "0", HF_CIFAR_API_KEY=KEY) as page:
        assert page.upload(picture.read_bytes())[0] == 401
        form = {"Content_Type": "application/x-www-form-urlencoded"}
        assert page.call("POST", "/login", b"username=a&password=wrong", **form)[0] == 400
        assert page.call("POST", "/login", f"username=a&password={KEY}".encode(), **form)[0] == 200
        assert KEY not in page.log.read_text()


def test_signal_ends_it_and_removes_the_uploads(tmp_path, runs, picture):
    (tmp_path / "temporary").mkdir()
    with showing(tmp_path, runs / "cnn", TMPDIR=str(tmp_path / "temporary")) as page:
        page.answer(picture.read_bytes(), False)
        assert len(list((tmp_path / "temporary").rglob("*.png"))) >= 7
        assert page.stop() == 128 + signal.SIGTERM
    assert list((tmp_path / "temporary").rglob("*.png")) == []
    assert page.fetched == []


def test_moved_data_leave_a_demo_without_examples(tmp_path, runs, stripes, tiny_vit):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("a", "b"):
        (data / name).mkdir()
        for number in range(8):
            pixels = np.full((16, 16, 3), 200 * (name == "a") + number, np.uint8)
            Image.fromarray(pixels).save(data / name / f"{number}.png")
    tiny_run(tmp_path / "run", data, tiny_vit)
    data.rename(tmp_path / "moved")
    with showing(tmp_path, tmp_path / "run") as page:
        assert re.search("no examples: .*--dataset_name", page.log.read_text())
    with showing(tmp_path, tmp_path / "run", "--dataset_name", tmp_path / "moved") as page:
        assert "examples from the validation split" in page.log.read_text()


def test_exported_file_beside_its_run(tmp_path, runs, picture):
    exported = tmp_path / "cnn.onnx"
    assert (
        main(["export", str(runs / "cnn"), "--output", str(exported), "--parity_images", "0"]) == 0
    )
    with showing(tmp_path, runs / "cnn", exported) as page:
        run, run_map, file, file_map = page.answer(picture.read_bytes(), True)
    assert scores_of(file) == pytest.approx(scores_of(run), abs=1e-4)
    assert run_map["value"] is not None and file_map["value"] is None


def test_address_in_use_is_one_line(demo, runs):
    done = run_demo(runs / "vit", "--port", demo.port)
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1 and "cannot listen on 127.0.0.1" in done.stderr

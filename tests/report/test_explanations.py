"""`hf-cifar explain` and `hf-cifar report --explain` on a real run of a tiny network."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
from PIL import Image

from hf_cifar.cli import main
from hf_cifar.report.page import look_up, render_value

pytest.importorskip("captum")


@pytest.fixture(scope="session")
def cnn_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explained") / "digits"
    argv = [
        "finetune", "--model_name_or_path", "scratch/article_cnn", "--dataset_name", "bundled/digits",
        "--output_dir", str(folder), "--num_train_epochs", "1", "--precision", "fp32", "--use_cpu",
        "--learning_rate", "1e-3", "--disable_tqdm", "true", "--save_strategy", "no",
        "--load_best_model_at_end", "false", "--memory_format", "contiguous",
    ]  # fmt: skip
    assert main(argv) == 0
    return folder


@pytest.fixture(scope="session")
def explained(cnn_run):
    """The folder of explanations of three images of the run's own data."""
    argv = ["explain", str(cnn_run), "--num_images", "3", "--use_cpu", "--methods"]
    assert main([*argv, "grad_cam", "integrated_gradients", "feature_maps", "filters"]) == 0
    return cnn_run / "explanations"


@pytest.fixture
def digit(tmp_path):
    file = tmp_path / "digit.png"
    Image.radial_gradient("L").resize((8, 8)).save(file)
    return file


def test_each_image_has_its_prediction_and_pictures(explained, cnn_run):
    facts = json.loads((explained / "explanations.json").read_text())
    assert facts["layer"] == {"name": "backbone.7", "height": 4, "width": 4}
    assert facts["methods"] == ["grad_cam", "integrated_gradients", "feature_maps"]
    assert len(facts["images"]) == 3 and facts["unreadable"] == {}
    for row in facts["images"]:
        assert row["truth"] is not None and row["explained"] == row["prediction"]
        assert 0 < row["score"] <= 1 and row["explained_score"] == row["score"]
        assert set(row["files"]) == {"input", *facts["methods"]}
        sizes = {Image.open(explained / file).size for file in row["files"].values()}
        assert (160, 160) in sizes
        assert set(row["checks"]) == {"grad_cam", "integrated_gradients"}
    assert (explained / "images" / "filters.png").is_file()
    assert not list(cnn_run.glob(".explanations*"))


def test_predictions_are_those_of_predict(cnn_run, digit, tmp_path, capsys, caplog):
    assert main(["predict", "--model_name_or_path", str(cnn_run), "--use_cpu", str(digit)]) == 0
    record = json.loads(capsys.readouterr().out)
    output = tmp_path / "out"
    argv = ["explain", str(cnn_run), str(digit), "--output_dir", str(output), "--use_cpu"]
    assert main([*argv, "--no_sanity"]) == 0
    (row,) = json.loads((output / "explanations.json").read_text())["images"]
    assert row["prediction"] == record["label"]
    assert row["score"] == pytest.approx(record["score"], abs=1e-5)
    assert row["truth"] is None and row["checks"] == {}
    assert "methods: grad_cam, integrated_gradients" in caplog.text
    assert "attention_rollout" not in caplog.text  # which nobody asked for


def test_another_class_can_be_explained(cnn_run, digit, tmp_path):
    argv = ["explain", str(cnn_run), str(digit), "--use_cpu", "--methods", "grad_cam"]
    found = {}
    for target in ("3", "4"):
        output = tmp_path / target
        assert main([*argv, "--target", target, "--output_dir", str(output)]) == 0
        (row,) = json.loads((output / "explanations.json").read_text())["images"]
        assert row["explained"] == target
        found[target] = (output / row["files"]["grad_cam"]).read_bytes()
    assert found["3"] != found["4"]


def test_an_unreadable_file_is_counted_and_the_rest_explained(cnn_run, digit, tmp_path, capsys):
    broken = tmp_path / "broken.png"
    broken.write_bytes(digit.read_bytes()[:50])
    output = tmp_path / "out"
    argv = ["explain", str(cnn_run), str(broken), str(digit), "--output_dir", str(output)]
    assert main([*argv, "--methods", "grad_cam", "--use_cpu"]) == 1
    assert "1 image(s) could not be read" in capsys.readouterr().err
    facts = json.loads((output / "explanations.json").read_text())
    assert len(facts["images"]) == 1 and list(facts["unreadable"]) == [
        f"{tmp_path.name}/broken.png"
    ]
    assert "broken.png" in (output / "explanations.html").read_text()
    before = (output / "explanations.json").read_bytes()
    argv = ["explain", str(cnn_run), str(broken), "--output_dir", str(output), "--use_cpu"]
    assert main(argv) == 2
    assert "none of the 1 images can be read" in capsys.readouterr().err
    assert (output / "explanations.json").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "gradcam"], "does not take 'gradcam' (nearest: grad_cam); it takes grad_cam, "),
        (["--methods", "lime", __file__], "test_explanations.py too; pass the run and the files before it"),
        (["--methods", "attention_rollout"], "has no attention between all patches in every block"),
        (["--target", "thirteen"], "the model has no class 'thirteen'; it has 0, 1, 2, 3,"),
        (["--split", "test"], "--split has no effect with image files"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_nothing_is_written(
    flags, message, cnn_run, digit, tmp_path, capsys
):
    output = tmp_path / "out"
    argv = ["explain", str(cnn_run), str(digit), "--output_dir", str(output), "--use_cpu", *flags]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("hf-cifar: error") == 1
    assert not output.exists()


def test_other_files_are_not_replaced(cnn_run, digit, tmp_path, capsys):
    argv = ["explain", str(cnn_run), str(digit), "--output_dir", str(tmp_path), "--use_cpu"]
    assert main(argv) == 2
    assert "holds other files" in capsys.readouterr().err
    assert digit.is_file()
    (tmp_path / "explanations.json").write_text("{}")
    assert main(argv) == 2 and digit.is_file()
    assert "such as digit.png" in capsys.readouterr().err
    (tmp_path / "model.onnx").write_bytes(b"")
    assert main(["explain", str(tmp_path / "model.onnx"), str(digit)]) == 2
    assert "pass the folder of the run that was exported" in capsys.readouterr().err
    assert main(["explain"]) == 2
    assert main(["explain", str(cnn_run), str(tmp_path / "missing.png")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_without_captum_the_error_names_the_extra(cnn_run, digit, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "captum", None)
    monkeypatch.delitem(sys.modules, "captum.attr", raising=False)
    argv = ["explain", str(cnn_run), str(digit), "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    assert main(argv) == 2
    assert "run: pip install 'hf-cifar[explain]'" in capsys.readouterr().err
    assert main([*argv, "--methods", "grad_cam"]) == 0


def test_a_report_explains_its_worst_errors(cnn_run, tmp_path, capsys):
    folder = tmp_path / "digits"
    shutil.copytree(cnn_run, folder)
    assert main(["report", str(folder), "--explain", "2", "--gallery_size", "1"]) == 2
    assert "pass a larger --gallery_size" in capsys.readouterr().err
    assert main(["report", str(folder), "--explain", "2", "--gallery_size", "4"]) == 0
    facts = json.loads((folder / "report.json").read_text())
    assert len(facts["explained_errors"]) == 2
    for row, shown in zip(facts["explained_errors"], facts["worst_errors"], strict=False):
        assert [each["label"] for each in row["maps"]] == [row["prediction"], row["truth"]]
        assert row["row_id"] == shown["row_id"]
    page = (folder / "report.html").read_text()
    assert "Where the model looked" in page and page.count("Grad-CAM for") >= 4
    assert main(["report", str(folder)]) == 0
    assert "Where the model looked" not in (folder / "report.html").read_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_page_opens_from_disk_and_fits_its_width(browser, explained, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    requests, errors_shown = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: errors_shown.append(message.text))
    page.goto(f"file://{explained / 'explanations.html'}")
    assert [url for url in requests if not url.startswith("data:")] == [page.url]
    assert errors_shown == []
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert page.evaluate("document.images.length") == 3 * 4 + 1
    assert page.eval_on_selector_all("img", "all => all.every(i => i.alt)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


def test_every_number_on_the_page_is_from_its_facts(browser, explained):
    facts = json.loads((explained / "explanations.json").read_text())
    page = browser.new_page()
    page.goto(f"file://{explained / 'explanations.html'}")
    shown = page.eval_on_selector_all(
        "data", "all => all.map(d => [d.value, d.className, d.innerText])"
    )
    assert len(shown) > 40
    for place, form, text in shown:
        assert text == render_value(look_up(facts, place), form), place
    for summary in facts["sanity"].values():
        assert summary["verdict"] in page.inner_text("main")
    page.close()

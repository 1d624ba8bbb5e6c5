"""hf_cifar.studies.drift and `hf-cifar drift`: a run of a tiny network, and images of several kinds."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import yaml
from datasets import load_from_disk
from PIL import Image
from scipy.stats import ks_2samp
from tiny import tiny_run

from benchmarks import drift as benchmark
from hf_cifar.cli import main
from hf_cifar.config.data import DataConfig
from hf_cifar.config.studies import DriftConfig
from hf_cifar.data.splits import DataSource
from hf_cifar.evaluation.predictions import Predictions
from hf_cifar.report.page import look_up, render_value
from hf_cifar.studies.drift import detect_drift


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drift") / "run"
    flags = ("--num_train_epochs", "1", "--precision", "fp32", "--save_strategy", "no",
             "--load_best_model_at_end", "false", "--memory_format", "contiguous", "--eval_strategy", "no",
             "--train_val_split", "0.3")  # fmt: skip
    tiny_run(folder, "bundled/digits", "scratch/article_cnn", *flags)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Folders of digits of test without labels: as they are, and upside down with an unreadable file."""
    root = tmp_path_factory.mktemp("pictures")
    test = DataSource(DataConfig(dataset_name="bundled/digits")).test_split
    for name in ("same", "turned"):
        (root / name).mkdir()
        for i in range(120):
            image = test.decode(i) if name == "same" else np.ascontiguousarray(test.decode(i)[::-1])
            Image.fromarray(image).save(root / name / f"{i:03}.png")
    (root / "turned" / "broken.png").write_bytes((root / "same" / "000.png").read_bytes()[:60])
    return root


@pytest.fixture(scope="module")
def turned(digits_run, pictures, tmp_path_factory):
    """The page of the digits that are upside down."""
    folder = tmp_path_factory.mktemp("page") / "drift"
    argv = ["drift", str(digits_run), str(pictures / "turned"), "--output_dir", str(folder)]
    assert main([*argv, "--gallery_size", "5", "--use_cpu"]) == 1
    return folder


def facts_of(folder):
    return json.loads((folder / "drift.json").read_text())


def test_drift_is_found_and_the_exit_status_is_one(turned):
    facts = facts_of(turned)
    assert facts["drift"] and facts["verdict"].startswith("Drift: these images are not like those")
    assert facts["tests"]["ks"]["drift"] and facts["tests"]["mmd"]["p"] == pytest.approx(0.002)
    assert facts["num_available"] == 121 and facts["num_unreadable"] == 1
    assert facts["num_images"] == {"reference": facts["num_validation"], "new": 120}
    assert facts["has_features"] and facts["tests"]["mmd"]["level"] == 0.025
    for sample in ("reference", "new"):
        shares = [each["share"][sample]["value"] for each in facts["classes"]]
        assert sum(shares) == pytest.approx(1)


def test_the_strangest_pictures_have_their_names(turned):
    rows = facts_of(turned)["strangest"]
    distances = [row["distance"] for row in rows]
    assert len(rows) == 5 and distances == sorted(distances, reverse=True)
    for row in rows:
        assert row["name"].endswith(".png") and "broken" not in row["name"]
        # The broken file comes after the digits, so positions and numbers agree.
        assert row["name"] == f"{row['row']:03}.png" and 0 < row["confidence"] <= 1


def test_digits_of_test_are_no_drift(digits_run, pictures, capsys):
    argv = ["drift", str(digits_run), str(pictures / "same"), "--use_cpu", "--alpha", "0.01"]
    assert main(argv) == 0
    first = capsys.readouterr().out
    assert "No drift found in 120 images; so few images only show large differences." in first
    assert main(argv) == 0
    assert capsys.readouterr().out == first  # the same call gives the same answer
    assert main(["drift", str(digits_run), "bundled/digits", "--split", "test", "--use_cpu"]) == 0


def test_the_outputs_are_those_of_the_runs_evaluation(digits_run, pictures):
    facts = detect_drift(digits_run, str(pictures / "same"), DriftConfig(use_cpu=True))
    saved = Predictions.load(digits_run, "validation")
    assert facts["accuracy"]["reference"]["value"] == pytest.approx(saved.correct.mean())
    shares = [each["share"]["reference"]["value"] for each in facts["classes"]]
    assert shares == pytest.approx(np.bincount(saved.predicted, minlength=10) / len(saved.labels))
    assert facts["temperature"] == pytest.approx(1, abs=0.05)  # the run is calibrated
    itself = detect_drift(digits_run, "bundled/digits", DriftConfig(split="test", use_cpu=True))
    assert len(itself["strangest"]) == 24 and itself["strangest"][0]["name"].startswith("row ")
    argv = ["evaluate", "--model_name_or_path", str(digits_run), "--split", "test", "--use_cpu"]
    assert main(argv) == 0
    test = Predictions.load(digits_run, "test")
    expected = ks_2samp(saved.probabilities[:, 3], test.probabilities[:, 3], method="exact")
    found = itself["classes"][3]
    assert found["statistic"] == pytest.approx(expected.statistic, abs=0.01)
    assert found["p"] == pytest.approx(expected.pvalue, abs=0.05)


def test_many_images_are_sampled_and_that_is_stated(digits_run, caplog):
    caplog.set_level("INFO", logger="hf_cifar")
    config = DriftConfig(split="test", num_images=50, gallery_size=0, use_cpu=True)
    facts = detect_drift(digits_run, "bundled/digits", config)
    assert facts["num_images"] == {"reference": 50, "new": 50} and facts["strangest"] == []
    assert f"50 of {facts['num_available']} readable images of bundled/digits" in caplog.text
    assert "the data of the run" not in caplog.text
    config = DriftConfig(num_images=50, use_cpu=True)
    detect_drift(digits_run, "bundled/digits", config)
    assert "bundled/digits is the data of the run: the model was trained on" in caplog.text


def test_multi_label_runs(tmp_path, lights, tiny_vit, caplog):
    tiny_run(tmp_path / "run", lights, tiny_vit, "--train_val_split", "0.3")
    rows = load_from_disk(str(lights))["test"]
    for name, colour in (("same", None), ("dark", 0)):
        (tmp_path / name).mkdir()
        for i, photo in enumerate(rows["photo"]):
            image = photo if colour is None else Image.new("RGB", photo.size, (0, 0, i))
            image.save(tmp_path / name / f"{i}.png")
    config = DriftConfig(output_dir=str(tmp_path / "page"), use_cpu=True)
    assert not detect_drift(tmp_path / "run", str(tmp_path / "same"), config)["drift"]
    facts = detect_drift(tmp_path / "run", str(tmp_path / "dark"), config)
    assert facts["drift"] and facts["multi_label"] and facts["accuracy"] is None
    assert facts["strangest"][0]["prediction"] == "no label"
    assert "sigmoid output" in (tmp_path / "page" / "drift.html").read_text()


def test_a_head_of_two_layers_is_compared_by_its_logits(tmp_path, stripes, caplog):
    caplog.set_level("INFO", logger="hf_cifar")
    model = "scratch/deit_tiny_distilled_patch16_224"
    flags = ("--image_size", "32", "--max_steps", "1", "--train_val_split", "0.3", "--save_strategy", "no",
             "--load_best_model_at_end", "false")  # fmt: skip
    tiny_run(tmp_path / "run", stripes, model, *flags)
    facts = detect_drift(tmp_path / "run", str(stripes), DriftConfig(split="test", use_cpu=True))
    assert not facts["has_features"] and facts["tests"]["mmd"]["components"] <= 2
    assert "the logits are used as features" in caplog.text


def test_mistakes_are_one_line_and_nothing_is_written(
    digits_run, finished_vit, pictures, tmp_path, capsys
):
    same, output = str(pictures / "same"), tmp_path / "out"
    moved = tmp_path / "moved"
    shutil.copytree(digits_run, moved)
    options = yaml.safe_load((moved / "config.yaml").read_text())
    options["dataset_name"] = str(tmp_path / "gone")
    (moved / "config.yaml").write_text(yaml.safe_dump(options))
    (tmp_path / "model.onnx").write_bytes(b"")
    (tmp_path / "few").mkdir()
    shutil.copy(pictures / "same" / "000.png", tmp_path / "few")
    cases = (
        ([str(digits_run)], "drift takes two arguments, the folder of a run and the images, not 1"),
        ([str(tmp_path / "model.onnx"), same], "pass the folder of the run that was exported"),
        ([same, same], "holds no finished run"),
        ([str(moved), same], "if the data has moved, pass its location as --dataset_name"),
        ([str(digits_run), str(tmp_path / "none")], "none"),
        ([str(digits_run), str(tmp_path / "few")], "only 1 readable images of"),
        ([str(finished_vit), same], "only 8 validation images of the run"),
        ([str(digits_run), same, "--alpha", "0.9"], "--alpha is 0.9; it must be in 0.001..0.5"),
        ([str(digits_run), same, "--split", "test"], "has no split test"),
        ([str(digits_run), same, "--output_dir", same], "holds other files, such as 000.png"),
    )
    for arguments, message in cases:
        if "--output_dir" not in arguments:
            arguments = [*arguments, "--output_dir", str(output)]
        assert main(["drift", *arguments, "--use_cpu"]) == 2, message
        error = capsys.readouterr().err
        assert message in error and error.count("hf-cifar: error") == 1
        assert not output.exists()
    argv = ["drift", str(moved), same, "--dataset_name", "bundled/digits", "--use_cpu"]
    assert main(argv) == 0  # the run's data has moved there


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_page_opens_from_disk_and_fits_its_width(browser, turned, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    requests, errors_shown = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: errors_shown.append(message.text))
    page.goto(f"file://{turned / 'drift.html'}")
    assert [url for url in requests if not url.startswith("data:")] == [page.url]
    assert errors_shown == []
    assert page.evaluate("document.images.length") == 5
    assert page.evaluate(
        "[...document.images].every(i => i.complete && i.naturalWidth > 0 && i.alt)"
    )
    assert page.evaluate("document.querySelectorAll('svg.plot').length") == 3
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


def test_every_number_on_the_page_is_from_its_facts(browser, turned):
    facts = facts_of(turned)
    page = browser.new_page()
    page.goto(f"file://{turned / 'drift.html'}")
    shown = page.eval_on_selector_all(
        "data", "all => all.map(d => [d.value, d.className, d.innerText])"
    )
    assert len(shown) > 80
    for place, form, text in shown:
        assert text == render_value(look_up(facts, place), form), place
    assert facts["verdict"] in page.inner_text("main")
    page.close()


def test_the_benchmark_in_tiny_form(digits_run, tmp_path, monkeypatch):
    argv = ["drift", "--run", str(digits_run), "--draws", "2", "--corrupted_draws", "1", "--num_images", "60",
            "--fewer_images", "30", "--pool", "60", "--output", str(tmp_path)]  # fmt: skip
    monkeypatch.setattr("sys.argv", argv)
    benchmark.main()
    (file,) = tmp_path.iterdir()
    clean, corrupted, accuracy = map(json.loads, file.read_text().splitlines())
    assert list(clean["figures"]) == ["clean"] and clean["n"] == 2
    assert len(corrupted["figures"]) == 15 * (3 + 1) and corrupted["n"] == 1
    assert corrupted["counts"]["gaussian_noise, severity 5"]["either"] in (0, 1)
    assert len(accuracy["accuracy"]) == accuracy["n"] == 1 + 15 * 3
    errors = [abs(each["true"] - each["estimate"]) for each in accuracy["accuracy"].values()]
    assert accuracy["mean"] == pytest.approx(np.mean(errors))

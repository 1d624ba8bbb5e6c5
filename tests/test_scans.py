"""Runs on images of more than 8 bits, from files to predictions."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_config, tiny_run
from transformers import AutoConfig

from hf_cifar import predict_files
from hf_cifar.config.data import DataConfig, ValueRange
from hf_cifar.config.deployment import PredictConfig
from hf_cifar.config.evaluation import EvaluateConfig, ReportConfig
from hf_cifar.data.splits import DataSource
from hf_cifar.errors import UserError
from hf_cifar.evaluate import evaluate_saved
from hf_cifar.evaluation.predictions import Predictions
from hf_cifar.models.value_range import saved_value_range
from hf_cifar.report.facts import build_report
from hf_cifar.runs.resume import check_folder

MODELS = {"vit": "tiny_vit", "timm": None}


@pytest.fixture(scope="module")
def scans(stripes, tmp_path_factory):
    """The stripes as grey scans: twice, of 8 bits, and of 12 bits in 16-bit files."""
    root = tmp_path_factory.mktemp("scans")
    for path in stripes.rglob("*.png"):
        grey = np.asarray(Image.open(path).convert("L"))
        eight, twelve = (root / kind / path.relative_to(stripes) for kind in ("eight", "twelve"))
        eight.parent.mkdir(parents=True, exist_ok=True)
        twelve.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grey).save(eight)
        Image.fromarray(grey.astype(np.uint16) * 16 + 8).save(twelve.with_suffix(".tiff"))
    return root


@pytest.fixture(scope="module", params=MODELS)
def runs(request, scans, tiny_vit, tmp_path_factory):
    """A run on the scans of 8 bits and one on those of 12."""
    folder = tmp_path_factory.mktemp("runs")
    model = tiny_vit if request.param == "vit" else "scratch/test_resnet"
    size = () if request.param == "vit" else ("--image_size", "32")
    for kind in ("eight", "twelve"):
        tiny_run(folder / kind, scans / kind, model, "--do_predict", "--probe_images", "0", *size)
    return folder


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_training_sees_nearly_the_pixels_of_the_twins(runs):
    eight, twelve = (Predictions.load(runs / kind, "test") for kind in ("eight", "twelve"))
    assert (eight.row_ids == twelve.row_ids).all()
    assert (eight.labels == twelve.labels).all()
    assert np.abs(eight.logits - twelve.logits).max() < 0.1 * np.abs(eight.logits).max() + 0.1
    assert abs(eight.metrics["accuracy"] - twelve.metrics["accuracy"]) <= 0.05


def test_the_range_is_in_run_json_config_and_card(runs):
    low, high = read(runs / "twelve", "run.json")["value_range"]
    assert 0 <= low < 100
    assert 3600 < high < 4096
    config = AutoConfig.from_pretrained(runs / "twelve")
    assert config.value_range == [low, high]
    card = (runs / "twelve" / "README.md").read_text()
    assert f"values from {low:g} to {high:g} became 0 to 255" in card
    assert read(runs / "eight", "run.json")["value_range"] is None
    assert "value_range" not in read(runs / "eight", "config.json")
    assert "more than 8 bits" not in (runs / "eight" / "README.md").read_text()


def test_evaluate_and_predict_use_the_range(runs, scans, tmp_path):
    before = Predictions.load(runs / "twelve", "test")
    config = EvaluateConfig(
        model_name_or_path=str(runs / "twelve"),
        split="test",
        use_cpu=True,
        output_dir=str(tmp_path),
    )
    again = evaluate_saved(config, DataConfig(dataset_name=str(scans / "twelve")))
    np.testing.assert_allclose(again.logits, before.logits, rtol=1e-4, atol=1e-4)
    options = PredictConfig(model_name_or_path=str(runs / "twelve"), use_cpu=True)
    records = list(predict_files(options, [str(scans / "twelve" / "test")]))
    assert [r["label"] for r in records] == [before.id2label[i] for i in before.predicted.tolist()]
    scores = np.array([r["score"] for r in records])
    np.testing.assert_allclose(scores, before.probabilities.max(axis=1), atol=1e-4)


def test_evaluate_takes_another_range(runs, scans, tmp_path):
    config = EvaluateConfig(
        model_name_or_path=str(runs / "twelve"),
        split="test",
        use_cpu=True,
        output_dir=str(tmp_path),
    )
    other = DataConfig(dataset_name=str(scans / "twelve"), value_range="0,65535")
    dark = evaluate_saved(config, other)
    before = Predictions.load(runs / "twelve", "test")
    assert np.abs(dark.logits - before.logits).max() > 0.01


def test_the_code_of_the_card_gives_the_pipeline_the_same_scores(runs, scans, monkeypatch):
    from transformers import pipeline

    path = next((scans / "twelve" / "test").rglob("*.tiff"))
    card = (runs / "twelve" / "README.md").read_text()
    (code,) = (
        block for block in card.split("```") if "scaled" in block and "import numpy" in block
    )
    classify = pipeline("image-classification", model=str(runs / "twelve"), device="cpu")
    found = []
    names = {"classify": lambda image: found.append(classify(image))}
    exec(code.removeprefix("python").replace("scan.tiff", str(path)), names)
    options = PredictConfig(model_name_or_path=str(runs / "twelve"), use_cpu=True)
    (record,) = predict_files(options, [str(path)])
    assert found[0][0]["label"] == record["label"]
    assert found[0][0]["score"] == pytest.approx(record["score"], abs=1e-4)
    # Without that code, the scan is white.
    assert classify(str(path))[0]["score"] != pytest.approx(record["score"], abs=1e-4)


def test_the_pictures_of_the_report_are_scaled(runs, scans):
    report = build_report(runs / "twelve", ReportConfig())
    assert report.facts["pictures"]
    brightest = max(int(picture.max()) for picture in report.pictures.values())
    assert brightest > 200  # 16 of 255 by the whole range of 16 bits


def test_training_on_other_images_replaces_the_range(runs, scans, stripes, tmp_path):
    tiny_run(tmp_path, stripes, runs / "twelve", "--max_steps", "1")
    assert saved_value_range(str(tmp_path)) is None
    assert read(tmp_path, "config.json").get("value_range") is None
    assert saved_value_range(str(runs / "twelve")) is not None


def test_the_range_does_not_depend_on_the_selection_of_rows(scans):
    def found(**options):
        return DataSource(DataConfig(dataset_name=str(scans / "twelve"), **options)).value_range

    assert found() == found(max_train_samples=10) == found(split_seed=5, train_val_split=0.4)
    assert found(value_range="0,4095") == ValueRange(0, 4095)
    assert found(value_range="full") is None


def test_a_resumed_run_keeps_its_range(scans, tiny_vit, tmp_path):
    tiny_run(tmp_path, scans / "twelve", tiny_vit, "--value_range", "0,4095", "--max_steps", "1")
    assert saved_value_range(str(tmp_path)) == ValueRange(0, 4095)
    with pytest.raises(UserError, match=r"--value_range is 0,1000, but the run .* with 0,4095"):
        check_folder(
            tiny_config(
                tmp_path, scans / "twelve", tiny_vit, "--value_range", "0,1000", "--max_steps", "1",
                "--resume_from_checkpoint", "last",
            )
        )  # fmt: skip


def test_a_damaged_range_is_a_one_line_error(runs, scans, tmp_path):
    folder = shutil.copytree(runs / "twelve", tmp_path / "run")
    config = read(folder, "config.json") | {"value_range": [3, 1]}
    (folder / "config.json").write_text(json.dumps(config))
    options = PredictConfig(model_name_or_path=str(folder), use_cpu=True)
    with pytest.raises(UserError, match=r"has the value_range \[3, 1\]; fix it"):
        list(predict_files(options, [str(scans)]))

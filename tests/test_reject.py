"""--reject: fitted on validation, stored beside the model, used by predict, the server and exported files."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.dataset
import pytest
import torch
from datasets import ClassLabel
from hub_server import Hub, hub_environment
from PIL import Image
from safetensors.torch import load_file, save_file
from serving import Server
from tiny import tiny_config, tiny_run
from transformers import AutoModelForImageClassification, pipeline

from hf_cifar import (
    DataConfig,
    EvaluateConfig,
    PredictConfig,
    UserError,
    evaluate_saved,
    predict_files,
)
from hf_cifar.cli import main
from hf_cifar.config.deployment import ExportConfig
from hf_cifar.evaluation.predictions import Predictions
from hf_cifar.hub.handler import EndpointHandler
from hf_cifar.hub.push import files_to_push
from hf_cifar.models.distance import Distance
from hf_cifar.models.rejection import Rejection, answer_for
from hf_cifar.report.page import write_report
from hf_cifar.runs.folder import RunFolder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, stripes, tiny_vit):
    """The same run of the tiny ViT without and with --reject; keep 0.9 of its 8 validation images."""
    root = tmp_path_factory.mktemp("runs")
    flags = ("--do_predict", "--train_val_split", "0.3", "--num_train_epochs", "4")
    tiny_run(root / "plain", stripes, tiny_vit, *flags)
    tiny_run(root / "reject", stripes, tiny_vit, *flags, "--reject", "0.9")
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, stripes):
    """A folder with images of the test, and with noise, which is of neither class."""
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("across", "down"):
        for i in range(4):
            shutil.copy(stripes / "test" / name / f"{i:03}.png", folder / f"{name}{i}.png")
    generator = np.random.default_rng(1)
    for i in range(4):
        pixels = generator.integers(0, 256, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"noise{i}.png")
    return folder


def answers(model, pictures, **options):
    """Records of predict by file name."""
    found = predict_files(PredictConfig(str(model), use_cpu=True, **options), [str(pictures)])
    return {record.pop("path").rpartition("/")[2]: record for record in found}


FETCH = """
import sys
from hf_cifar.models.distance import load_distance
from hf_cifar.models.files import model_folder
print(len(load_distance(model_folder("me/model", None, False)).center))
"""


def test_few_validation_images_are_warned_about(runs, tmp_path, caplog):
    copy = shutil.copytree(runs / "plain", tmp_path / "plain")
    argv = ["evaluate", "--model_name_or_path", str(copy), "--reject", "0.9", "--use_cpu"]
    assert main(argv) == 0
    assert "the thresholds are set by 2.4 of 24 validation images" in caplog.text


def test_a_model_from_the_hub_comes_with_its_distance(runs, tmp_path):
    with Hub() as hub:
        hub.fill("models", "me/model", runs / "reject")
        environment = hub_environment(tmp_path, hub.endpoint)
        environment["PYTHONPATH"] = str(Path(__file__).parents[1])
        done = subprocess.run(
            [sys.executable, "-c", FETCH], env=environment, capture_output=True, text=True
        )
    assert done.stdout.strip() == "32", done.stderr


@pytest.fixture(scope="module")
def answered(runs, pictures):
    return answers(runs / "reject", pictures)


def without_scores(records):
    return {
        name: (record["label"], [each["label"] for each in record["top_k"]])
        for name, record in records.items()
    }


def test_the_plain_model_is_the_same_to_the_bit(runs):
    weights = [(runs / name / "model.safetensors").read_bytes() for name in ("plain", "reject")]
    assert weights[0] == weights[1]
    settings = [json.loads((runs / n / "config.json").read_text()) for n in ("plain", "reject")]
    assert set(settings[1]) - set(settings[0]) == {"reject"}
    pixel_values = torch.rand(3, 3, 16, 16)
    logits = [
        AutoModelForImageClassification.from_pretrained(runs / name)(pixel_values).logits
        for name in ("plain", "reject")
    ]
    assert torch.equal(*logits)
    picture = Image.new("RGB", (16, 16))
    found = [pipeline("image-classification", str(runs / n))(picture) for n in ("plain", "reject")]
    assert found[0] == found[1]


def test_the_share_of_validation_is_kept_and_metrics_are_those_of_the_thresholds(runs):
    settings = RunFolder(runs / "reject").model_config()["reject"]
    for split in ("validation", "test"):
        found = Predictions.load(runs / "reject", split)
        assert found.rejection.to_dict() == settings
        kept = (found.confidences >= settings["min_confidence"]) & (
            found.distances <= settings["max_distance"]
        )
        metrics = RunFolder(runs / "reject").metrics()[split]
        assert metrics["kept"] == kept.mean()
        assert metrics["accuracy_kept"] == pytest.approx(found.correct[kept].mean())
        low, high = metrics["intervals"]["kept"]
        assert low <= metrics["kept"] <= high
        assert found.metrics == metrics  # recomputed from the file
    assert RunFolder(runs / "reject").metrics()["validation"]["kept"] >= 0.9
    assert "kept" not in RunFolder(runs / "plain").metrics()["validation"]


def test_predict_answers_unknown_for_noise_and_keeps_top_k(answered, runs, pictures):
    plain = answers(runs / "plain", pictures)
    labels = {name: record["label"] for name, record in answered.items()}
    unknown = [name for name, label in labels.items() if label == "unknown"]
    assert sum(name.startswith("noise") for name in unknown) > len(unknown) / 2
    for name, record in answered.items():
        assert record["top_k"] == plain[name]["top_k"]
        expected = {"score": None} if record["label"] == "unknown" else plain[name]
        assert record == {**record, **expected}


def test_predictions_agree_with_the_thresholds_image_by_image(runs, stripes):
    found = answers(runs / "reject", stripes / "test" / "down")
    measured = Predictions.load(runs / "reject", "test")
    kept = measured.kept[measured.labels == 1]
    assert [found[name]["label"] != "unknown" for name in sorted(found)] == kept.tolist()


def test_a_data_set_is_classified_into_parquet(runs, pictures, answered, tmp_path):
    argv = ["predict", "--model_name_or_path", str(runs / "reject"), "--use_cpu"]
    assert main([*argv, "--dataset_name", str(pictures), "--output", str(tmp_path / "out")]) == 0
    rows = pyarrow.dataset.dataset(tmp_path / "out", format="parquet", exclude_invalid_files=True)
    found = {row.pop("path"): row for row in rows.to_table().to_pylist()}
    for path, row in found.items():
        record = answered[path.rpartition("/")[2]]
        assert (row["label"], row["error"]) == (record["label"], None)
        assert (row["score"] is None) == (record["score"] is None)


def test_the_server_answers_the_same(runs, pictures, answered, tmp_path):
    server = Server(tmp_path, runs / "reject").wait()
    try:
        about = server.get("/model")
        assert about["reject"] == RunFolder(runs / "reject").model_config()["reject"]
        for name in ("noise0.png", "down0.png"):
            status, _, body = server.call("/predict", (pictures / name).read_bytes())
            result = json.loads(body)["results"][0]
            assert status == 200 and (result["label"], result["score"] is None) == (
                answered[name]["label"], answered[name]["score"] is None,
            )  # fmt: skip
            assert [each["label"] for each in result["top_k"]] == [
                each["label"] for each in answered[name]["top_k"]
            ]
        assert "2 classes, or unknown." in server.call("/")[2].decode()
    finally:
        server.process.terminate()
        server.process.wait()


def test_an_endpoint_answers_the_same(runs, pictures, answered):
    handler = EndpointHandler(str(runs / "reject"))
    found = {name: handler({"inputs": (pictures / name).read_bytes()}) for name in answered}
    assert without_scores(found) == without_scores(answered)
    assert found["noise0.png"]["score"] is None
    assert "reject.safetensors" in files_to_push(runs / "reject")


def test_an_exported_file_answers_the_same(runs, pictures, answered, tmp_path):
    from hf_cifar.deploy.export import export_run
    from hf_cifar.deploy.model_repository import server_config

    file = tmp_path / "model.onnx"
    export_run(runs / "reject", ExportConfig(output=str(file), parity_images=8))
    assert without_scores(answers(file, pictures)) == without_scores(answered)
    assert '"distances"' in server_config("model", 2, (16, 16), rejects=True)
    assert '"distances"' not in server_config("model", 2, (16, 16))
    found = evaluate_saved(
        EvaluateConfig(str(file), split="test", use_cpu=True, output_dir=str(tmp_path / "out")),
        RunFolder(runs / "reject").data(),
    )
    expected = Predictions.load(runs / "reject", "test")
    np.testing.assert_allclose(found.distances, expected.distances, rtol=1e-3)
    assert found.metrics["kept"] == expected.metrics["kept"]


def test_an_existing_run_gets_the_same_thresholds_without_training(runs, tmp_path, caplog):
    caplog.set_level("INFO")
    shutil.copytree(runs / "plain", tmp_path / "run")
    argv = ["evaluate", "--model_name_or_path", str(tmp_path / "run"), "--use_cpu"]
    assert main([*argv, "--reject", "0.9"]) == 0
    assert "the test metrics do not include these thresholds yet" in caplog.text
    new, old = (
        RunFolder(folder).model_config()["reject"] for folder in (tmp_path / "run", runs / "reject")
    )
    for name in ("min_confidence", "max_distance"):
        assert new.pop(name) == pytest.approx(old.pop(name), rel=1e-3)
    assert new == old
    assert (tmp_path / "run/model.safetensors").read_bytes() == (
        runs / "plain/model.safetensors"
    ).read_bytes()
    assert main([*argv, "--split", "test"]) == 0
    expected = RunFolder(runs / "reject").metrics()["test"]
    assert RunFolder(tmp_path / "run").metrics()["test"]["kept"] == expected["kept"]
    card = (tmp_path / "run/README.md").read_text()
    assert "## Images of none of the classes" in card and "answer `unknown`" in card
    page = write_report(tmp_path / "run").read_text()
    assert "Images of none of the classes" in page and "both thresholds" in page


def test_the_same_run_again_and_a_resumed_one_have_the_same_bits(runs, stripes, tiny_vit, tmp_path):
    flags = ("--do_predict", "--train_val_split", "0.3", "--reject", "0.9")
    tiny_run(tmp_path / "run", stripes, tiny_vit, *flags, "--num_train_epochs", "2")
    again = (
        "--num_train_epochs",
        "2",
        "--resume_from_checkpoint",
        str(tmp_path / "run/checkpoint-7"),
    )
    for folder, more in (("again", again[:2]), ("resumed", again)):
        tiny_run(tmp_path / folder, stripes, tiny_vit, *flags, *more)
        for name in ("config.json", "reject.safetensors"):
            assert (tmp_path / folder / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


def test_a_head_on_features_rejects_too(stripes, tiny_vit, pictures, tmp_path):
    flags = ("--freeze", "backbone", "--head_solver", "lbfgs", "--reject")
    tiny_run(tmp_path / "run", stripes, tiny_vit, *flags)
    assert RunFolder(tmp_path / "run").model_config()["reject"]["keep"] == 0.95
    labels = [record["label"] for record in answers(tmp_path / "run", pictures).values()]
    assert "unknown" in labels


def test_fine_tuning_a_model_that_rejects_starts_without_its_thresholds(runs, stripes, tmp_path):
    tiny_run(tmp_path / "run", stripes, runs / "reject", "--num_train_epochs", "1")
    assert not RunFolder(tmp_path / "run").model_config().get("reject")
    assert not (tmp_path / "run/reject.safetensors").exists()


def test_a_model_in_memory_answers_with_classes_and_says_so(runs, pictures, caplog):
    from transformers import AutoImageProcessor

    model = AutoModelForImageClassification.from_pretrained(runs / "reject")
    pair = (model, AutoImageProcessor.from_pretrained(runs / "reject"))
    found = list(predict_files(PredictConfig(pair, use_cpu=True), [str(pictures)]))
    assert all(record["label"] in ("across", "down") for record in found)
    assert (
        "every image gets a class, because a model in memory has no reject.safetensors"
        in caplog.text
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "reject.safetensors").unlink(), "it is missing; restore it"),
        (lambda run: (run / "reject.safetensors").write_bytes(b"x"), "cannot read .*reject.safetensors"),
        (
            lambda run: save_file(
                load_file(run / "reject.safetensors") | {"center": torch.zeros(3)},
                run / "reject.safetensors",
            ),
            "its shapes do not fit together",
        ),
        (lambda run: set_reject(run, max_distance=None), "damaged 'reject'"),
        (lambda run: set_reject(run, method="energy"), "which this version does not know"),
        (lambda run: set_reject(run, head="nowhere"), "has no module 'nowhere'"),
    ],
)  # fmt: skip
def test_damage_is_one_clear_error(runs, pictures, tmp_path, damage, message):
    shutil.copytree(runs / "reject", tmp_path / "run")
    damage(tmp_path / "run")
    with pytest.raises(UserError, match=message):
        answers(tmp_path / "run", pictures)


def set_reject(run, **values):
    settings = json.loads((run / "config.json").read_text())
    settings["reject"] |= values
    (run / "config.json").write_text(json.dumps(settings))


def test_what_it_does_not_support_is_refused_before_training(
    lights, stripes, tiny_vit, save_vit, runs, tmp_path
):
    for data, flags, message in (
        (lights, (), "--reject needs one label per image"),
        (stripes, ("--streaming", "--max_steps", "2"), "--streaming does not keep them"),
        (stripes, ("--reject", "1.5"), r"--reject is 1.5; it must be in 0.5..0.999"),
    ):
        with pytest.raises(UserError, match=message):
            tiny_run(tmp_path / "run", data, tiny_vit, "--reject", *flags)
        assert not (tmp_path / "run").exists()
    for flags, message in (
        (("--split", "test"), "--reject is fitted on validation"),
        (("--output_dir", str(tmp_path / "out")), "leave out --output_dir"),
    ):
        with pytest.raises(UserError, match=message):
            main_or_raise(
                ["evaluate", "--model_name_or_path", str(runs / "plain"), "--reject", *flags]
            )


def main_or_raise(argv):
    from hf_cifar.commands.evaluate import evaluate

    return evaluate(argv[1:])


def test_a_model_without_one_linear_head_is_refused(stripes, tmp_path):
    from transformers import (
        LevitConfig,
        LevitForImageClassificationWithTeacher,
        LevitImageProcessor,
    )

    config = LevitConfig(
        image_size=32, hidden_sizes=[16, 16, 16], num_attention_heads=[1, 1, 1], depths=[1, 1, 1],
        key_dim=[8, 8, 8], num_labels=2,
    )  # fmt: skip
    LevitForImageClassificationWithTeacher(config).save_pretrained(tmp_path / "levit")
    LevitImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(tmp_path / "levit")
    with pytest.raises(UserError, match="--reject needs a head that is one linear layer"):
        tiny_run(tmp_path / "run", stripes, tmp_path / "levit", "--reject")
    assert not (tmp_path / "run").exists()


def test_a_class_called_unknown_gives_another_answer(make_rows, save, tiny_vit, tmp_path, caplog):
    caplog.set_level("INFO")
    label = ClassLabel(names=["Unknown", "cat"])
    rows = make_rows([0, 1] * 20, label, image="image")
    tiny_run(tmp_path / "run", save(train=rows), tiny_vit, "--reject", "--num_train_epochs", "1")
    assert RunFolder(tmp_path / "run").model_config()["reject"]["answer"] == "none of these"
    assert "('unknown' is a class)" in caplog.text
    with pytest.raises(UserError, match="the data has classes of both names"):
        answer_for(["unknown", "none of these"])


def test_a_bare_flag_means_95_percent(stripes, tiny_vit, tmp_path):
    config = tiny_config(tmp_path, stripes, tiny_vit, "--reject", "--do_predict")
    assert config.train.reject == 0.95 and config.train.do_predict
    assert tiny_config(tmp_path, stripes, tiny_vit, "--reject", "0.9").train.reject == 0.9
    assert tiny_config(tmp_path, stripes, tiny_vit).train.reject is None
    assert EvaluateConfig("x").reject is None and DataConfig().streaming is False


def test_thresholds_keep_the_share_and_each_rejects_as_many():
    generator = np.random.default_rng(0)
    confidences, distances = generator.random(1000), generator.random(1000)
    for keep in (0.5, 0.9, 0.95, 0.999):
        fitted = Rejection.fit(confidences, distances, keep=keep, answer="unknown", head="head")
        rejected = fitted.rejects(confidences, distances)
        assert rejected.sum() in (int(1000 * (1 - keep) + 1e-9), int(1000 * (1 - keep) + 1e-9) - 1)
        alone = (confidences < fitted.min_confidence).sum(), (distances > fitted.max_distance).sum()
        assert abs(int(alone[0]) - int(alone[1])) <= 0.02 * 1000
    assert fitted.rejects(np.array([1.0, 1.0]), np.array([np.nan, 0.0])).tolist() == [True, False]


def test_the_distance_is_mahalanobis_of_features_of_length_1():
    from scipy.spatial.distance import cdist
    from sklearn.covariance import LedoitWolf

    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 300)
    features = generator.normal(size=(300, 6)) * [1, 2, 3, 1, 1, 0.5] + 2 * np.eye(6)[labels]
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    means = np.stack([unit[labels == k].mean(axis=0) for k in range(3)])
    precision = LedoitWolf(assume_centered=True).fit(unit - means[labels]).precision_
    expected = cdist(unit, means, "mahalanobis", VI=precision).min(axis=1)
    distance = Distance.fit(features.astype(np.float32), labels)
    found = distance(torch.from_numpy(7 * features)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert found.dtype == np.float32

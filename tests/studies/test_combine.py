"""hf_cifar.studies.combine: ensembles, soups and views of finished runs."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_run

from hf_cifar import UserError
from hf_cifar.cli import main
from hf_cifar.config.studies import CombineConfig
from hf_cifar.evaluation.predictions import Predictions
from hf_cifar.models.build import load_classifier
from hf_cifar.runs.listing import list_runs
from hf_cifar.studies.combine import combine_runs, load_member, soup

CNN = "scratch/article_cnn"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, stripes):
    folder = tmp_path_factory.mktemp("runs")
    for seed in ("1", "2", "3"):
        tiny_run(folder / seed, stripes, CNN, "--seed", seed, "--do_predict")
    return [folder / seed for seed in ("1", "2", "3")]


@pytest.fixture(scope="module")
def ensemble(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ensemble") / "together"
    assert main(["combine", *map(str, runs), "--output_dir", str(folder), "--do_predict"]) == 0
    return folder


def combined(folders, output, **options):
    return combine_runs(folders, CombineConfig(output_dir=str(output), use_cpu=True, **options))


def facts(folder):
    return json.loads((folder / "run.json").read_text())


def probabilities(folder, split):
    return Predictions.load(folder, split).probabilities


def test_an_ensemble_averages_the_probabilities_of_its_runs(runs, ensemble):
    mean = np.mean([probabilities(run, "test") for run in runs], axis=0)
    tempered = mean ** (1 / facts(ensemble)["temperature"])
    expected = tempered / tempered.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities(ensemble, "test"), expected, atol=1e-5)
    assert facts(ensemble)["combined"]["runs"] == ["1", "2", "3"]


def test_an_ensemble_is_a_run_folder(ensemble, runs, tmp_path, capsys, stripes):
    image = next((stripes / "test").rglob("*.png"))
    folder = str(ensemble)
    assert main(["evaluate", "--model_name_or_path", folder, "--split", "test", "--use_cpu"]) == 0
    assert main(["report", folder]) == 0
    assert "Grad-CAM" not in (ensemble / "report.html").read_text()
    card = (ensemble / "README.md").read_text()
    assert "Mean of the probabilities of 3 runs (1, 2 and 3)." in card
    capsys.readouterr()
    assert main(["predict", "--model_name_or_path", folder, "--use_cpu", str(image)]) == 0
    own = json.loads(capsys.readouterr().out)
    file = str(tmp_path / "model.onnx")
    assert main(["export", folder, "--format", "onnx", "--output", file]) == 0
    capsys.readouterr()
    assert main(["predict", "--model_name_or_path", file, str(image)]) == 0
    exported = json.loads(capsys.readouterr().out)
    assert exported["label"] == own["label"]
    assert exported["score"] == pytest.approx(own["score"], abs=1e-4)
    (row,) = list_runs([ensemble])
    assert row["model"] == "ensemble of 3 runs" and row["test"]["accuracy"] is not None
    assert main(["reproduce", folder]) == 2
    assert "combines runs" in capsys.readouterr().err


def test_a_soup_of_one_start_averages_weights(runs, tmp_path):
    """Two copies of a run, one with other weights, are a network between them."""
    other = tmp_path / "other"
    shutil.copytree(runs[0], other)
    members = [load_member(runs[0]), load_member(other)]
    temperature = facts(runs[0])["temperature"]
    with torch.no_grad():
        for parameter in members[1].classifier.model.parameters():
            parameter.add_(0.25)
    averaged = soup(members, lambda: iter(())).state_dict()
    for name, weight in load_file(runs[0] / "model.safetensors").items():
        factor = temperature if name.startswith("head") else 1
        torch.testing.assert_close(averaged[name], (weight + 0.125) * factor)


def test_a_greedy_soup_is_not_worse_than_its_best_run(runs, tmp_path):
    result = combined(runs, tmp_path / "soup", method="greedy_soup")
    accuracy = {name: each["validation"]["accuracy"] for name, each in result["members"].items()}
    assert result["metrics"]["validation"]["accuracy"] >= max(accuracy.values())
    parts = result["combined"]["runs"] + result["combined"]["left_out"]
    assert sorted(parts) == ["1", "2", "3"]
    assert accuracy[result["combined"]["runs"][0]] == max(accuracy.values())
    assert load_classifier(str(tmp_path / "soup")).model.config.model_type == "article_cnn"


def test_batch_norm_statistics_of_a_soup_are_those_of_training_images(tmp_path, stripes):
    for seed in ("1", "2"):
        tiny_run(tmp_path / seed, stripes, "scratch/resnet10t", "--seed", seed, "--image_size", "32",
                 "--freeze_batch_norm", "false")  # fmt: skip
    folders = [tmp_path / "1", tmp_path / "2"]
    combined(folders, tmp_path / "soup", method="uniform_soup")
    saved = [load_file(folder / "model.safetensors") for folder in (*folders, tmp_path / "soup")]
    names = [name for name in saved[0] if name.endswith("running_mean")]
    assert names
    assert any(
        not torch.allclose(saved[2][name], (saved[0][name] + saved[1][name]) / 2) for name in names
    )
    weight = "conv1.0.weight"
    torch.testing.assert_close(saved[2][weight], (saved[0][weight] + saved[1][weight]) / 2)


@pytest.mark.parametrize("method", ["ensemble", "uniform_soup"])
def test_thresholds_of_rejection_are_left_out_and_named(runs, tmp_path, stripes, method, caplog):
    tiny_run(tmp_path / "rejects", stripes, CNN, "--seed", "4", "--reject")
    combined([tmp_path / "rejects", runs[0]], tmp_path / "both", method=method)
    assert "the --reject thresholds of rejects are left out" in caplog.text
    assert not load_classifier(str(tmp_path / "both")).model.config.to_dict().get("reject")


def test_views_are_chosen_on_validation(runs, tmp_path):
    result = combined(runs[:1], tmp_path / "views", views="auto")
    assert result["combined"]["views"][0] == "image" and result["combined"]["views_chosen"]
    loss = result["metrics"]["validation"]["cross_entropy"]
    assert loss <= result["members"]["1"]["validation"]["cross_entropy"] + 1e-6
    assert "the views" in (tmp_path / "views" / "README.md").read_text()


def test_runs_with_other_validation_images_are_evaluated_on_test_only(tmp_path, stripes, capsys):
    folders = [tmp_path / "1", tmp_path / "2"]
    for fold in (1, 2):
        flags = ("--num_folds", "2", "--fold", str(fold), "--do_predict")
        tiny_run(tmp_path / str(fold), stripes, CNN, *flags)
    result = combined(folders, tmp_path / "both", do_predict=True)
    assert list(result["metrics"]) == ["test"]
    for argv in (["evaluate", "--model_name_or_path"], ["compress", "--output_dir", "x"]):
        assert main([*argv, str(tmp_path / "both")]) == 2
        assert "trained on each other's validation images" in capsys.readouterr().err
    with pytest.raises(UserError, match="--method greedy_soup chooses on validation"):
        combined(folders, tmp_path / "soup", method="greedy_soup")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "takes the folders of finished runs"),
        (["RUN"], "alone cannot be combined; pass more runs, or --views flip"),
        (["RUN", "RUN"], "a run is given twice"),
        (["RUN", "VIT"], "takes images of"),
        (["RUN", "missing"], "holds no finished run"),
        (["RUN", "OTHER", "--output_dir", "RUN"], "holds other files"),
        (["RUN", "OTHER", "--method", "soup"], "--method does not take 'soup'"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    runs, finished_vit, tmp_path, options, message, capsys
):
    names = {"RUN": runs[0], "OTHER": runs[1], "VIT": finished_vit}
    argv = [str(names.get(word, word)) for word in options]
    assert main(["combine", "--output_dir", str(tmp_path / "out"), *argv]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

"""hf_cifar.models.exported: an ONNX file in place of a run, and which files are not read."""

import json
import os
import shutil
import threading

import numpy as np
import onnx
import pytest
import torch
from onnx.external_data_helper import set_external_data
from tiny import tiny_run

from hf_cifar import (
    DataConfig,
    EvaluateConfig,
    PredictConfig,
    evaluate_saved,
    load_classifier,
    predict_files,
)
from hf_cifar.cli import main
from hf_cifar.config.deployment import ExportConfig
from hf_cifar.deploy.export import export_run
from hf_cifar.errors import UserError
from hf_cifar.evaluation.predictions import Predictions
from hf_cifar.models.exported import METADATA
from hf_cifar.models.value_range import saved_value_range


@pytest.fixture(scope="module")
def run(stripes, tiny_vit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "vit"
    tiny_run(folder, stripes, tiny_vit, "--probe_images", "0", "--do_predict")
    return folder


@pytest.fixture(scope="module")
def file(run, tmp_path_factory):
    output = tmp_path_factory.mktemp("onnx") / "vit.onnx"
    export_run(run, ExportConfig(output=str(output), parity_images=0))
    return output


@pytest.fixture
def copied(file, tmp_path):
    """A copy of the file, to be changed: (path, its model)."""
    path = tmp_path / "copy" / "vit.onnx"
    path.parent.mkdir()
    shutil.copy(file, path)
    return path, onnx.load(path)


def test_evaluate_has_the_metrics_of_the_run(file, run, stripes, tmp_path, caplog):
    before = Predictions.load(run, "test")
    config = EvaluateConfig(
        model_name_or_path=str(file), split="test", output_dir=str(tmp_path / "metrics")
    )
    found = evaluate_saved(config, DataConfig(dataset_name=str(stripes)))
    np.testing.assert_allclose(found.logits, before.logits, atol=1e-4)
    assert found.metrics["accuracy"] == before.metrics["accuracy"]
    assert Predictions.load(tmp_path / "metrics", "test").metrics == found.metrics


def test_evaluate_writes_nothing_beside_the_file(file, stripes, capsys):
    before = sorted(file.parent.iterdir())
    arguments = ["--model_name_or_path", str(file), "--dataset_name", str(stripes)]
    assert main(["evaluate", *arguments, "--split", "test"]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert sorted(file.parent.iterdir()) == before


def test_predict_gives_the_records_of_the_run(file, run, stripes, num_threads):
    def records(model):
        config = PredictConfig(model_name_or_path=str(model), batch_size=3, use_cpu=True)
        return list(predict_files(config, [str(stripes / "test")]))

    ours, theirs = records(file), records(run)
    assert [each["label"] for each in ours] == [each["label"] for each in theirs]
    scores = [[each["score"] for each in found] for found in (ours, theirs)]
    np.testing.assert_allclose(*scores, atol=1e-4)
    assert torch.get_num_threads() == num_threads


def test_a_session_has_the_threads_of_its_caller(file):
    model, _ = load_classifier(str(file))
    sessions = {}

    def compute(num_threads):
        torch.set_num_threads(num_threads)
        model(pixel_values=torch.zeros(1, 3, 16, 16))
        sessions[num_threads] = model._session.get_session_options().intra_op_num_threads

    before = torch.get_num_threads()
    for num_threads in (1, 3):
        thread = threading.Thread(target=compute, args=(num_threads,))
        thread.start()
        thread.join()
    torch.set_num_threads(before)
    assert sessions == {1: 1, 3: 3}


def test_the_range_of_values_is_that_of_the_run(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"value_range": [10, 4000]}))
    output = str(tmp_path / "deep.onnx")
    export_run(folder, ExportConfig(output=output, parity_images=0))
    assert str(saved_value_range(output)) == "10,4000"


def refused(path, message):
    with pytest.raises(UserError, match=message) as caught:
        load_classifier(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["../secret", "/etc/passwd", "weights.bin"])
def test_weights_in_other_files_are_refused(copied, place):
    path, model = copied
    tensor = max(model.graph.initializer, key=lambda each: len(each.raw_data))
    (path.parent / "weights.bin").write_bytes(tensor.raw_data)
    set_external_data(tensor, place)
    tensor.ClearField("raw_data")
    path.write_bytes(model.SerializeToString())
    refused(path, f"has weights in another file, {place}, which is not read")


def test_weights_in_other_files_are_found_at_any_depth(copied):
    path, model = copied
    branch = onnx.helper.make_graph([], "branch", [], [])
    tensor = branch.initializer.add(name="hidden", data_type=1, dims=[1], raw_data=bytes(4))
    set_external_data(tensor, "secret")
    node = onnx.helper.make_node("If", ["condition"], ["out"], then_branch=branch)
    model.functions.add(name="f", domain="d").node.append(node)
    path.write_bytes(model.SerializeToString())
    refused(path, "has weights in another file, secret")


def test_a_symbolic_link_is_refused(file, tmp_path):
    link = tmp_path / "link.onnx"
    os.symlink(file, link)
    refused(link, r"link.onnx is a symbolic link; pass the file itself, .*vit\.onnx")


def test_the_file_of_another_program_is_refused(copied):
    path, model = copied
    del model.metadata_props[:]
    path.write_bytes(model.SerializeToString())
    refused(
        path, "has no labels and preprocessing in its metadata; pass a file that hf-cifar export"
    )


def test_damaged_files_are_refused(copied):
    path, model = copied
    content = path.read_bytes()
    for part in (b"", b"no model", content[:200], content[:-1000]):
        path.write_bytes(part)
        refused(path, r"is not an ONNX file|has no labels|cannot load model")
    (notes,) = model.metadata_props
    saved = json.loads(notes.value)
    for damage in ({"labels": ["one"]}, {"labels": [1, 2]}, {"preprocessor": {}}, {"input": None}):
        notes.value = json.dumps(saved | damage)
        path.write_bytes(model.SerializeToString())
        refused(path, "cannot load model|export it|its graph")
    notes.value = "{"
    path.write_bytes(model.SerializeToString())
    refused(path, "cannot load model")
    assert notes.key == METADATA


def test_a_file_that_takes_images_is_refused(run, tmp_path):
    output = tmp_path / "uint8.onnx"
    export_run(run, ExportConfig(output=str(output), with_preprocessing=True, parity_images=0))
    refused(output, "its graph; run it with ONNX Runtime, .* without --with_preprocessing")


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_a_precision_is_refused(command, file, capsys):
    assert main([command, "--model_name_or_path", str(file), "--bf16"]) == 2
    assert "--bf16 has no effect on" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_a_missing_file_is_named(command, capsys):
    assert main([command, "--model_name_or_path", "none.onnx"]) == 2
    assert "no file none.onnx; pass the --output of hf-cifar export" in capsys.readouterr().err


def test_an_exported_file_is_not_trained(file, stripes, tmp_path, capsys):
    arguments = ["--model_name_or_path", str(file), "--dataset_name", str(stripes)]
    assert main(["finetune", *arguments, "--output_dir", str(tmp_path / "run")]) == 2
    assert "for predict and evaluate only; pass the folder of its run" in capsys.readouterr().err

"""hf_cifar.deploy.schemes and quantize: an 8-bit model is written if it is as good, and named with its
scheme."""

import json

import numpy as np
import pytest
import torch
from tiny import tiny_run

from hf_cifar.config.deployment import ExportConfig, QuantizeConfig
from hf_cifar.data.splits import DataSource
from hf_cifar.deploy import schemes as module
from hf_cifar.deploy.biases import biases_of, channel_means
from hf_cifar.deploy.export import export_run
from hf_cifar.deploy.inputs import inputs_of
from hf_cifar.deploy.latency import latencies, processor
from hf_cifar.deploy.quantize import quantize_run, verdict
from hf_cifar.deploy.schemes import Quantised, Scheme
from hf_cifar.errors import UserError
from hf_cifar.models.build import load_classifier
from hf_cifar.models.exported import read_onnx
from hf_cifar.preprocessor import Preprocessor
from hf_cifar.runs.folder import RunFolder

pytest.importorskip("onnxruntime")
SMALL = {"calibration_images": 20, "judging_images": 8}


@pytest.fixture(scope="module")
def run(tmp_path_factory, stripes):
    folder = tmp_path_factory.mktemp("quantize") / "run"
    tiny_run(
        folder, stripes, "scratch/article_cnn", "--image_size", "32", "--learning_rate", "2e-3"
    )
    return folder


@pytest.fixture
def timed(monkeypatch):
    """Give each network a time: 10 ms in float, and less the later its scheme is tried."""

    def times(networks, images):
        return {
            name: {"1": {"median": 10.0 - number, "low": 9.5 - number}}
            for number, name in enumerate(networks)
        }

    monkeypatch.setattr(module, "latencies", times)


def test_the_fastest_scheme_that_keeps_the_answers_is_written(run, tmp_path, timed):
    file = tmp_path / "int8.onnx"
    report = quantize_run(run, QuantizeConfig(str(file), **SMALL))
    assert (
        report["chosen"] == "unsigned weights, Percentile ranges" == report["tried"][-1]["scheme"]
    )
    assert json.loads((tmp_path / "int8.onnx.quantization.json").read_text()) == report
    content, notes = read_onnx(str(file))
    assert notes["quantization"] == report["chosen"]
    assert notes["labels"] == ["across", "down"]
    assert len(content) < 0.5 * report["float"]["bytes"]
    model, _ = load_classifier(str(file))
    whole, _ = load_classifier(str(run))
    split = DataSource(RunFolder(run).data()).splits.validation
    images = inputs_of(split, 8, Preprocessor.of(*load_classifier(str(run)))).pixel_values
    with torch.no_grad():
        found, expected = (
            each(pixel_values=torch.from_numpy(images)).logits for each in (model, whole)
        )
    assert 0 < (found - expected).abs().max() < 0.3 * expected.abs().max()
    with pytest.raises(UserError, match=r"exists; pass another --output"):
        quantize_run(run, QuantizeConfig(str(file), **SMALL))


def test_a_slower_model_is_not_written(run, tmp_path, monkeypatch, caplog):
    def times(networks, images):
        return {
            name: {"1": {"median": 1.0 + number, "low": 1.0 + number}}
            for number, name in enumerate(networks)
        }

    monkeypatch.setattr(module, "latencies", times)
    report = quantize_run(run, QuantizeConfig(str(tmp_path / "int8.onnx"), **SMALL))
    assert report["chosen"] is None
    assert [each.name for each in tmp_path.iterdir()] == ["int8.onnx.quantization.json"]
    assert (
        "not written, because no scheme is both as accurate as the float model and faster here"
        in caplog.text
    )


def test_sensitive_layers_stay_in_float_until_the_answers_are_kept(
    run, tmp_path, timed, monkeypatch
):
    """If no scheme is good enough, more and more layers stay in float."""
    monkeypatch.setattr(
        module, "_keeps_answers", lambda model, correct: len(model.scheme.in_float) >= 2
    )
    report = quantize_run(run, QuantizeConfig(str(tmp_path / "int8.onnx"), **SMALL))
    kept = [len(each["in_float"]) for each in report["tried"]]
    assert kept == [0, 0, 0, 0, 0, 1, 2]
    assert report["tried"][4]["scheme"].endswith("ranges, corrected biases")
    assert report["tried"][5]["in_float"] == report["tried"][6]["in_float"][:1]
    assert report["chosen"].endswith("2 layers in float")
    assert report["tried"][6]["bytes"] > report["tried"][0]["bytes"]


def test_corrected_biases_give_each_channel_the_mean_of_the_float_model(run, tmp_path):
    onnx = pytest.importorskip("onnx")
    export_run(run, ExportConfig(output=str(tmp_path / "float.onnx"), parity_images=0))
    split = DataSource(RunFolder(run).data()).splits.train
    images = inputs_of(split, 20, Preprocessor.of(*load_classifier(str(run)))).pixel_values
    with module._prepared((tmp_path / "float.onnx").read_bytes()) as (prepared, folder):
        plain, corrected = (
            module.quantised(prepared, Scheme("QInt8", "MinMax", corrected), images, folder)
            for corrected in (False, True)
        )
        biases = biases_of(onnx.load_model_from_string(plain))
        wanted, before, after = (
            channel_means(onnx.load_model_from_string(each), list(biases), images, 1)
            for each in (prepared.read_bytes(), plain, corrected)
        )
    assert len(biases) >= 4
    for name, bias in biases.items():
        errors = [np.abs(each[name] - wanted[name]).max() for each in (before, after)]
        assert errors[1] <= max(errors[0], 2 * bias.step.max())
    shifts = [
        sum(np.abs(each[name] - wanted[name]).sum() for name in biases) for each in (before, after)
    ]
    assert shifts[1] < 0.2 * shifts[0]


def test_a_model_is_worse_if_mcnemar_says_so():
    correct = np.ones(100, bool)
    for wrong, expected in ((0, 1.0), (5, 0.0625), (6, 0.03125)):
        found = correct.copy()
        found[:wrong] = False
        model = Quantised(Scheme("QInt8", "MinMax"), b"", found, 1.0)
        assert model.p_value(correct) == pytest.approx(expected)
        assert module._keeps_answers(model, correct) is (expected > 0.05)


def test_the_verdict_names_what_changed():
    milliseconds = {"1": {"median": 4.0}, "32": {"median": 90.0}}
    report = {
        "processor": "CPU (avx2)", "num_images": 1000, "chosen": "signed",
        "float": {"accuracy": 0.9, "bytes": 400, "milliseconds": milliseconds},
        "tried": [{
            "scheme": "signed", "accuracy": 0.89, "bytes": 100, "p_value": 0.5,
            "milliseconds": {"1": {"median": 2.0}, "32": {"median": 30.0}},
        }],
    }  # fmt: skip
    assert verdict(report) == (
        "signed: accuracy 0.8900 instead of 0.9000 on 1,000 validation images (McNemar's p = 0.5), 4.0 times "
        "smaller, 2.0 and 3.0 times as fast in batches of 1 and 32 on CPU (avx2)",
        True,
    )


def test_networks_take_turns():
    calls = []
    networks = {name: lambda images, n=name: calls.append((n, len(images))) for name in "ab"}
    found = latencies(networks, np.zeros((3, 3, 8, 8), np.float32), rounds=2)
    assert found.keys() == {"a", "b"} and found["a"].keys() == {"1", "32"}
    times = found["b"]["32"]
    assert 0 <= times["low"] <= times["median"] <= times["high"]
    order = [
        name for (name, size), (before, _) in zip(calls[1:], calls, strict=False) if name != before
    ]
    assert order[:4] == ["b", "a", "b", "a"] and {size for _, size in calls} == {1, 32}
    assert processor()

"""hf_cifar.deploy.compress: versions of a run, compared on validation, with a verdict."""

import dataclasses
import html
import json
import re
import shutil
import sys

import numpy as np
import pytest
from tiny import tiny_run

from hf_cifar.config.command_line import parse
from hf_cifar.config.deployment import CompressConfig
from hf_cifar.deploy import compress as module
from hf_cifar.deploy.compress import (
    ORIGINAL,
    compress_run,
    pareto_front,
    render_comparison,
    verdict,
)
from hf_cifar.errors import UserError
from hf_cifar.evaluation.predictions import Predictions
from hf_cifar.report.page import look_up, render_value
from hf_cifar.runs.folder import RunFolder

pytest.importorskip("onnxruntime")
pytest.importorskip("torch_pruning")


def version(name, accuracy, milliseconds, p=1.0):
    spread = {"median": milliseconds, "low": 0.9 * milliseconds, "high": 2 * milliseconds}
    times = {size: spread for size in ("1", "32")}
    found = {"accuracy": accuracy, "mcnemar_p": p, "difference": accuracy - 0.9}
    return {
        "name": name, "made": "so", "bytes": 1000 * milliseconds, "milliseconds": times,
        "validation": found,
    }  # fmt: skip


def test_a_run_is_compared_with_its_versions_and_other_runs(tmp_path, stripes, tiny_vit):
    tiny_run(tmp_path / "run", stripes, tiny_vit, "--do_predict")
    flags = ["--image_size", "32", "--learning_rate", "2e-3"]
    tiny_run(tmp_path / "student", stripes, "scratch/article_cnn", *flags)
    folder = tmp_path / "small"
    config = CompressConfig(
        str(folder), candidates=[str(tmp_path / "student")], target_sizes=[0.8, 0.01],
        num_train_epochs=1,
    )  # fmt: skip
    facts = compress_run(tmp_path / "run", config)
    assert json.loads((folder / "compress.json").read_text()) == facts
    names = [each["name"] for each in facts["versions"]]
    assert names[0] == ORIGINAL and {"pruned to 0.8", "float16", "run student"} < set(names)
    assert set(names) | set(facts["left_out"]) == {
        ORIGINAL, "pruned to 0.8", "pruned to 0.01", "int8", "pruned to 0.8, int8", "float16", "run student",
    }  # fmt: skip
    assert "pruning leaves at least" in facts["left_out"]["pruned to 0.01"]
    by_name = {each["name"]: each for each in facts["versions"]}
    original, half = by_name[ORIGINAL], by_name["float16"]
    saved = Predictions.load(tmp_path / "run", "test").metrics
    assert original["test"]["accuracy"] == saved["accuracy"]
    assert original["test"]["ece"] == pytest.approx(saved["ece"], abs=1e-4)
    assert half["bytes"] < original["bytes"] and half["parameters"] == original["parameters"]
    assert half["validation"]["accuracy"] == original["validation"]["accuracy"]
    assert by_name["pruned to 0.8"]["parameters"] <= 0.8 * original["parameters"]
    for each in facts["versions"]:
        assert (folder / each["file"]).is_file() and 20 < each["peak_megabytes"] < 2000
        assert 0 < each["milliseconds"]["1"]["low"] <= each["milliseconds"]["1"]["median"]
    assert RunFolder(folder / "pruned-0.8").load_config().train.output_dir == str(
        folder / "pruned-0.8"
    )
    page = (folder / "compress.html").read_text()
    for place, text in re.findall(r'<data value="([^"]+)"[^>]*>([^<]*)</data>', page):
        assert text == render_value(look_up(facts, place), "plain"), place
    assert facts["verdict"] in html.unescape(page) and page.count("<svg") == 2
    text = render_comparison(facts)
    assert facts["verdict"] in text and "left out: pruned to 0.01" in text
    with pytest.raises(UserError, match="holds other files"):
        compress_run(tmp_path / "run", config)
    twice = CompressConfig(str(tmp_path / "other"), candidates=[str(tmp_path / "student")] * 2)
    with pytest.raises(UserError, match="two runs named student"):
        compress_run(tmp_path / "run", twice)
    few = ["--max_steps", "1", "--max_eval_samples", "4"]
    tiny_run(tmp_path / "few", stripes, "scratch/article_cnn", *flags, *few)
    other = CompressConfig(str(tmp_path / "other"), candidates=[str(tmp_path / "few")])
    with pytest.raises(UserError, match="predicted different validation images"):
        compress_run(tmp_path / "run", other)
    assert not (tmp_path / "other").exists()


def test_an_interrupted_comparison_continues(tmp_path, stripes, tiny_vit, monkeypatch, caplog):
    """A finished pruned version is kept, and the same call makes the rest; another call is refused."""
    shutil.copytree(stripes, tmp_path / "old")
    tiny_run(tmp_path / "run", tmp_path / "old", tiny_vit, "--max_steps", "2")
    folder = tmp_path / "small"
    config = CompressConfig(str(folder), target_sizes=[0.8], num_train_epochs=1)
    caplog.set_level("INFO")
    with monkeypatch.context() as patch:
        patch.setattr(module, "float16", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compress_run(tmp_path / "run", config)
    pruned = RunFolder(folder / "pruned-0.8")
    finished = pruned.facts()["finished"]
    assert f"interrupted: the same command continues in {folder}" in caplog.text
    assert not (folder / "compress.html").exists() and not pruned.checkpoints()
    with pytest.raises(UserError, match="holds an unfinished comparison with other options"):
        compress_run(tmp_path / "run", CompressConfig(str(folder), target_sizes=[0.9]))
    (tmp_path / "old").rename(tmp_path / "new")
    moved = dataclasses.replace(config, dataset_name=str(tmp_path / "new"))
    facts = compress_run(tmp_path / "run", moved)
    assert "continuing the comparison" in caplog.text
    assert pruned.facts()["finished"] == finished
    assert "pruned to 0.8" in [each["name"] for each in facts["versions"]]
    assert "test" not in facts["versions"][0]  # the run has not seen it
    assert not (folder / "unfinished.json").exists()


def interrupt(*_):
    raise KeyboardInterrupt


def test_versions_that_cannot_be_measured_are_left_out(tmp_path, stripes, tiny_vit, monkeypatch):
    tiny_run(tmp_path / "run", stripes, tiny_vit, "--max_steps", "2")
    monkeypatch.setattr(module, "_overflowing", lambda predicted: ["float16"])
    monkeypatch.setattr(sys, "executable", "false")  # of the memory measurement
    config = CompressConfig(str(tmp_path / "small"), target_sizes=[0.01])
    facts = compress_run(tmp_path / "run", config)
    assert facts["left_out"]["float16"] == "its logits are not finite on all images"
    assert not (tmp_path / "small" / "original-float16.onnx").exists()
    assert "pruning leaves at least" in facts["left_out"]["pruned to 0.01"]
    (original,) = facts["versions"]
    assert original["peak_megabytes"] is None and facts["chosen"] == ORIGINAL


def test_logits_that_overflow_are_found():
    def predictions(logits):
        return Predictions(
            "test", np.arange(1), np.zeros(1, int), np.array([logits]), {0: "a", 1: "b"}
        )

    good, bad = predictions([1.0, 2.0]), predictions([np.inf, 0.0])
    predicted = {"validation": {"a": good, "b": good}, "test": {"a": good, "b": bad}}
    assert module._overflowing(predicted) == ["b"]


def test_shares_are_numbers_within_bounds(capsys):
    parsed, _ = parse(
        [CompressConfig], ["--output_dir", "out", "--target_sizes", "0.7", "0.4"], "x"
    )
    assert parsed.target_sizes == [0.7, 0.4]
    for words, message in (
        (["0.7", "1"], "--target_sizes is 1; it must be in 0.01..0.99"),
        (["half"], "--target_sizes takes a number, not 'half'"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            parse([CompressConfig], ["--output_dir", "out", "--target_sizes", *words], "x")


def test_the_verdict_is_the_fastest_version_that_is_not_worse():
    original = version(ORIGINAL, 0.9, 4)
    good, fast_but_worse = version("int8", 0.89, 2, 0.2), version("pruned", 0.7, 1, 1e-9)
    text, chosen = verdict([original, good, fast_but_worse])
    assert chosen == "int8"
    assert text == (
        "Use int8 (so): 2.0 times as fast for one image, 2.0 times smaller, accuracy on validation 0.8900 "
        "instead of 0.9000 (McNemar's p = 0.2)."
    )
    barely_faster = version("float16", 0.9, 3.9)
    text, chosen = verdict([original, fast_but_worse, barely_faster])
    assert chosen == ORIGINAL and text.startswith("Keep the original")


def test_the_front_has_what_no_other_version_beats():
    versions = [
        version(ORIGINAL, 0.9, 4), version("slower", 0.9, 5), version("int8", 0.89, 2),
        version("worse", 0.88, 2), version("same", 0.89, 2),
    ]  # fmt: skip
    assert pareto_front(versions) == [ORIGINAL, "int8", "same"]
    assert np.all([each["bytes"] for each in versions])

"""hf_cifar.evaluation.predictions: the file and every metric from it."""

import json

import datasets
import numpy as np
import pytest

from hf_cifar.errors import UserError
from hf_cifar.evaluation.predictions import Predictions, saved_splits
from hf_cifar.evaluation.tables import render_chosen, render_metrics

NAMES = {0: "cat", 1: "dog"}


@pytest.fixture
def predictions():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 60)
    logits = generator.normal(size=(60, 2)) + 2 * np.eye(2)[labels]
    row_ids = generator.permutation(1000)[:60]
    return Predictions("test", row_ids, labels, logits.astype(np.float32), NAMES)


def test_a_saved_file_gives_the_same_metrics(predictions, tmp_path):
    predictions.save(tmp_path)
    loaded = Predictions.load(tmp_path, "test")
    for name in ("row_ids", "labels", "logits"):
        before, after = getattr(predictions, name), getattr(loaded, name)
        np.testing.assert_array_equal(before, after)
        assert after.dtype == before.dtype
    assert loaded.id2label == NAMES
    assert loaded.metrics == predictions.metrics
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"test": predictions.metrics}
    assert saved_splits(tmp_path) == ["test"]


def test_file_is_a_data_set_with_class_names(predictions, tmp_path):
    predictions.save(tmp_path)
    rows = datasets.Dataset.from_parquet(
        str(tmp_path / "predictions" / "test.parquet"), cache_dir=str(tmp_path / "cache")
    )
    assert rows.features["label"].names == ["cat", "dog"]
    np.testing.assert_array_equal(rows["row_id"][:], predictions.row_ids)


def test_a_second_split_joins_the_first(predictions, tmp_path):
    predictions.save(tmp_path)
    Predictions("validation", *list(vars(predictions).values())[1:5]).save(tmp_path)
    assert set(json.loads((tmp_path / "metrics.json").read_text())) == {"test", "validation"}
    assert saved_splits(tmp_path) == ["validation", "test"]


def test_missing_and_unrelated_files_are_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"no predictions in .*; run: hf-cifar evaluate .*--split test"
    ):
        Predictions.load(tmp_path, "test")
    path = tmp_path / "predictions" / "test.parquet"
    path.parent.mkdir()
    path.write_bytes(b"no parquet")
    with pytest.raises(UserError, match="does not contain predictions"):
        Predictions.load(tmp_path, "test")
    datasets.Dataset.from_dict({"label": [0, 1]}).to_parquet(str(path))
    with pytest.raises(UserError, match="does not contain predictions"):
        Predictions.load(tmp_path, "test")


def test_tables_show_metrics_with_intervals(predictions):
    metrics = predictions.metrics
    low, high = metrics["intervals"]["accuracy"]
    cell = f"{metrics['accuracy']:.4f} [{low:.4f}, {high:.4f}]"
    assert cell in render_chosen({"test": metrics}, ["num_images", "accuracy"])
    table = render_metrics({"test": metrics})
    assert cell in table and "test, per class" in table
    for name, values in metrics["per_class"].items():
        line = next(line for line in table.splitlines() if line.startswith(name))
        assert f"{values['average_precision']:.4f}" in line

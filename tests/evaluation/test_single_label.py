"""hf_cifar.evaluation.single_label: the metrics equal scikit-learn's."""

import math
import warnings

import numpy as np
import pytest
from sklearn import metrics as sk

from hf_cifar.evaluation.predictions import compute_metrics
from hf_cifar.evaluation.single_label import (
    SingleLabel,
    brier,
    confusion_matrix,
    log_losses,
    top_k_hits,
)

CLOSE = {"rel": 0, "abs": 1e-9}


def test_probabilities_sum_to_one_and_do_not_overflow():
    logits = np.array([[1e4, 0.0, -1e4], [0.0, math.log(2), math.log(3)]], dtype=np.float32)
    found = SingleLabel(logits, np.zeros(2, int)).probabilities
    np.testing.assert_allclose(found, [[1, 0, 0], [1 / 6, 2 / 6, 3 / 6]], atol=1e-7)
    assert found.dtype == np.float64


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("kind", ["plain", "missing"])
def test_top_k_equals_sklearn_without_ties(kind, k, draw):
    # Normal draws have no ties; the columns that "missing" sets equal are last for all metrics.
    logits, labels = draw(kind)
    probabilities = SingleLabel(logits, labels).probabilities
    expected = sk.top_k_accuracy_score(labels, probabilities, k=k, labels=range(8))
    assert top_k_hits(probabilities, labels, k).mean() == pytest.approx(expected, **CLOSE)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_gives_ties_to_the_lower_class(k, draw):
    logits, labels = draw("ties")
    outcome = SingleLabel(logits, labels)
    hits = 0
    for row, label in zip(logits, labels, strict=True):
        better = sum(v > row[label] or (v == row[label] and i < label) for i, v in enumerate(row))
        hits += better < k
    assert top_k_hits(outcome.probabilities, labels, k).sum() == hits
    if k == 1:
        assert hits / len(labels) == outcome.metric("accuracy")


def test_cross_entropy_of_the_article():
    p = [[0.1, 0.2, 0.4, 0.2, 0.05, 0.01, 0.01, 0.01, 0.01, 0.02]]
    assert log_losses(p, [2]) == pytest.approx([-math.log(0.4)], **CLOSE)
    assert round(float(log_losses(p, [2])[0]), 3) == 0.916


def test_cross_entropy_of_an_impossible_class_is_finite():
    assert 700 < log_losses([[1.0, 0.0]], [1]) < 750


def test_confusion_matrix_equals_sklearn(drawn):
    found = confusion_matrix(drawn.predictions, drawn.labels, 8)
    np.testing.assert_array_equal(
        found, sk.confusion_matrix(drawn.labels, drawn.predictions, labels=range(8))
    )
    assert found.sum() == len(drawn.labels)


def test_brier_equals_sklearn(drawn):
    expected = np.mean((drawn.probabilities - np.eye(8)[drawn.labels]) ** 2) * 8
    assert brier(drawn.probabilities, drawn.labels).mean() == pytest.approx(expected, **CLOSE)
    binary = np.array([[0.8, 0.2], [0.4, 0.6], [0.9, 0.1]])
    expected = 2 * sk.brier_score_loss([0, 1, 1], binary[:, 1])
    assert brier(binary, [0, 1, 1]).mean() == pytest.approx(expected, **CLOSE)


def test_each_class_has_its_metrics(drawn):
    names = {i: f"class {i}" for i in range(8)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = compute_metrics(drawn.logits, drawn.labels, names)
    assert found["num_images"] == len(drawn.labels)
    recall = sk.recall_score(
        drawn.labels, drawn.predictions, labels=range(8), average=None, zero_division=0
    )
    for label, name in names.items():
        row = found["per_class"][name]
        assert row["num_images"] == (drawn.labels == label).sum()
        assert row["recall"] == pytest.approx(recall[label], **CLOSE)
        assert (row["roc_auc"] is None) == (label not in drawn.labels)
    assert sum(map(sum, found["confusion_matrix"])) == len(drawn.labels)


def test_undefined_areas_and_top_5_accuracy():
    found = compute_metrics(np.array([[2.0, 1.0], [3.0, 0.0]]), np.array([0, 0]), {0: "a", 1: "b"})
    assert found["roc_auc_macro"] is None
    assert (found["accuracy"], found["f1_macro"]) == (1.0, 1.0)
    assert "top_5_accuracy" not in found


def test_calibration_keeps_the_predictions_and_lowers_the_error(draw):
    logits, labels = draw("plain", count=2000)
    plain = SingleLabel(3 * logits, labels)
    changed = plain.calibrate()
    calibrated = SingleLabel(changed["logits"], labels, temperature=changed["temperature"])
    np.testing.assert_array_equal(calibrated.predicted, plain.predicted)
    found = calibrated.compute(dict(enumerate("abcdefgh")))
    assert found["temperature"] == changed["temperature"] > 1
    assert found["ece"] < found["ece_uncalibrated"] == pytest.approx(plain.metric("ece"), abs=1e-6)

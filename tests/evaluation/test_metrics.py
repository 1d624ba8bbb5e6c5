"""hf_cifar.evaluation.metrics: the figures are scikit-learn's."""

import math
import warnings

import numpy as np
import pytest
from sklearn import metrics as sk

from hf_cifar.evaluation.metrics import (
    accuracy,
    average,
    average_precision,
    balanced_accuracy,
    brier,
    compute_metrics,
    confusion_matrix,
    cross_entropy,
    figures_of_confusion,
    matthews,
    precision_recall_f1,
    roc_auc,
    softmax,
    top_k_accuracy,
)

CLOSE = {"rel": 0, "abs": 1e-9}
SCORES = {"precision": sk.precision_score, "recall": sk.recall_score, "f1": sk.f1_score}


def test_softmax_rows_sum_to_one_and_do_not_overflow():
    logits = np.array([[1e4, 0.0, -1e4], [0.0, math.log(2), math.log(3)]], dtype=np.float32)
    expected = [[1, 0, 0], [1 / 6, 2 / 6, 3 / 6]]
    np.testing.assert_allclose(softmax(logits), expected, atol=1e-7)
    assert softmax(logits).dtype == np.float64


def test_accuracy_is_sklearns(drawn):
    expected = sk.accuracy_score(drawn.labels, drawn.predictions)
    assert accuracy(drawn.predictions, drawn.labels) == pytest.approx(expected, **CLOSE)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("kind", ["plain", "missing"])
def test_top_k_is_sklearns_without_ties(kind, k, draw):
    # Normal draws tie with probability 0; the columns that "missing" sets equal are last for all.
    logits, labels = draw(kind)
    probabilities = softmax(logits)
    expected = sk.top_k_accuracy_score(labels, probabilities, k=k, labels=range(8))
    assert top_k_accuracy(probabilities, labels, k) == pytest.approx(expected, **CLOSE)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_gives_ties_to_the_lower_class(k, draw):
    logits, labels = draw("ties")
    hits = 0
    for row, label in zip(logits, labels, strict=True):
        better = sum(v > row[label] or (v == row[label] and i < label) for i, v in enumerate(row))
        hits += better < k
    assert top_k_accuracy(softmax(logits), labels, k) == pytest.approx(hits / len(labels), **CLOSE)
    if k == 1:
        assert hits / len(labels) == accuracy(logits.argmax(axis=1), labels)


def test_cross_entropy_is_sklearns(drawn):
    expected = sk.log_loss(drawn.labels, drawn.probabilities, labels=range(8))
    assert cross_entropy(drawn.probabilities, drawn.labels) == pytest.approx(expected, **CLOSE)


def test_cross_entropy_of_an_impossible_class_is_finite():
    assert 700 < cross_entropy([[1.0, 0.0]], [1]) < 750


def test_confusion_matrix_is_sklearns(drawn):
    found = confusion_matrix(drawn.predictions, drawn.labels, 8)
    np.testing.assert_array_equal(
        found, sk.confusion_matrix(drawn.labels, drawn.predictions, labels=range(8))
    )
    assert found.sum() == len(drawn.labels)


@pytest.mark.parametrize("key", SCORES)
def test_per_class_scores_are_sklearns(key, drawn):
    confusion = confusion_matrix(drawn.predictions, drawn.labels, 8)
    expected = SCORES[key](
        drawn.labels, drawn.predictions, labels=range(8), average=None, zero_division=0
    )
    np.testing.assert_allclose(precision_recall_f1(confusion)[key], expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("how", ["macro", "weighted"])
@pytest.mark.parametrize("key", SCORES)
def test_averaged_scores_are_sklearns(key, how, drawn):
    confusion = confusion_matrix(drawn.predictions, drawn.labels, 8)
    values = precision_recall_f1(confusion)[key]
    expected = SCORES[key](drawn.labels, drawn.predictions, average=how, zero_division=0)
    assert average(values, confusion, how) == pytest.approx(expected, **CLOSE)


@pytest.mark.parametrize(
    ("area", "expected"),
    [(roc_auc, sk.roc_auc_score), (average_precision, sk.average_precision_score)],
)
def test_areas_are_sklearns(area, expected, drawn):
    found = area(drawn.probabilities, drawn.labels)
    for label in range(8):
        is_label = drawn.labels == label
        if is_label.any():
            wanted = expected(is_label, drawn.probabilities[:, label])
            assert found[label] == pytest.approx(wanted, **CLOSE)
        else:
            assert np.isnan(found[label])


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_balanced_accuracy_and_matthews_are_sklearns(drawn):
    confusion = confusion_matrix(drawn.predictions, drawn.labels, 8)
    expected = sk.balanced_accuracy_score(drawn.labels, drawn.predictions)
    assert balanced_accuracy(confusion) == pytest.approx(expected, **CLOSE)
    expected = sk.matthews_corrcoef(drawn.labels, drawn.predictions)
    assert matthews(confusion) == pytest.approx(expected, **CLOSE)


def test_matthews_of_a_constant_prediction_is_0():
    assert matthews(confusion_matrix([1, 1, 1], [0, 1, 1], 2)) == 0


def test_brier_is_sklearns(drawn):
    expected = np.mean((drawn.probabilities - np.eye(8)[drawn.labels]) ** 2) * 8
    assert brier(drawn.probabilities, drawn.labels).mean() == pytest.approx(expected, **CLOSE)
    binary = np.array([[0.8, 0.2], [0.4, 0.6], [0.9, 0.1]])
    expected = 2 * sk.brier_score_loss([0, 1, 1], binary[:, 1])
    assert brier(binary, [0, 1, 1]).mean() == pytest.approx(expected, **CLOSE)


def test_figures_of_many_matrices_are_those_of_each():
    matrices = np.random.default_rng(0).integers(0, 9, (5, 4, 4))
    together = figures_of_confusion(matrices)
    for number, matrix in enumerate(matrices):
        for key, value in figures_of_confusion(matrix).items():
            assert together[key][number] == pytest.approx(value, **CLOSE)


def test_roc_auc_counts_ordered_pairs():
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.4, 0.6], [0.2, 0.8]])
    labels = np.array([0, 0, 1, 1])
    # Pairs (of class 1, of class 0): three in order, one tied.
    np.testing.assert_allclose(roc_auc(probabilities, labels), [3.5 / 4, 3.5 / 4])


def test_compute_metrics_is_sklearns(drawn):
    names = {i: f"class {i}" for i in range(8)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = compute_metrics(drawn.logits, drawn.labels, names)
    assert found["num_images"] == len(drawn.labels)
    assert found["accuracy"] == pytest.approx(
        sk.accuracy_score(drawn.labels, drawn.predictions), **CLOSE
    )
    assert found["cross_entropy"] == pytest.approx(
        sk.log_loss(drawn.labels, drawn.probabilities, labels=range(8)), **CLOSE
    )
    for key, function in SCORES.items():
        for how in ("macro", "weighted"):
            expected = function(drawn.labels, drawn.predictions, average=how, zero_division=0)
            assert found[f"{key}_{how}"] == pytest.approx(expected, **CLOSE)
        expected = function(
            drawn.labels, drawn.predictions, labels=range(8), average=None, zero_division=0
        )
        per_class = [found["per_class"][name][key] for name in names.values()]
        np.testing.assert_allclose(per_class, expected, atol=1e-9, rtol=0)
    areas = roc_auc(drawn.probabilities, drawn.labels)
    assert found["roc_auc_macro"] == pytest.approx(np.nanmean(areas), **CLOSE)
    for label, name in names.items():
        row = found["per_class"][name]
        assert row["num_images"] == (drawn.labels == label).sum()
        assert (row["roc_auc"] is None) == bool(np.isnan(areas[label]))
    assert sum(map(sum, found["confusion_matrix"])) == len(drawn.labels)


def test_compute_metrics_of_one_class_has_no_area():
    found = compute_metrics(np.array([[2.0, 1.0], [3.0, 0.0]]), np.array([0, 0]), {0: "a", 1: "b"})
    assert found["roc_auc_macro"] is None
    assert (found["accuracy"], found["f1_macro"]) == (1.0, 1.0)
    assert "top_5_accuracy" not in found

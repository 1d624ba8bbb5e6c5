"""hf_cifar.evaluation.metrics: scores of counts and areas of rankings equal scikit-learn's."""

import numpy as np
import pytest
from sklearn import metrics as sk

from hf_cifar.evaluation.metrics import (
    CLASS_METRICS,
    COUNT_METRICS,
    Counts,
    average_precision,
    matthews,
    roc_auc,
)
from hf_cifar.evaluation.single_label import SingleLabel, confusion_matrix

CLOSE = {"rel": 0, "abs": 1e-9}
SCORES = {"precision": sk.precision_score, "recall": sk.recall_score, "f1": sk.f1_score}


@pytest.mark.parametrize("name", SCORES)
def test_scores_of_each_class_equal_sklearn(name, drawn):
    counts = SingleLabel(drawn.logits, drawn.labels).counts
    expected = SCORES[name](
        drawn.labels, drawn.predictions, labels=range(8), average=None, zero_division=0
    )
    np.testing.assert_allclose(CLASS_METRICS[name](counts), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("mean", ["micro", "macro", "weighted"])
@pytest.mark.parametrize("name", SCORES)
def test_means_of_scores_equal_sklearn(name, mean, drawn):
    counts = SingleLabel(drawn.logits, drawn.labels).counts
    expected = SCORES[name](drawn.labels, drawn.predictions, average=mean, zero_division=0)
    assert COUNT_METRICS[f"{name}_{mean}"](counts) == pytest.approx(expected, **CLOSE)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_balanced_accuracy_and_matthews_equal_sklearn(drawn):
    counts = SingleLabel(drawn.logits, drawn.labels).counts
    expected = sk.balanced_accuracy_score(drawn.labels, drawn.predictions)
    assert COUNT_METRICS["balanced_accuracy"](counts) == pytest.approx(expected, **CLOSE)
    expected = sk.matthews_corrcoef(drawn.labels, drawn.predictions)
    assert COUNT_METRICS["matthews"](counts) == pytest.approx(expected, **CLOSE)


def test_matthews_of_a_constant_prediction_is_0():
    assert matthews(Counts.from_confusion(confusion_matrix([1, 1, 1], [0, 1, 1], 2))) == 0


@pytest.mark.parametrize("name", COUNT_METRICS)
def test_metrics_are_vectorised_over_counts(name):
    matrices = np.random.default_rng(0).integers(0, 9, (5, 4, 4))
    together = COUNT_METRICS[name](Counts.from_confusion(matrices))
    each = [COUNT_METRICS[name](Counts.from_confusion(matrix)) for matrix in matrices]
    np.testing.assert_allclose(together, each, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("area", "expected"),
    [(roc_auc, sk.roc_auc_score), (average_precision, sk.average_precision_score)],
)
def test_areas_equal_sklearn(area, expected, drawn):
    found = area(drawn.probabilities, SingleLabel(drawn.logits, drawn.labels).positive)
    for label in range(8):
        is_label = drawn.labels == label
        if is_label.any():
            wanted = expected(is_label, drawn.probabilities[:, label])
            assert found[label] == pytest.approx(wanted, **CLOSE)
        else:
            assert np.isnan(found[label])


def test_roc_auc_counts_ordered_pairs():
    scores = np.array([[0.9, 0.1], [0.4, 0.6], [0.4, 0.6], [0.2, 0.8]])
    positive = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], bool)
    # Pairs (of class 1, of class 0): three in order, one tied.
    np.testing.assert_allclose(roc_auc(scores, positive), [3.5 / 4, 3.5 / 4])

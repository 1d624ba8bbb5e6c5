import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn import metrics as sk

from hf_cifar.evaluation.metrics import (
    F1,
    Accuracy,
    ConfusionMatrix,
    CrossEntropy,
    Precision,
    Recall,
    RocAuc,
    TopKAccuracy,
    accuracy,
    average,
    compute_metrics,
    compute_training_metrics,
    confusion_matrix,
    cross_entropy,
    precision_recall_f1,
    roc_auc,
    softmax,
    top_k_accuracy,
)

CLOSE = {"rel": 0, "abs": 1e-9}
SCORES = {
    "precision": (Precision, sk.precision_score),
    "recall": (Recall, sk.recall_score),
    "f1": (F1, sk.f1_score),
}


def draw(kind, count=300, num_labels=8):
    """Logits [N, K] and labels [N]: plain, with ties, or with images or predictions missing."""
    generator = np.random.default_rng(len(kind))
    labels = generator.integers(0, num_labels, count)
    logits = generator.normal(size=(count, num_labels)) + 1.5 * np.eye(num_labels)[labels]
    if kind == "ties":
        logits = np.round(logits)
    if kind == "missing":
        labels[labels == 2] = 3  # no image
        logits[:, 5] = -9.0  # no prediction
        labels[labels == 6], logits[:, 6] = 0, -9.0  # neither
    return logits, labels


KINDS = ("plain", "ties", "missing")


@pytest.fixture(params=KINDS)
def drawn(request):
    logits, labels = draw(request.param)
    probabilities = softmax(logits)
    return SimpleNamespace(
        logits=logits, labels=labels, probabilities=probabilities,
        predictions=probabilities.argmax(axis=1), num_labels=8,
    )  # fmt: skip


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
def test_top_k_is_sklearns_without_ties(kind, k):
    # Normal draws tie with probability 0; the columns that "missing" sets equal are last for all.
    logits, labels = draw(kind)
    probabilities = softmax(logits)
    expected = sk.top_k_accuracy_score(labels, probabilities, k=k, labels=range(8))
    assert top_k_accuracy(probabilities, labels, k) == pytest.approx(expected, **CLOSE)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_gives_ties_to_the_lower_class(k):
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


def test_cross_entropy_of_the_article():
    p = [[0.1, 0.2, 0.4, 0.2, 0.05, 0.01, 0.01, 0.01, 0.01, 0.02]]
    assert cross_entropy(p, [2]) == pytest.approx(-math.log(0.4), **CLOSE)
    found = CrossEntropy().compute(predictions=p, references=[2])["cross_entropy"]
    assert round(found, 3) == 0.916


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
    expected = SCORES[key][1](
        drawn.labels, drawn.predictions, labels=range(8), average=None, zero_division=0
    )
    np.testing.assert_allclose(precision_recall_f1(confusion)[key], expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("how", ["macro", "weighted"])
@pytest.mark.parametrize("key", SCORES)
def test_averaged_scores_are_sklearns(key, how, drawn):
    confusion = confusion_matrix(drawn.predictions, drawn.labels, 8)
    values = precision_recall_f1(confusion)[key]
    expected = SCORES[key][1](drawn.labels, drawn.predictions, average=how, zero_division=0)
    assert average(values, confusion, how) == pytest.approx(expected, **CLOSE)


def test_roc_auc_is_sklearns(drawn):
    found = roc_auc(drawn.probabilities, drawn.labels)
    for label in range(8):
        is_label = drawn.labels == label
        if is_label.any():
            expected = sk.roc_auc_score(is_label, drawn.probabilities[:, label])
            assert found[label] == pytest.approx(expected, **CLOSE)
        else:
            assert np.isnan(found[label])


def test_macro_roc_auc_is_sklearns_one_versus_rest():
    logits, labels = draw("plain")
    probabilities = softmax(logits)
    expected = sk.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
    found = RocAuc().compute(predictions=probabilities, references=labels)["roc_auc"]
    assert found == pytest.approx(expected, **CLOSE)


def test_roc_auc_counts_ordered_pairs():
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.4, 0.6], [0.2, 0.8]])
    labels = np.array([0, 0, 1, 1])
    # Pairs (of class 1, of class 0): three in order, one tied.
    np.testing.assert_allclose(roc_auc(probabilities, labels), [3.5 / 4, 3.5 / 4])


def test_metric_classes_equal_their_functions(drawn):
    by_label = {"predictions": drawn.predictions, "references": drawn.labels}
    by_probability = {"predictions": drawn.probabilities, "references": drawn.labels}
    confusion = confusion_matrix(drawn.predictions, drawn.labels, 8)
    assert Accuracy().compute(**by_label) == {"accuracy": accuracy(**by_label)}
    assert TopKAccuracy().compute(**by_probability, k=3) == {
        "top_3_accuracy": top_k_accuracy(drawn.probabilities, drawn.labels, 3)
    }
    assert CrossEntropy().compute(**by_probability) == {
        "cross_entropy": cross_entropy(drawn.probabilities, drawn.labels)
    }
    found = ConfusionMatrix().compute(**by_label, num_labels=8)["confusion_matrix"]
    np.testing.assert_array_equal(found, confusion)
    areas = RocAuc().compute(**by_probability, average=None)["roc_auc"]
    np.testing.assert_array_equal(areas, roc_auc(drawn.probabilities, drawn.labels))
    for key, (metric, _) in SCORES.items():
        values = precision_recall_f1(confusion)[key]
        found = metric().compute(**by_label, average=None, num_labels=8)[key]
        np.testing.assert_array_equal(found, values)
        for how in ("macro", "weighted"):
            found = metric().compute(**by_label, average=how)[key]
            assert found == pytest.approx(average(values, confusion, how), **CLOSE)


def test_metrics_add_up_over_batches(drawn):
    for metric, predictions in (
        (Accuracy(), drawn.predictions), (F1(), drawn.predictions), (RocAuc(), drawn.probabilities),
    ):  # fmt: skip
        whole = type(metric)().compute(predictions=predictions, references=drawn.labels)
        for start in range(0, len(drawn.labels), 64):
            part = slice(start, start + 64)
            metric.add_batch(predictions=predictions[part], references=drawn.labels[part])
        assert metric.compute() == whole


def test_unknown_average_is_refused():
    with pytest.raises(ValueError, match="no average 'micro'; it is macro, weighted, or None"):
        F1().compute(predictions=[0, 1], references=[0, 1], average="micro")


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
    for key, (_, function) in SCORES.items():
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


def test_compute_training_metrics(drawn):
    found = compute_training_metrics(
        SimpleNamespace(predictions=drawn.logits.astype(np.float32), label_ids=drawn.labels)
    )
    assert set(found) == {"accuracy", "cross_entropy"}
    assert found["accuracy"] == accuracy(drawn.logits.argmax(axis=1), drawn.labels)
    expected = cross_entropy(drawn.probabilities, drawn.labels)
    assert found["cross_entropy"] == pytest.approx(expected, abs=1e-5)

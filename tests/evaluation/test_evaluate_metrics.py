"""hf_cifar.evaluation.evaluate_metrics: the classes give what the functions give."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn import metrics as sk

from hf_cifar.evaluation.evaluate_metrics import (
    F1,
    Accuracy,
    ConfusionMatrix,
    CrossEntropy,
    Precision,
    Recall,
    RocAuc,
    TopKAccuracy,
    compute_training_metrics,
)
from hf_cifar.evaluation.metrics import (
    accuracy,
    average,
    confusion_matrix,
    cross_entropy,
    precision_recall_f1,
    roc_auc,
    softmax,
    top_k_accuracy,
)

CLOSE = {"rel": 0, "abs": 1e-9}
PER_CLASS = {"precision": Precision, "recall": Recall, "f1": F1}


def test_cross_entropy_of_the_article():
    p = [[0.1, 0.2, 0.4, 0.2, 0.05, 0.01, 0.01, 0.01, 0.01, 0.02]]
    assert cross_entropy(p, [2]) == pytest.approx(-math.log(0.4), **CLOSE)
    found = CrossEntropy().compute(predictions=p, references=[2])["cross_entropy"]
    assert round(found, 3) == 0.916


def test_macro_roc_auc_is_sklearns_one_versus_rest(draw):
    logits, labels = draw("plain")
    probabilities = softmax(logits)
    expected = sk.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
    found = RocAuc().compute(predictions=probabilities, references=labels)["roc_auc"]
    assert found == pytest.approx(expected, **CLOSE)


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
    for key, metric in PER_CLASS.items():
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


def test_compute_training_metrics(drawn):
    found = compute_training_metrics(
        SimpleNamespace(predictions=drawn.logits.astype(np.float32), label_ids=drawn.labels)
    )
    assert set(found) == {"accuracy", "cross_entropy"}
    assert found["accuracy"] == accuracy(drawn.logits.argmax(axis=1), drawn.labels)
    expected = cross_entropy(drawn.probabilities, drawn.labels)
    assert found["cross_entropy"] == pytest.approx(expected, abs=1e-5)

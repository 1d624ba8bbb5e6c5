"""The figures as `evaluate.Metric` classes that need no network."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np

from hf_cifar.evaluation import metrics
from hf_cifar.evaluation.multi_label import multi_label_training_metrics

_LABELS = datasets.Features(
    {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
)
_PROBABILITIES = datasets.Features(
    {
        "predictions": datasets.Sequence(datasets.Value("float64")),
        "references": datasets.Value("int64"),
    }
)


class ClassificationMetric(evaluate.Metric):
    """An `evaluate.Metric` that is its own definition: built without a download, kept in memory."""

    input_features = _LABELS

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"keep_in_memory": True, **kwargs})

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "", citation="", features=self.input_features
        )


class Accuracy(ClassificationMetric):
    """Share of right predictions."""

    def _compute(self, predictions, references):
        return {"accuracy": metrics.accuracy(predictions, references)}


class TopKAccuracy(ClassificationMetric):
    """Share of images whose class is among the k most probable. Takes probabilities."""

    input_features = _PROBABILITIES

    def _compute(self, predictions, references, k=5):
        return {f"top_{k}_accuracy": metrics.top_k_accuracy(predictions, references, k)}


class CrossEntropy(ClassificationMetric):
    """Mean negative log-probability of the true class. Takes probabilities."""

    input_features = _PROBABILITIES

    def _compute(self, predictions, references):
        return {"cross_entropy": metrics.cross_entropy(predictions, references)}


class ConfusionMatrix(ClassificationMetric):
    """Counts: row is the true class, column the predicted one."""

    def _compute(self, predictions, references, num_labels=None):
        num_labels = num_labels or int(max(np.max(predictions), np.max(references))) + 1
        return {"confusion_matrix": metrics.confusion_matrix(predictions, references, num_labels)}


class _PerClass(ClassificationMetric):
    """Shared by precision, recall and F1: one value a class, or an average."""

    key = ""

    def _compute(self, predictions, references, average="macro", num_labels=None):
        num_labels = num_labels or int(max(np.max(predictions), np.max(references))) + 1
        confusion = metrics.confusion_matrix(predictions, references, num_labels)
        values = metrics.precision_recall_f1(confusion)[self.key]
        return {
            self.key: values if average is None else metrics.average(values, confusion, average)
        }


class Precision(_PerClass):
    """Share of the images given a class that are of it. average: "macro", "weighted" or None."""

    key = "precision"


class Recall(_PerClass):
    """Share of the images of a class that are given it. average: "macro", "weighted" or None."""

    key = "recall"


class F1(_PerClass):
    """Harmonic mean of precision and recall. average: "macro", "weighted" or None."""

    key = "f1"


class RocAuc(ClassificationMetric):
    """Area under the ROC curve, one class against the rest. Takes probabilities. average: "macro" or None."""

    input_features = _PROBABILITIES

    def _compute(self, predictions, references, average="macro"):
        areas = metrics.roc_auc(np.asarray(predictions), references)
        return {"roc_auc": areas if average is None else float(np.nanmean(areas))}


def compute_training_metrics(prediction: Any) -> dict[str, float]:
    """The figures of every evaluation during training, exact under any number of processes."""
    labels = prediction.label_ids
    if labels.ndim == 2:
        return multi_label_training_metrics(prediction.predictions, labels)
    probabilities = metrics.softmax(prediction.predictions)
    return {
        **Accuracy().compute(predictions=probabilities.argmax(axis=1), references=labels),
        "cross_entropy": metrics.cross_entropy(probabilities, labels),
    }

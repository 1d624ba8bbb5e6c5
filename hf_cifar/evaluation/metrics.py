"""Classification metrics: numpy functions, and `evaluate.Metric` classes around them that need no network.

Shapes: N images, K classes; `probabilities` [N, K] with rows that sum to 1, `predictions` and `references`
[N] class ids.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn import metrics as sk

Array = np.ndarray


def softmax(logits: Array) -> Array:
    """Probabilities [N, K] of logits [N, K], in float64."""
    logits = np.asarray(logits, dtype=np.float64)
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exp / exp.sum(axis=1, keepdims=True)


def accuracy(predictions: Array, references: Array) -> float:
    """Share of right predictions, 0..1."""
    return float(np.mean(np.asarray(predictions) == np.asarray(references)))


def top_k_accuracy(probabilities: Array, references: Array, k: int = 5) -> float:
    """Share of images whose class is among the k most probable, 0..1; ties go to the lower class id."""
    references = np.asarray(references)
    top = np.argsort(-np.asarray(probabilities), axis=1, kind="stable")[:, :k]
    return float(np.mean((top == references[:, None]).any(axis=1)))


def cross_entropy(probabilities: Array, references: Array) -> float:
    """Mean of -ln p(true class), in nats. A probability of 0 counts as the smallest positive float64."""
    probabilities = np.asarray(probabilities, dtype=np.float64)
    true = probabilities[np.arange(len(probabilities)), np.asarray(references)]
    return float(-np.log(np.maximum(true, np.finfo(np.float64).tiny)).mean())


def confusion_matrix(predictions: Array, references: Array, num_labels: int) -> Array:
    """Counts [K, K]: row is the true class, column the predicted one."""
    flat = np.asarray(references) * num_labels + np.asarray(predictions)
    return np.bincount(flat, minlength=num_labels**2).reshape(num_labels, num_labels)


def precision_recall_f1(confusion: Array) -> dict[str, Array]:
    """Per class [K] precision, recall and F1, 0..1, from a confusion matrix; 0 where undefined."""
    hits = np.diag(confusion).astype(np.float64)
    predicted, actual = confusion.sum(axis=0), confusion.sum(axis=1)

    def ratio(a: Array, b: Array) -> Array:
        return np.divide(a, b, out=np.zeros_like(a), where=b > 0)

    return {
        "precision": ratio(hits, predicted),
        "recall": ratio(hits, actual),
        "f1": ratio(2 * hits, predicted + actual),
    }


def average(per_class: Array, confusion: Array, how: str) -> float:
    """Mean over the classes in truth or prediction: "macro" counts each once, "weighted" by size."""
    if how not in ("macro", "weighted"):
        raise ValueError(
            f"no average {how!r}; it is macro, weighted, or None for one value a class"
        )
    actual = confusion.sum(axis=1)
    present = (actual + confusion.sum(axis=0)) > 0
    weights = present if how == "macro" else actual
    return float(np.average(per_class, weights=weights))


def roc_auc(probabilities: Array, references: Array) -> Array:
    """Area under the ROC curve of each class against the rest [K], 0..1; NaN for a class without images
    (or with nothing else)."""
    probabilities, references = np.asarray(probabilities), np.asarray(references)
    areas = np.full(probabilities.shape[1], np.nan)
    for label in range(probabilities.shape[1]):
        is_label = references == label
        if is_label.any() and not is_label.all():
            areas[label] = sk.roc_auc_score(is_label, probabilities[:, label])
    return areas


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
        return {"accuracy": accuracy(predictions, references)}


class TopKAccuracy(ClassificationMetric):
    """Share of images whose class is among the k most probable. Takes probabilities."""

    input_features = _PROBABILITIES

    def _compute(self, predictions, references, k=5):
        return {f"top_{k}_accuracy": top_k_accuracy(predictions, references, k)}


class CrossEntropy(ClassificationMetric):
    """Mean negative log-probability of the true class. Takes probabilities."""

    input_features = _PROBABILITIES

    def _compute(self, predictions, references):
        return {"cross_entropy": cross_entropy(predictions, references)}


class ConfusionMatrix(ClassificationMetric):
    """Counts: row is the true class, column the predicted one."""

    def _compute(self, predictions, references, num_labels=None):
        num_labels = num_labels or int(max(np.max(predictions), np.max(references))) + 1
        return {"confusion_matrix": confusion_matrix(predictions, references, num_labels)}


class _PerClass(ClassificationMetric):
    """Shared by precision, recall and F1: one value a class, or an average."""

    key = ""

    def _compute(self, predictions, references, average="macro", num_labels=None):
        num_labels = num_labels or int(max(np.max(predictions), np.max(references))) + 1
        confusion = confusion_matrix(predictions, references, num_labels)
        values = precision_recall_f1(confusion)[self.key]
        return {self.key: values if average is None else _average(values, confusion, average)}


_average = average


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
        areas = roc_auc(np.asarray(predictions), references)
        return {"roc_auc": areas if average is None else float(np.nanmean(areas))}


# What a summary or a model card shows of `compute_metrics`.
HEADLINE_FIGURES = ("num_images", "accuracy", "f1_macro", "roc_auc_macro", "cross_entropy")


def render_figure(value: float | int | None) -> str:
    """One figure as people read it: four decimals, thousands separated, a dash for an undefined one."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def compute_training_metrics(prediction: Any) -> dict[str, float]:
    """The two figures of every evaluation during training, exact under any number of processes."""
    probabilities = softmax(prediction.predictions)
    labels = prediction.label_ids
    return {
        **Accuracy().compute(predictions=probabilities.argmax(axis=1), references=labels),
        "cross_entropy": cross_entropy(probabilities, labels),
    }


def compute_metrics(logits: Array, labels: Array, id2label: dict[int, str]) -> dict[str, Any]:
    """Every figure of a final evaluation, as plain JSON values.

    logits [N, K], labels [N]. Shares and areas are 0..1, `cross_entropy` in nats, `per_class` keyed by
    class name, `confusion_matrix` rows are true classes. None stands for an undefined area.
    """
    probabilities = softmax(logits)
    predictions = probabilities.argmax(axis=1)
    num_labels = len(id2label)
    matrix = ConfusionMatrix().compute(
        predictions=predictions, references=labels, num_labels=num_labels
    )["confusion_matrix"]
    figures: dict[str, Any] = {
        "num_images": len(labels),
        **Accuracy().compute(predictions=predictions, references=labels),
    }
    if num_labels > 5:
        figures |= TopKAccuracy().compute(predictions=probabilities, references=labels, k=5)
    figures |= CrossEntropy().compute(predictions=probabilities, references=labels)
    per_class = {}
    for metric in (Precision(), Recall(), F1()):
        for how in ("macro", "weighted"):
            value = metric.compute(
                predictions=predictions, references=labels, average=how, num_labels=num_labels
            )
            figures[f"{metric.key}_{how}"] = value[metric.key]
        per_class[metric.key] = metric.compute(
            predictions=predictions, references=labels, average=None, num_labels=num_labels
        )[metric.key]
    areas = RocAuc().compute(predictions=probabilities, references=labels, average=None)["roc_auc"]
    defined = areas[~np.isnan(areas)]
    figures["roc_auc_macro"] = float(defined.mean()) if len(defined) else None
    per_class["roc_auc"] = areas
    figures["per_class"] = {
        name: {
            "num_images": int(matrix[label].sum()),
            **{
                key: None if np.isnan(values[label]) else float(values[label])
                for key, values in per_class.items()
            },
        }
        for label, name in id2label.items()
    }
    figures["confusion_matrix"] = matrix.tolist()
    return figures

"""Every figure of a classifier, as a function of numpy arrays.

Shapes: N images, K classes; `probabilities` [N, K] with rows that sum to 1, `predictions` and `references`
[N] class ids.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn import metrics as sk

from hf_cifar.evaluation.calibration import calibration_error

Array = np.ndarray


def softmax(logits: Array) -> Array:
    """Probabilities [N, K] of logits [N, K], in float64."""
    logits = np.asarray(logits, dtype=np.float64)
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exp / exp.sum(axis=1, keepdims=True)


def accuracy(predictions: Array, references: Array) -> float:
    """Share of right predictions, 0..1."""
    return float(np.mean(np.asarray(predictions) == np.asarray(references)))


def top_k_hits(probabilities: Array, references: Array, k: int = 5) -> Array:
    """Whether each image's class [N] is among the k most probable; ties go to the lower class id."""
    top = np.argsort(-np.asarray(probabilities), axis=1, kind="stable")[:, :k]
    return (top == np.asarray(references)[:, None]).any(axis=1)


def top_k_accuracy(probabilities: Array, references: Array, k: int = 5) -> float:
    """Share of images whose class is among the k most probable, 0..1."""
    return float(top_k_hits(probabilities, references, k).mean())


def log_losses(probabilities: Array, references: Array) -> Array:
    """-ln p(true class) [N], in nats. A probability of 0 counts as the smallest positive float64."""
    probabilities = np.asarray(probabilities, dtype=np.float64)
    true = probabilities[np.arange(len(probabilities)), np.asarray(references)]
    return -np.log(np.maximum(true, np.finfo(np.float64).tiny))


def cross_entropy(probabilities: Array, references: Array) -> float:
    """Mean of `log_losses`, in nats."""
    return float(log_losses(probabilities, references).mean())


def confusion_matrix(predictions: Array, references: Array, num_labels: int) -> Array:
    """Counts [K, K]: row is the true class, column the predicted one."""
    flat = np.asarray(references) * num_labels + np.asarray(predictions)
    return np.bincount(flat, minlength=num_labels**2).reshape(num_labels, num_labels)


def ratio(a: Array, b: Array) -> Array:
    """a / b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros(np.broadcast(a, b).shape), where=np.asarray(b) > 0)


def precision_recall_f1(confusion: Array) -> dict[str, Array]:
    """Per class [..., K] precision, recall and F1, 0..1, of matrices [..., K, K]; 0 where undefined."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    return shares_of_hits(hits, confusion.sum(axis=-2), confusion.sum(axis=-1))


def shares_of_hits(hits: Array, predicted: Array, actual: Array) -> dict[str, Array]:
    """Precision, recall and F1, 0..1, of counts of any one shape; 0 where undefined."""
    return {
        "precision": ratio(hits, predicted),
        "recall": ratio(hits, actual),
        "f1": ratio(2 * hits, predicted + actual),
    }


def average(per_class: Array, confusion: Array, how: str) -> Array:
    """Mean [...] over the classes in truth or prediction: "macro" counts each once, "weighted" by size."""
    if how not in ("macro", "weighted"):
        raise ValueError(
            f"no average {how!r}; it is macro, weighted, or None for one value a class"
        )
    actual = confusion.sum(axis=-1)
    present = (actual + confusion.sum(axis=-2)) > 0
    weights = present if how == "macro" else actual
    return (per_class * weights).sum(axis=-1) / weights.sum(axis=-1)


def balanced_accuracy(confusion: Array) -> Array:
    """Mean recall [...] of the classes that have images, 0..1, of confusion matrices [..., K, K]."""
    recall, present = precision_recall_f1(confusion)["recall"], confusion.sum(axis=-1) > 0
    return recall.sum(axis=-1) / present.sum(axis=-1)


def matthews(confusion: Array) -> Array:
    """Matthews' correlation [...] of truth and prediction, -1..1, for any number of classes
    (Gorodkin 2004); 0 where either of them is one class alone."""
    confusion = np.asarray(confusion, dtype=np.float64)
    count, hits = confusion.sum(axis=(-2, -1)), np.trace(confusion, axis1=-2, axis2=-1)
    predicted, actual = confusion.sum(axis=-2), confusion.sum(axis=-1)
    covariance = hits * count - (predicted * actual).sum(axis=-1)
    variances = (count**2 - (predicted**2).sum(axis=-1)) * (count**2 - (actual**2).sum(axis=-1))
    return ratio(covariance, np.sqrt(variances))


def figures_of_confusion(confusion: Array) -> dict[str, Array]:
    """Every single figure [...] that confusion matrices [..., K, K] tell, but for the accuracy."""
    per_class = precision_recall_f1(confusion)
    averages = {
        f"{key}_{how}": average(values, confusion, how)
        for key, values in per_class.items()
        for how in ("macro", "weighted")
    }
    return {
        "balanced_accuracy": balanced_accuracy(confusion),
        "matthews": matthews(confusion),
        **averages,
    }


def brier(probabilities: Array, references: Array) -> Array:
    """Squared distance [N] of each image's probabilities from its truth, 0..2; the mean of them is the
    Brier score (Brier 1950)."""
    probabilities, references = np.asarray(probabilities), np.asarray(references)
    true = probabilities[np.arange(len(probabilities)), references]
    return (probabilities**2).sum(axis=1) - 2 * true + 1


def membership(references: Array, num_labels: int) -> Array:
    """Whether each image is of each class, bool [N, K]. references: class ids [N], or 0 and 1 [N, K]."""
    references = np.asarray(references)
    if references.ndim == 2:
        return references.astype(bool)
    return references[:, None] == np.arange(num_labels)


def roc_auc(probabilities: Array, references: Array) -> Array:
    """Area under the ROC curve of each class against the rest [K], 0..1; NaN for a class without images
    (or with nothing else). references: as `membership` takes them."""
    probabilities = np.asarray(probabilities)
    areas = np.full(probabilities.shape[1], np.nan)
    for label, is_label in enumerate(membership(references, len(areas)).T):
        if is_label.any() and not is_label.all():
            areas[label] = sk.roc_auc_score(is_label, probabilities[:, label])
    return areas


def average_precision(probabilities: Array, references: Array) -> Array:
    """Average precision of each class against the rest [K], 0..1; NaN for a class without images.
    references: as `membership` takes them."""
    probabilities = np.asarray(probabilities)
    areas = np.full(probabilities.shape[1], np.nan)
    for label, is_label in enumerate(membership(references, len(areas)).T):
        if is_label.any():
            areas[label] = sk.average_precision_score(is_label, probabilities[:, label])
    return areas


def areas_of_classes(probabilities: Array, references: Array) -> dict[str, Array]:
    """Both areas of each class [K], by name; references: as `membership` takes them."""
    return {
        "roc_auc": roc_auc(probabilities, references),
        "average_precision": average_precision(probabilities, references),
    }


def macro_areas(areas: dict[str, Array]) -> dict[str, float | None]:
    """Mean of each area over the classes where it is defined, as plain values; None if it is nowhere."""
    return {
        f"{name}_macro": None if np.isnan(values).all() else float(values[~np.isnan(values)].mean())
        for name, values in areas.items()
    }


def by_class(
    num_images: Array, figures: dict[str, Array], id2label: dict[int, str]
) -> dict[str, dict[str, float | int | None]]:
    """The images and the figures [K] of each class by its name, as plain values; None for NaN."""
    return {
        name: {
            "num_images": int(num_images[label]),
            **{
                key: None if np.isnan(values[label]) else float(values[label])
                for key, values in figures.items()
            },
        }
        for label, name in id2label.items()
    }


# What a summary or a model card shows of `compute_metrics`.
HEADLINE_FIGURES = ("num_images", "accuracy", "f1_macro", "roc_auc_macro", "cross_entropy", "ece")


def compute_metrics(logits: Array, labels: Array, id2label: dict[int, str]) -> dict[str, Any]:
    """Every figure of a final evaluation, as plain JSON values.

    logits [N, K], labels [N]. Shares and areas are 0..1, `matthews` -1..1, `cross_entropy` in nats, `brier`
    0..2, `ece` by bins of equal width; `per_class` is keyed by class name, `confusion_matrix` rows are true
    classes. None stands for an undefined area.
    """
    probabilities = softmax(logits)
    predictions = probabilities.argmax(axis=1)
    num_labels = len(id2label)
    matrix = confusion_matrix(predictions, labels, num_labels)
    figures: dict[str, Any] = {
        "num_images": len(labels),
        "accuracy": accuracy(predictions, labels),
    }
    if num_labels > 5:
        figures["top_5_accuracy"] = top_k_accuracy(probabilities, labels, k=5)
    figures |= {name: float(value) for name, value in figures_of_confusion(matrix).items()}
    per_class = precision_recall_f1(matrix)
    areas = areas_of_classes(probabilities, labels)
    figures |= macro_areas(areas)
    figures |= {
        "cross_entropy": cross_entropy(probabilities, labels),
        "brier": float(brier(probabilities, labels).mean()),
        "ece": calibration_error(probabilities, labels),
        "ece_equal_mass": calibration_error(probabilities, labels, "equal_mass"),
    }
    figures["per_class"] = by_class(matrix.sum(axis=1), {**per_class, **areas}, id2label)
    figures["confusion_matrix"] = matrix.tolist()
    return figures

"""Every figure of a classifier that gives an image several labels, or none.

Shapes: N images, K classes; `scores` [N, K], 0..1, each class by itself; `labels` [N, K], 0 or 1;
`thresholds` [K], scores from which on a class is given. Names of figures are those of `metrics`, where they
mean the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import expit

from hf_cifar.evaluation.metrics import (
    HEADLINE_FIGURES,
    areas_of_classes,
    average_precision,
    by_class,
    macro_areas,
    membership,
    ratio,
    shares_of_hits,
)

Array = np.ndarray
THRESHOLD = 0.5  # where none was fitted
# What a summary or a model card shows of `multi_label_metrics`.
MULTI_LABEL_HEADLINE = (
    "num_images", "accuracy", "f1_micro", "f1_macro", "average_precision_macro", "cross_entropy",
)  # fmt: skip


def headline(figures: dict[str, Any]) -> tuple[str, ...]:
    """The figures that a summary shows, of those that a split has."""
    return MULTI_LABEL_HEADLINE if "f1_micro" in figures else HEADLINE_FIGURES


def sigmoid(logits: Array) -> Array:
    """Scores [N, K] of logits [N, K], in float64."""
    return expit(np.asarray(logits, dtype=np.float64))


def decide(scores: Array, thresholds: Array | float = THRESHOLD) -> Array:
    """Whether each class is given to each image, bool [N, K]."""
    return scores >= np.asarray(thresholds)


def fit_thresholds(scores: Array, labels: Array) -> Array:
    """The thresholds [K] with the highest F1 of each class: halfway between the two scores that they part.

    Of equals the highest; 0.5 for a class without images.
    """
    thresholds = np.full(scores.shape[1], THRESHOLD)
    for k in np.flatnonzero(np.any(labels, axis=0)):
        order = np.argsort(-scores[:, k], kind="stable")
        ranked = np.append(scores[order, k], 0.0)
        hits = np.cumsum(labels[order, k], dtype=np.int64)
        f1 = 2 * hits / (np.arange(1, len(hits) + 1) + hits[-1])
        f1[:-1][ranked[1:-1] == ranked[:-2]] = 0  # images of one score stay together
        best = f1.argmax()
        thresholds[k] = (ranked[best] + ranked[best + 1]) / 2
    return thresholds


def binary_log_losses(logits: Array, labels: Array) -> Array:
    """Binary cross-entropy [N] of each image, in nats: the mean over the classes."""
    logits = np.asarray(logits, dtype=np.float64)
    return (np.logaddexp(0, logits) - logits * labels).mean(axis=1)


def figures_of_hits(hits: Array, given: Array, actual: Array) -> dict[str, Array]:
    """Averages [...] of precision, recall and F1 of counts [..., K]: "micro" counts all decisions together,
    "macro" the classes in truth or prediction once each, "weighted" each by its size."""
    per_class = shares_of_hits(hits, given, actual)
    micro = shares_of_hits(*(counts.sum(axis=-1) for counts in (hits, given, actual)))
    weights = {"macro": (given + actual) > 0, "weighted": actual}
    return {f"{key}_micro": value for key, value in micro.items()} | {
        f"{key}_{how}": ratio((values * weight).sum(axis=-1), weight.sum(axis=-1))
        for key, values in per_class.items()
        for how, weight in weights.items()
    }


def multi_label_metrics(
    logits: Array, labels: Array, id2label: dict[int, str], thresholds: Array
) -> dict[str, Any]:
    """Every figure of a final evaluation, as plain JSON values.

    logits [N, K]. `accuracy` is the share of images whose labels are all right and none too many;
    `average_precision_macro` is mAP, over the classes that have images; `cross_entropy` is the binary one,
    mean over images and classes, in nats; `per_class` is keyed by class name. None stands for an undefined
    area.
    """
    scores, positive = sigmoid(logits), membership(labels, len(id2label))
    given = decide(scores, thresholds)
    counts = [decisions.sum(axis=0) for decisions in (given & positive, given, positive)]
    areas = areas_of_classes(scores, positive)
    return {
        "num_images": len(labels),
        "accuracy": float((given == positive).all(axis=1).mean()),
        **{name: float(value) for name, value in figures_of_hits(*counts).items()},
        **macro_areas(areas),
        "cross_entropy": float(binary_log_losses(logits, labels).mean()),
        "per_class": by_class(
            counts[2],
            {"threshold": np.asarray(thresholds), **shares_of_hits(*counts), **areas},
            id2label,
        ),
    }


def multi_label_training_metrics(logits: Array, labels: Array) -> dict[str, float]:
    """The figures of every evaluation during training, each class given from a score of 0.5 on."""
    scores, positive = sigmoid(logits), membership(labels, labels.shape[1])
    given = decide(scores)
    counts = [decisions.sum(axis=0) for decisions in (given & positive, given, positive)]
    mean_average_precision = macro_areas({"average_precision": average_precision(scores, positive)})
    return {
        "accuracy": float((given == positive).all(axis=1).mean()),
        "f1_macro": float(figures_of_hits(*counts)["f1_macro"]),
        # No image of any class: no ranking is better than another.
        "average_precision_macro": mean_average_precision["average_precision_macro"] or 0.0,
        "cross_entropy": float(binary_log_losses(logits, labels).mean()),
    }

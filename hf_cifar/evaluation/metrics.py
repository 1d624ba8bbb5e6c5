"""Metrics of counts and rankings, as functions of numpy arrays, for single- and multi-label data.

Shapes: N images, K classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Array = np.ndarray


def ratio(a: Array, b: Array) -> Array:
    """Divide a by b, with 0 where b is 0."""
    return np.divide(a, b, out=np.zeros(np.broadcast(a, b).shape), where=np.asarray(b) > 0)


class Counts(NamedTuple):
    """Numbers of images of each class [..., K]: correctly predicted, predicted, and actual."""

    hits: Array
    predicted: Array
    actual: Array

    @classmethod
    def from_confusion(cls, confusion: Array) -> Counts:
        """Counts from confusion matrices [..., K, K], whose rows are the true classes."""
        hits = np.diagonal(confusion, axis1=-2, axis2=-1)
        return cls(hits, confusion.sum(axis=-2), confusion.sum(axis=-1))


def precision(counts: Counts) -> Array:
    """Share [..., K] of a class's predictions that are correct, 0..1; 0 without predictions."""
    return ratio(counts.hits, counts.predicted)


def recall(counts: Counts) -> Array:
    """Share [..., K] of a class's images that are predicted correctly, 0..1; 0 without images."""
    return ratio(counts.hits, counts.actual)


def f1(counts: Counts) -> Array:
    """Harmonic mean [..., K] of precision and recall, 0..1; 0 without either."""
    return ratio(2 * counts.hits, counts.predicted + counts.actual)


def micro(score: Callable[[Counts], Array], counts: Counts) -> Array:
    """The score [...] of the counts summed over all classes."""
    return score(Counts(*(each.sum(axis=-1) for each in counts)))


def macro(score: Callable[[Counts], Array], counts: Counts) -> Array:
    """Mean score [...] of the classes that have images or predictions, each counted once."""
    return _mean(score(counts), (counts.predicted + counts.actual) > 0)


def weighted(score: Callable[[Counts], Array], counts: Counts) -> Array:
    """Mean score [...] of the classes, each weighted by its images."""
    return _mean(score(counts), counts.actual)


def _mean(values: Array, weights: Array) -> Array:
    return ratio((values * weights).sum(axis=-1), weights.sum(axis=-1))


def balanced_accuracy(counts: Counts) -> Array:
    """Mean recall [...] of the classes that have images, 0..1."""
    return _mean(recall(counts), counts.actual > 0)


def matthews(counts: Counts) -> Array:
    """Matthews correlation [...] of truth and prediction, -1..1, for any number of classes (Gorodkin 2004);
    0 if either of them is a single class."""
    hits, predicted, actual = (np.asarray(each, dtype=np.float64) for each in counts)
    count = actual.sum(axis=-1)
    covariance = hits.sum(axis=-1) * count - (predicted * actual).sum(axis=-1)
    variances = (count**2 - (predicted**2).sum(axis=-1)) * (count**2 - (actual**2).sum(axis=-1))
    return ratio(covariance, np.sqrt(variances))


def roc_auc(scores: Array, positive: Array) -> Array:
    """Area under the ROC curve of each class [K], 0..1; NaN for a class that all images have, or none.

    scores [N, K]. positive [N, K]: True where an image has a class.
    """

    def area(hits: Array, chosen: Array) -> float:
        misses = chosen - hits
        if not (hits[-1] and misses[-1]):
            return np.nan
        width, middle = np.diff(misses, prepend=0), (hits + np.r_[0, hits[:-1]]) / 2
        return float((width * middle).sum() / hits[-1] / misses[-1])

    return _areas(area, scores, positive)


def average_precision(scores: Array, positive: Array) -> Array:
    """Average precision of each class [K], 0..1; NaN for a class without images. Arguments of `roc_auc`."""

    def area(hits: Array, chosen: Array) -> float:
        gained = np.diff(hits, prepend=0)
        return float((gained * hits / chosen).sum() / hits[-1]) if hits[-1] else np.nan

    return _areas(area, scores, positive)


def _areas(area: Callable[[Array, Array], float], scores: Array, positive: Array) -> Array:
    """Apply `area` to each class, with the numbers of hits and of all images at or above each distinct score.

    scikit-learn's functions check their arguments again for each class, which takes most of the time with
    1,000.
    """
    found = np.full(scores.shape[1], np.nan)
    for label in range(scores.shape[1]):
        order = np.argsort(-scores[:, label], kind="stable")
        ranked = scores[order, label]
        last = np.flatnonzero(np.r_[ranked[1:] != ranked[:-1], True])  # of equal scores
        found[label] = area(np.cumsum(positive[order, label])[last], last + 1)
    return found


# Functions of each class's counts; their intervals come from resampled counts.
CLASS_METRICS: dict[str, Callable[[Counts], Array]] = {
    "precision": precision,
    "recall": recall,
    "f1": f1,
}
COUNT_METRICS: dict[str, Callable[[Counts], Array]] = {
    "balanced_accuracy": balanced_accuracy,
    "matthews": matthews,
    **{
        f"{name}_{mean.__name__}": functools.partial(mean, score)
        for name, score in CLASS_METRICS.items()
        for mean in (micro, macro, weighted)
    },
}
# Functions of each class's ranking [K]; `_macro` is the mean over the classes for which they are defined.
AREA_METRICS = {"roc_auc": roc_auc, "average_precision": average_precision}

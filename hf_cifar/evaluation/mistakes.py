"""Mistakes of a classifier, from its predictions: confused pairs, images, slices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_cifar.evaluation.intervals import wilson

Array = np.ndarray


def confused_pairs(
    confusion: Sequence[Sequence[int]] | Array, names: Sequence[str], limit: int = 10
) -> list[dict[str, Any]]:
    """The most frequent mistakes: truth, prediction, num_images, and `share`, 0..1, of the true class.

    confusion [K, K]: rows are true classes. Ties are in class order; pairs without images are left out.
    """
    confusion = np.asarray(confusion)
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:limit]
    pairs = [divmod(int(cell), len(names)) for cell in order]
    return [
        {
            "truth": names[truth],
            "prediction": names[prediction],
            "num_images": int(wrong[truth, prediction]),
            "share": float(wrong[truth, prediction] / confusion[truth].sum()),
        }
        for truth, prediction in pairs
        if wrong[truth, prediction]
    ]


def worst_errors(confidences: Array, hits: Array, limit: int = 24) -> Array:
    """Positions of the wrong predictions, the most confident first. hits [N]: True if correct."""
    wrong = np.flatnonzero(np.logical_not(hits))
    return wrong[np.argsort(-confidences[wrong], kind="stable")][:limit]


def least_confident_hits(confidences: Array, hits: Array, limit: int = 24) -> Array:
    """Positions of the correct predictions, the least confident first. hits [N]: True if correct."""
    correct = np.flatnonzero(hits)
    return correct[np.argsort(confidences[correct], kind="stable")][:limit]


def slices(values: Array, hits: Array, parts: int = 4) -> list[dict[str, Any] | None]:
    """Accuracy in parts of the images, from the lowest values of a property to the highest.

    values, hits [N]: the property, and True if the prediction is correct. The parts have equal numbers of
    images, if no values are equal. Each has low, high (of the property), num_images, accuracy and interval;
    a part that is empty because of equal values is None.
    """
    values, hits = np.asarray(values, np.float64), np.asarray(hits, bool)
    edges = np.quantile(values, np.arange(1, parts) / parts, method="inverted_cdf")
    part_of = np.searchsorted(edges, values, side="left")
    return [_slice(values[part_of == part], hits[part_of == part]) for part in range(parts)]


def _slice(values: Array, hits: Array) -> dict[str, Any] | None:
    if len(values) == 0:
        return None
    return {
        "low": float(values.min()),
        "high": float(values.max()),
        "num_images": len(values),
        "accuracy": float(hits.mean()),
        "interval": wilson(hits.sum(), len(hits)).tolist(),
    }

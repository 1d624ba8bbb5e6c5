"""Metrics of rejection: the share of images that keep their label, and the accuracy on these."""

from __future__ import annotations

from typing import Any

import numpy as np

from hf_cifar.evaluation.intervals import wilson

CURVE_POINTS = 100


def kept_metrics(kept: np.ndarray, correct: np.ndarray) -> dict[str, float | None]:
    """Return the share of images that are kept, and the accuracy on these, which is None if none is kept.

    kept, correct: True or False for each image [N].
    """
    accuracy = float(correct[kept].mean()) if kept.any() else None
    return {"kept": float(kept.mean()), "accuracy_kept": accuracy}


def kept_intervals(kept: np.ndarray, correct: np.ndarray) -> dict[str, Any]:
    """Return the 95% interval [low, high] of each metric of `kept_metrics`, None for an undefined one."""
    number = int(kept.sum())
    return {
        "kept": wilson(number, len(kept)).tolist(),
        "accuracy_kept": wilson(correct[kept].sum(), number).tolist() if number else None,
    }


def risk_coverage(confidences: np.ndarray, correct: np.ndarray) -> list[list[float]]:
    """Return up to `CURVE_POINTS` points [share kept, accuracy on these] of keeping only the most confident
    images, with the smallest share first.

    Source: Geifman and El-Yaniv, Selective Classification for Deep Neural Networks, 2017.
    """
    hits = np.cumsum(correct[np.argsort(-confidences, kind="stable")])
    count = len(hits)
    # The accuracy on fewer images says little.
    numbers = np.unique(np.linspace(max(1, count // 20), count, CURVE_POINTS).astype(int))
    return [[float(number / count), float(hits[number - 1] / number)] for number in numbers]

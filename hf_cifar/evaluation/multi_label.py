"""Every metric of a multi-label classifier, with the interface of `single_label`.

Shapes: N images, K classes; `probabilities` [N, K], 0..1, independent for each class; `labels` [N, K], 0 or
1; `thresholds` [K], the probabilities from which a class is predicted.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import numpy as np
from scipy.special import expit

from hf_cifar.evaluation.metrics import Counts
from hf_cifar.evaluation.outcome import Drawn, Outcome
from hf_cifar.evaluation.resampling import draw_images

Array = np.ndarray
THRESHOLD = 0.5  # unless fitted


def fit_thresholds(probabilities: Array, labels: Array) -> Array:
    """Fit the thresholds [K] that maximise the F1 of each class, halfway between neighbouring probabilities.

    Ties go to the highest threshold; a class without images gets 0.5.
    """
    thresholds = np.full(probabilities.shape[1], THRESHOLD)
    for k in np.flatnonzero(np.any(labels, axis=0)):
        order = np.argsort(-probabilities[:, k], kind="stable")
        ranked = np.append(probabilities[order, k], 0.0)
        hits = np.cumsum(labels[order, k], dtype=np.int64)
        scores = 2 * hits / (np.arange(1, len(hits) + 1) + hits[-1])
        scores[:-1][ranked[1:-1] == ranked[:-2]] = 0  # no threshold separates equal probabilities
        best = scores.argmax()
        thresholds[k] = (ranked[best] + ranked[best + 1]) / 2
    return thresholds


def binary_log_losses(logits: Array, labels: Array) -> Array:
    """Binary cross-entropy [N] of each image, in nats: the mean over the classes."""
    logits = np.asarray(logits, dtype=np.float64)
    return (np.logaddexp(0, logits) - logits * labels).mean(axis=1)


class MultiLabel(Outcome):
    """Logits and labels [N, K] of multi-label data; thresholds [K], 0.5 if not given."""

    multi_label = True
    calibration_metric = "f1_macro"  # which calibration improves
    shares: ClassVar = {"accuracy": lambda self: self.correct}
    means: ClassVar = {"cross_entropy": lambda self: binary_log_losses(self.logits, self.labels)}

    thresholds: Array

    def __init__(self, logits: Array, labels: Array, *, thresholds: Array | None = None) -> None:
        self.logits, self.labels = np.asarray(logits), np.asarray(labels)
        default = np.full(self.logits.shape[1], THRESHOLD)
        self.thresholds = default if thresholds is None else np.asarray(thresholds)

    @functools.cached_property
    def probabilities(self) -> Array:
        """Independent probability of each class [N, K], 0..1."""
        return expit(self.logits.astype(np.float64))

    @functools.cached_property
    def predicted(self) -> Array:
        """True where a class is predicted for an image [N, K]."""
        return self.probabilities >= self.thresholds

    @property
    def correct(self) -> Array:
        """True for each image [N] whose prediction has all of its labels and no others."""
        return (self.predicted == self.labels).all(axis=1)

    def probabilities_of(self, labels: Array) -> Array:
        """Probability [N], 0..1, of exactly these classes [N, K], taken as independent."""
        return np.where(labels, self.probabilities, 1 - self.probabilities).prod(axis=1)

    @functools.cached_property
    def positive(self) -> Array:
        """True where an image has a class [N, K]."""
        return self.labels.astype(bool)

    @functools.cached_property
    def counts(self) -> Counts:
        """Images of each class [K]."""
        return Counts(*(each.sum(axis=0) for each in self._decisions))

    @property
    def _decisions(self) -> tuple[Array, Array, Array]:
        """True where a class is correctly predicted, predicted, and actual, [N, K] each."""
        return self.predicted & self.positive, self.predicted, self.positive

    def calibrate(self) -> dict[str, Any]:
        """Fit thresholds to the labels."""
        return {"thresholds": fit_thresholds(self.probabilities, self.labels)}

    def _class_settings(self) -> dict[str, Array]:
        return {"threshold": self.thresholds}

    def draw(self, draws: int, generator: np.random.Generator) -> Drawn:
        """Draw the bootstrap, see `Outcome.draw`. The thresholds are fixed."""
        per_image = np.column_stack(
            [*(values(self) for values in self.means.values()), *self._decisions]
        )
        drawn, areas = draw_images(self.probabilities, self.positive, per_image, draws, generator)
        means, decisions = np.split(drawn, [len(self.means)], axis=1)
        return Drawn(Counts(*np.split(decisions, 3, axis=1)), means, areas, intervals={})

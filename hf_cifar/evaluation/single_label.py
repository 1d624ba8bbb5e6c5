"""Every metric of a single-label classifier, with the interface of `multi_label`.

Shapes: N images, K classes; `probabilities` [N, K] with rows that sum to 1, `labels` [N] class ids.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
from scipy.special import softmax

from hf_cifar.config.metrics import UNCALIBRATED
from hf_cifar.evaluation.calibration import calibration_error, fit_temperature
from hf_cifar.evaluation.intervals import calibration_interval
from hf_cifar.evaluation.metrics import Counts
from hf_cifar.evaluation.outcome import Drawn, Outcome
from hf_cifar.evaluation.resampling import draw_counts, draw_images

Array = np.ndarray
CALIBRATION_ERRORS = {"ece": "equal_width", "ece_equal_mass": "equal_mass"}  # by their bins


def top_k_hits(probabilities: Array, labels: Array, k: int = 5) -> Array:
    """True for each image [N] whose class is among the k most probable; ties go to the lower class id."""
    top = np.argsort(-np.asarray(probabilities), axis=1, kind="stable")[:, :k]
    return (top == np.asarray(labels)[:, None]).any(axis=1)


def log_losses(probabilities: Array, labels: Array) -> Array:
    """-ln p(true class) [N], in nats. A probability of 0 counts as the smallest positive float64."""
    probabilities = np.asarray(probabilities, dtype=np.float64)
    true = probabilities[np.arange(len(probabilities)), np.asarray(labels)]
    return -np.log(np.maximum(true, np.finfo(np.float64).tiny))


def brier(probabilities: Array, labels: Array) -> Array:
    """Squared distance [N], 0..2, between each image's probabilities and its one-hot label; their mean is the
    Brier score (Brier 1950)."""
    probabilities, labels = np.asarray(probabilities), np.asarray(labels)
    true = probabilities[np.arange(len(probabilities)), labels]
    return (probabilities**2).sum(axis=1) - 2 * true + 1


def confusion_matrix(predicted: Array, labels: Array, num_labels: int) -> Array:
    """Count images by true class (row) and predicted class (column), [K, K]."""
    flat = np.asarray(labels) * num_labels + np.asarray(predicted)
    return np.bincount(flat, minlength=num_labels**2).reshape(num_labels, num_labels)


def _error_over(bins: str) -> Callable[[SingleLabel], float]:
    return lambda outcome: calibration_error(outcome.probabilities, outcome.labels, bins)


class SingleLabel(Outcome):
    """Logits [N, K] and labels [N] of images with one label each.

    temperature: the number by which calibration has divided the logits, 1 for none.
    """

    multi_label = False
    calibration_metric = "ece"  # which calibration improves
    shares: ClassVar = {
        "accuracy": lambda self: self.correct,
        "top_5_accuracy": lambda self: top_k_hits(self.probabilities, self.labels, k=5),
    }
    means: ClassVar = {
        "cross_entropy": lambda self: log_losses(self.probabilities, self.labels),
        "brier": lambda self: brier(self.probabilities, self.labels),
    }
    others: ClassVar = {name: _error_over(bins) for name, bins in CALIBRATION_ERRORS.items()}

    def __init__(self, logits: Array, labels: Array, *, temperature: float = 1.0) -> None:
        self.logits, self.labels = np.asarray(logits), np.asarray(labels)
        self.temperature = temperature

    @functools.cached_property
    def probabilities(self) -> Array:
        """Probability of each class [N, K], 0..1, in rows that sum to 1."""
        return softmax(self.logits.astype(np.float64), axis=1)

    @functools.cached_property
    def predicted(self) -> Array:
        """The most likely class [N] of each image."""
        return self.logits.argmax(axis=1)

    @property
    def correct(self) -> Array:
        """True for each image [N] whose predicted class is its label."""
        return self.predicted == self.labels

    def probabilities_of(self, labels: Array) -> Array:
        """Probability [N], 0..1, of one class [N] for each image."""
        return self.probabilities[np.arange(len(labels)), labels]

    @functools.cached_property
    def positive(self) -> Array:
        """True where an image is of a class [N, K]."""
        return self.labels[:, None] == np.arange(self.logits.shape[1])

    @functools.cached_property
    def confusion(self) -> Array:
        """The confusion matrix [K, K]."""
        return confusion_matrix(self.predicted, self.labels, self.logits.shape[1])

    @functools.cached_property
    def counts(self) -> Counts:
        """Images of each class [K]."""
        return Counts.from_confusion(self.confusion)

    def calibrate(self) -> dict[str, Any]:
        """Fit a temperature to the labels, and divide the logits by it."""
        temperature = fit_temperature(self.logits, self.labels)
        return {
            "logits": (self.logits / temperature).astype(np.float32),
            "temperature": temperature,
        }

    def compute(self, id2label: Mapping[int, str]) -> dict[str, Any]:
        """Compute every metric, and `confusion_matrix`, whose rows are the true classes; with a temperature,
        also two metrics without it."""
        metrics = super().compute(id2label) | {"confusion_matrix": self.confusion.tolist()}
        if self.temperature == 1:
            return metrics
        before = SingleLabel(self.logits * self.temperature, self.labels)
        return metrics | {
            "temperature": self.temperature,
            **{f"{name}{UNCALIBRATED}": before.metric(name) for name in ("cross_entropy", "ece")},
        }

    def draw(self, draws: int, generator: np.random.Generator) -> Drawn:
        """Draw the bootstrap, see `Outcome.draw`."""
        counts = draw_counts(self.confusion, draws, generator)
        intervals = {
            name: calibration_interval(self.probabilities, self.labels, bins, draws, generator)
            for name, bins in CALIBRATION_ERRORS.items()
        }
        per_image = np.stack([values(self) for values in self.means.values()], axis=1)
        means, areas = draw_images(self.probabilities, self.positive, per_image, draws, generator)
        return Drawn(counts, means, areas, intervals)

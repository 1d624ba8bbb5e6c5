"""Calibration: the gap between confidence and accuracy, and the temperature that closes it."""

from __future__ import annotations

import numpy as np
from scipy import optimize
from scipy.special import log_softmax

Array = np.ndarray
NUM_BINS = 15  # as in Guo et al. 2017
SPREAD = 0.5  # prior standard deviation of the logarithm of the temperature


def confidence_bins(confidences: Array, how: str = "equal_width", bins: int = NUM_BINS) -> Array:
    """Assign each confidence [N], 0..1, to a bin [N], 0..bins - 1.

    how: "equal_width" cuts 0..1 into intervals of equal length, closed above; "equal_mass" puts the same
    number of images into each bin, if no confidences are equal.
    """
    confidences = np.asarray(confidences, dtype=np.float64)
    if how == "equal_width":
        edges = np.linspace(0, 1, bins + 1)[1:-1]
    elif how == "equal_mass":
        edges = np.quantile(confidences, np.arange(1, bins) / bins, method="inverted_cdf")
    else:
        raise ValueError(f"no bins {how!r}; use equal_width or equal_mass")
    return np.searchsorted(edges, confidences, side="left")


def calibration_error(
    probabilities: Array, references: Array, how: str = "equal_width", bins: int = NUM_BINS
) -> float:
    """Expected calibration error, 0..1: the mean distance between confidence and accuracy over bins of
    confidence (Naeini et al. 2015, Guo et al. 2017). It is biased upwards, more so with fewer images."""
    table = reliability(probabilities, references, how, bins)
    return float(np.abs(table["hits"] - table["confidence"]).sum() / table["num_images"].sum())


def reliability(
    probabilities: Array, references: Array, how: str = "equal_width", bins: int = NUM_BINS
) -> dict[str, Array]:
    """Sums by bin [bins] for a reliability diagram: num_images, hits, confidence."""
    confidences, hits = confidences_and_hits(probabilities, references)
    bin_of = confidence_bins(confidences, how, bins)
    sums = {"num_images": np.ones_like(confidences), "hits": hits, "confidence": confidences}
    return {name: np.bincount(bin_of, values, minlength=bins) for name, values in sums.items()}


def confidences_and_hits(probabilities: Array, references: Array) -> tuple[Array, Array]:
    """The highest probability [N] of each image, and 1 if it is that of the true class, else 0 [N]."""
    probabilities = np.asarray(probabilities, dtype=np.float64)
    hits = probabilities.argmax(axis=1) == np.asarray(references)
    return probabilities.max(axis=1), hits.astype(np.float64)


def fit_temperature(logits: Array, labels: Array) -> float:
    """Fit the divisor of logits [N, K] that minimises the cross-entropy on labels [N] (Guo et al. 2017).

    It is above 1 for an overconfident model. With few images, or no wrong predictions, the labels do not
    determine it. So it is the most probable value under a prior against temperatures far from 1, see
    `SPREAD`. Hundreds of images with some wrong predictions outweigh the prior.
    """
    logits = np.asarray(logits, dtype=np.float64)
    rows = np.arange(len(logits))

    def loss(log_temperature: float) -> float:
        log_probabilities = log_softmax(logits / np.exp(log_temperature), axis=1)
        return (log_temperature / SPREAD) ** 2 / 2 - log_probabilities[rows, labels].sum()

    bounds = np.log([1e-2, 1e2])
    return float(np.exp(optimize.minimize_scalar(loss, bounds=bounds, method="bounded").x))

"""Estimate the accuracy on images without labels, from a model's probabilities."""

from __future__ import annotations

import numpy as np
from scipy.special import xlogy

from hf_cifar.evaluation.intervals import equal_tailed

Array = np.ndarray
DRAWS = 1000


def estimated_accuracy(
    probabilities: Array, correct: Array, new: Array, draws: int = DRAWS, seed: int = 0
) -> tuple[float, Array]:
    """Estimate the accuracy on new images, 0..1, with its bootstrapped 95% interval [2].

    probabilities [N, K] and correct [N] of labelled images; probabilities `new` [M, K]. The estimate is the
    share of new images whose negative entropy reaches a threshold, chosen so that the share of labelled
    images that reach it is their accuracy: average thresholded confidence (Garg et al. 2022). It assumes
    images of the same classes; the interval only covers the sampling of the images.
    """
    known, others = _negative_entropies(probabilities), _negative_entropies(new)
    generator = np.random.default_rng(seed)

    def estimate(known: Array, correct: Array, others: Array) -> float:
        if not correct.any():
            return 0.0
        threshold = np.sort(known)[len(known) - int(correct.sum())]
        return float((others >= threshold).mean())

    drawn = []
    for _ in range(draws):
        rows = generator.integers(0, len(known), len(known))
        sample = others[generator.integers(0, len(others), len(others))]
        drawn.append(estimate(known[rows], correct[rows], sample))
    return estimate(known, correct, others), equal_tailed(np.array(drawn))


def _negative_entropies(probabilities: Array) -> Array:
    return xlogy(probabilities, probabilities).sum(axis=1)

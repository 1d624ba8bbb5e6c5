"""hf_cifar.evaluation.label_free: the accuracy on images without labels."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax

from hf_cifar.evaluation.label_free import estimated_accuracy


def predicted(count, strength, seed):
    """Probabilities of a calibrated classifier of 5 classes, and which predictions are correct."""
    generator = np.random.default_rng(seed)
    probabilities = softmax(strength * generator.normal(size=(count, 5)), axis=1)
    drawn = (probabilities.cumsum(axis=1) < generator.random((count, 1))).sum(axis=1)
    return probabilities, probabilities.argmax(axis=1) == drawn


def test_on_the_same_images_it_is_the_accuracy():
    probabilities, correct = predicted(500, 2, seed=0)
    found, (low, high) = estimated_accuracy(probabilities, correct, probabilities)
    assert found == correct.mean() and low < found < high


def test_computed_by_hand():
    """Two of four are correct, so the second highest confidence, 0.8, is the threshold."""

    def binary(confidences):
        return np.array([[each, 1 - each] for each in confidences])

    correct = np.array([True, False, True, False])
    found, _ = estimated_accuracy(binary([0.6, 0.9, 0.8, 0.7]), correct, binary([0.75, 0.85, 0.95]))
    assert found == pytest.approx(2 / 3)


def test_the_interval_covers_another_sample():
    probabilities, correct = predicted(800, 2, seed=0)
    covered = 0
    for seed in range(1, 21):
        new, truth = predicted(800, 2, seed)
        _, (low, high) = estimated_accuracy(probabilities, correct, new, draws=200)
        covered += low <= truth.mean() <= high
    assert covered >= 17


def test_no_correct_prediction_is_an_estimate_of_zero():
    probabilities, _ = predicted(50, 2, seed=0)
    found, interval = estimated_accuracy(probabilities, np.zeros(50, bool), probabilities)
    assert found == 0 and interval.tolist() == [0, 0]


def test_certain_predictions_have_no_entropy():
    certain = np.eye(5)[[0, 1, 2, 3]]
    assert estimated_accuracy(certain, np.ones(4, bool), certain)[0] == 1

"""hf_cifar.evaluation.calibration: confidence against accuracy."""

import numpy as np
import pytest
from scipy.special import softmax

from hf_cifar.evaluation.calibration import (
    calibration_error,
    confidence_bins,
    fit_temperature,
    reliability,
)
from hf_cifar.evaluation.single_label import log_losses


def draw(count=500, num_labels=4):
    generator = np.random.default_rng(3)
    labels = generator.integers(0, num_labels, count)
    logits = 2 * generator.normal(size=(count, num_labels)) + 2 * np.eye(4)[labels]
    return softmax(logits, axis=1), labels


@pytest.mark.parametrize("bins", [10, 15])
def test_error_equals_a_loop_over_bins(bins):
    probabilities, labels = draw()
    confidences, predictions = probabilities.max(axis=1), probabilities.argmax(axis=1)
    expected = 0.0
    for number in range(bins):
        inside = (confidences > number / bins) & (confidences <= (number + 1) / bins)
        if inside.any():
            gap = (predictions == labels)[inside].mean() - confidences[inside].mean()
            expected += inside.mean() * abs(gap)
    found = calibration_error(probabilities, labels, bins=bins)
    assert found == pytest.approx(expected, rel=0, abs=1e-12)


def test_error_of_bins_of_equal_mass_equals_a_loop_over_sorted_parts():
    probabilities, labels = draw(count=480)
    order = probabilities.max(axis=1).argsort()
    hits = (probabilities.argmax(axis=1) == labels)[order].reshape(15, 32)
    confidences = probabilities.max(axis=1)[order].reshape(15, 32)
    expected = np.abs(hits.mean(axis=1) - confidences.mean(axis=1)).mean()
    found = calibration_error(probabilities, labels, "equal_mass")
    assert found == pytest.approx(expected, rel=0, abs=1e-12)


def test_calibration_error_of_known_cases():
    sure = np.array([[1.0, 0.0]] * 4)
    assert calibration_error(sure, [0, 0, 0, 0]) == 0
    assert calibration_error(sure, [0, 0, 1, 1]) == 0.5
    half_sure = np.array([[0.75, 0.25]] * 4)
    assert calibration_error(half_sure, [0, 0, 0, 1]) == 0


def test_bins_are_closed_above_and_cover_everything():
    edges = np.array([0.0, 0.1, 0.100001, 0.2, 0.95, 1.0])
    np.testing.assert_array_equal(confidence_bins(edges, bins=10), [0, 0, 1, 1, 9, 9])
    with pytest.raises(ValueError, match="no bins 'round'"):
        confidence_bins(edges, "round")


@pytest.mark.parametrize("how", ["equal_width", "equal_mass"])
def test_reliability_counts_every_image_once(how):
    probabilities, labels = draw()
    table = reliability(probabilities, labels, how)
    assert table["num_images"].sum() == len(labels)
    assert table["hits"].sum() == (probabilities.argmax(axis=1) == labels).sum()
    assert table["confidence"].sum() == pytest.approx(probabilities.max(axis=1).sum())
    if how == "equal_mass":
        assert np.ptp(table["num_images"]) <= 1


def test_equal_confidences_share_a_bin():
    probabilities = np.array([[0.9, 0.1]] * 30)
    assert reliability(probabilities, np.zeros(30, int), "equal_mass")["num_images"].max() == 30


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_a_planted_temperature_is_found(temperature):
    generator = np.random.default_rng(0)
    logits = 2 * generator.normal(size=(20_000, 5))
    labels = np.array([generator.choice(5, p=p) for p in softmax(logits, axis=1)])
    assert fit_temperature(temperature * logits, labels) == pytest.approx(temperature, rel=0.03)


def test_the_temperature_has_the_lowest_cross_entropy():
    generator = np.random.default_rng(1)
    labels = generator.integers(0, 4, 5000)
    logits = 3 * generator.normal(size=(5000, 4)) + 2 * np.eye(4)[labels]
    best = fit_temperature(logits, labels)
    losses = [
        log_losses(softmax(logits / (best * k), axis=1), labels).mean() for k in (0.99, 1, 1.01)
    ]
    assert losses[1] == min(losses)
    before, after = (calibration_error(softmax(z, axis=1), labels) for z in (logits, logits / best))
    assert after < before / 2


def test_temperature_of_all_correct_or_all_wrong_predictions_is_finite():
    logits, labels = 2 * np.eye(3), np.arange(3)
    assert 0.5 < fit_temperature(logits, labels) < 1
    assert 1 < fit_temperature(logits, (labels + 1) % 3) < 3
    many = np.repeat(logits, 1000, axis=0), np.repeat(labels, 1000)
    assert 0.05 < fit_temperature(*many) < 0.5

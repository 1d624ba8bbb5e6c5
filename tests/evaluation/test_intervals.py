"""hf_cifar.evaluation.intervals: 95% intervals contain the true value in 95% of samples."""

import numpy as np
import pytest
from scipy import stats
from scipy.special import softmax
from sklearn import metrics as sk

from hf_cifar.evaluation.intervals import (
    calibration_interval,
    mcnemar,
    mean_interval,
    paired_difference,
    wilson,
)
from hf_cifar.evaluation.predictions import compute_metrics, metric_intervals
from hf_cifar.evaluation.resampling import _Ranking

NAMES = {0: "cat", 1: "dog", 2: "frog"}


def draw(count, generator, num_labels=3):
    """Logits [N, K] and labels [N] of a model with an accuracy of about 80%."""
    labels = generator.choice(
        num_labels, count, p=np.arange(1, num_labels + 1) / sum(range(num_labels + 1))
    )
    return generator.normal(size=(count, num_labels)) + 1.8 * np.eye(num_labels)[labels], labels


def test_wilson_equals_scipy():
    for hits, count in ((0, 7), (3, 7), (7, 7), (450, 5000)):
        expected = stats.binomtest(hits, count).proportion_ci(0.95, method="wilson")
        np.testing.assert_allclose(wilson(hits, count), expected, atol=1e-9, rtol=0)


def test_wilson_without_images_is_undefined():
    assert np.isnan(wilson([0, 1], [0, 2])[0]).all()


@pytest.mark.parametrize("share", [0.02, 0.5, 0.89])
def test_wilson_has_its_nominal_coverage(share):
    hits = np.random.default_rng(0).binomial(1000, share, 1000)
    low, high = wilson(hits, 1000).T
    assert 0.93 <= ((low <= share) & (share <= high)).mean() <= 0.97


@pytest.mark.slow
def test_bootstrap_intervals_have_their_nominal_coverage():
    generator = np.random.default_rng(1)
    truth = compute_metrics(*draw(200_000, generator), NAMES)
    keys = [
        "balanced_accuracy", "matthews", "f1_macro", "precision_weighted", "cross_entropy", "brier",
        "roc_auc_macro", "average_precision_macro",
    ]  # fmt: skip
    covered = dict.fromkeys(keys, 0)
    for _ in range(1000):
        found = metric_intervals(*draw(300, generator), NAMES, draws=119)
        for key in keys:
            covered[key] += found[key][0] <= truth[key] <= found[key][1]
    assert all(930 <= count <= 970 for count in covered.values()), covered


@pytest.mark.parametrize("power", [1.0, 1.3, 2.0])
def test_calibration_interval_has_its_nominal_coverage(power):
    """power: the accuracy at confidence c is c ** power; 1 is a perfectly calibrated model."""
    generator = np.random.default_rng(2)

    def sample(count):
        confidences = 0.5 + generator.beta(4, 1, count) / 2
        labels = (generator.random(count) >= confidences**power).astype(int)
        return np.stack([confidences, 1 - confidences], axis=1), labels

    probabilities, _ = sample(500_000)
    confidences = probabilities.max(axis=1)
    truth = np.abs(confidences - confidences**power).mean()  # gaps of one sign: bins do not matter
    covered = 0
    for _ in range(300):
        low, high = calibration_interval(*sample(400), "equal_width", 200, generator)
        covered += low <= truth <= high
    assert covered >= 0.93 * 300


@pytest.mark.parametrize("ties", [False, True])
def test_areas_of_resampled_images_equal_sklearn(ties):
    generator = np.random.default_rng(4)
    logits, labels = draw(200, generator)
    scores = np.round(softmax(logits, axis=1)[:, 1], 1 if ties else 15)
    counts = generator.multinomial(200, np.full(200, 1 / 200), size=5).T.astype(np.float32)
    roc, ap = _Ranking(scores, labels == 1).areas(counts)
    for number in range(5):
        rows = np.repeat(np.arange(200), counts[:, number].astype(int))
        expected = sk.roc_auc_score(labels[rows] == 1, scores[rows])
        assert roc[number] == pytest.approx(expected, abs=1e-5)
        expected = sk.average_precision_score(labels[rows] == 1, scores[rows])
        assert ap[number] == pytest.approx(expected, abs=1e-5)


def test_every_metric_is_in_its_interval():
    logits, labels = draw(400, np.random.default_rng(5), num_labels=7)
    names = {i: f"class {i}" for i in range(7)}
    metrics = compute_metrics(logits, labels, names)
    intervals = metric_intervals(logits, labels, names)
    single = {k for k, v in metrics.items() if isinstance(v, float)}
    assert set(intervals) == single | {"per_class"}
    for key in single:
        low, high = intervals[key]
        assert low <= metrics[key] <= high and high - low < 0.5, key
    for name, values in metrics["per_class"].items():
        assert set(intervals["per_class"][name]) == set(values) - {"num_images"}
        for key, (low, high) in intervals["per_class"][name].items():
            assert low <= values[key] <= high, (name, key)


def test_the_same_predictions_give_the_same_intervals():
    logits, labels = draw(100, np.random.default_rng(6))
    first, second = (metric_intervals(logits, labels, NAMES, draws=50) for _ in range(2))
    assert first == second
    assert first != metric_intervals(logits, labels, NAMES, draws=50, seed=1)


def test_an_undefined_metric_has_no_interval():
    logits, labels = draw(50, np.random.default_rng(7), num_labels=2)
    labels[:] = 0
    logits[:, 0] = 9
    found = metric_intervals(np.c_[logits, np.full(50, -9)], labels, NAMES, draws=20)
    assert found["per_class"]["frog"]["recall"] is None
    assert found["per_class"]["cat"]["roc_auc"] is None and found["roc_auc_macro"] is None
    assert found["accuracy"][1] == 1.0


def test_mcnemar_is_the_binomial_test():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(1, 9) == pytest.approx(2 * 11 / 2**10, abs=1e-9)
    assert mcnemar(9, 1) == mcnemar(1, 9)


def test_paired_difference_has_its_nominal_coverage():
    generator = np.random.default_rng(8)
    outcomes = generator.multinomial(500, [0.8, 0.08, 0.05, 0.07], size=1000)
    covered = 0
    for _, only_first, only_second, _ in outcomes:
        low, high = paired_difference(only_first, only_second, 500)
        covered += low <= -0.03 <= high
    assert 930 <= covered <= 970


def test_paired_difference_of_classes_has_its_nominal_coverage():
    """Three classes of different sizes, whose differences are -0.03, 0.2 and 0.1."""
    generator = np.random.default_rng(9)
    shares = ([0.8, 0.08, 0.05, 0.07], [0.5, 0.1, 0.3, 0.1], [0.6, 0.1, 0.2, 0.1])
    counts = [400, 60, 20]
    drawn = np.stack(
        [generator.multinomial(n, p, size=1000) for n, p in zip(counts, shares, strict=True)],
        axis=1,
    )
    ends = [paired_difference(each[:, 1], each[:, 2], counts) for each in drawn]
    covered = sum(low <= 0.09 <= high for low, high in ends)
    assert 930 <= covered <= 975


def test_interval_of_a_mean_equals_scipy():
    values = [0.91, 0.93, 0.90, 0.94, 0.915]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    np.testing.assert_allclose(mean_interval(values), expected, rtol=1e-12)
    assert mean_interval([0.5, 0.5]).tolist() == [0.5, 0.5]

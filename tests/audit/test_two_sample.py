"""hf_cifar.audit.two_sample: Kolmogorov-Smirnov, and the maximum mean discrepancy with permutations."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy.stats import binom, ks_2samp

from hf_cifar.audit.two_sample import (
    discrepancies,
    gaussian_kernel,
    ks_test,
    mmd_test,
    neighbour_distances,
    whitened,
)

DRAW = np.random.default_rng


@pytest.mark.parametrize(("n", "m"), [(10, 10), (30, 25), (20, 144), (144, 20), (400, 150)])
def test_kolmogorov_smirnov_is_that_of_scipy(n, m):
    generator = DRAW(n + m)
    reference = generator.normal(size=(n, 4))
    new = generator.normal(np.array([0, 0.1, 0.5, 3]), size=(m, 4))
    statistics, p_values = ks_test(reference, new)
    for k in range(4):
        expected = ks_2samp(reference[:, k], new[:, k], method="exact")
        assert statistics[k] == pytest.approx(expected.statistic)
        assert p_values[k] == pytest.approx(expected.pvalue, rel=1e-9, abs=1e-12)


def test_ties_are_as_in_scipy():
    generator = DRAW(0)
    reference, new = generator.integers(0, 3, (60, 2)), generator.integers(0, 4, (40, 2))
    statistics, p_values = ks_test(reference, new)
    for k in range(2):
        expected = ks_2samp(reference[:, k], new[:, k], method="exact")
        assert (statistics[k], p_values[k]) == pytest.approx((expected.statistic, expected.pvalue))
    same = np.ones((30, 1))
    assert [each.tolist() for each in ks_test(same, same)] == [[0.0], [1.0]]


def test_the_discrepancy_computed_by_hand():
    """Points 0, 1 and 3, 3: the median of 1, 3, 3, 2, 2, 0 is 2."""
    kernel, bandwidth = gaussian_kernel(np.array([[0.0], [1.0], [3.0], [3.0]]))
    assert bandwidth == 2
    near, far, middle = np.exp(-1 / 8), np.exp(-9 / 8), np.exp(-4 / 8)
    expected = near + 1 - 2 * (2 * far + 2 * middle) / 4
    first = np.array([1, 1, 0, 0])[:, None]
    assert discrepancies(kernel, first) == pytest.approx([expected])


def test_discrepancies_are_those_of_a_loop():
    points = DRAW(1).normal(size=(9, 3))
    kernel, bandwidth = gaussian_kernel(points)

    def similar(i, j):
        return np.exp(-((points[i] - points[j]) ** 2).sum() / (2 * bandwidth**2))

    def loop(first):
        second = [i for i in range(9) if i not in first]
        within = [
            np.mean([similar(i, j) for i in part for j in part if i != j])
            for part in (first, second)
        ]
        return sum(within) - 2 * np.mean([similar(i, j) for i in first for j in second])

    divisions = [[0, 1, 2, 3], [8, 2, 5, 1]]
    columns = np.array([[i in first for first in divisions] for i in range(9)])
    assert discrepancies(kernel, columns) == pytest.approx([loop(first) for first in divisions])


def test_the_p_value_is_the_share_of_all_divisions():
    generator = DRAW(3)
    reference, new = generator.normal(size=(5, 1)), generator.normal(0.8, size=(4, 1))
    kernel, _ = gaussian_kernel(whitened(np.concatenate([reference, new])))
    every = np.array(
        [[i in first for i in range(9)] for first in combinations(range(9), 5)], dtype=float
    ).T
    found = discrepancies(kernel, every)
    exact = (found >= found[0] - 1e-12).mean()  # the first division is the given one
    result = mmd_test(reference, new, 0.001, seed=0)
    assert result.permutations == 10_000
    assert result.squared == pytest.approx(found[0])
    assert result.p == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 10_000))
    assert mmd_test(reference, new, 0.001, seed=0) == result


def test_false_alarms_are_as_rare_as_requested():
    """Features of which few directions vary much, as those of a classifier."""
    scales, hits = np.geomspace(10, 0.01, 30), 0
    for seed in range(120):
        features = DRAW(seed).normal(size=(70, 30)) * scales
        hits += mmd_test(features[:40], features[40:], 0.1, seed).p <= 0.1
    assert binom.cdf(hits, 120, 0.1) > 0.001 and binom.sf(hits - 1, 120, 0.1) > 0.001


def test_a_small_shift_in_a_quiet_direction_is_found():
    generator = DRAW(0)
    reference, new = generator.normal(size=(300, 20)), generator.normal(size=(200, 20))
    new[:, -1] += 1
    for features in (reference, new):
        features[:, :10] *= 100
    assert mmd_test(reference, new, 0.025, seed=0).p == pytest.approx(0.002)


def test_whitened_features():
    features = DRAW(0).normal(size=(500, 6)) @ DRAW(1).normal(size=(6, 6)) + 5
    components = whitened(features)
    assert np.cov(components.T, bias=True) == pytest.approx(np.eye(6), abs=1e-9)
    # Wide features with the same products give the same components, up to the sign.
    wide = np.concatenate([features, np.zeros((500, 600))], axis=1)
    same = whitened(wide)[:, -6:]
    assert np.abs(same) == pytest.approx(np.abs(components), abs=1e-6)
    assert whitened(features[:40]).shape == (40, 4)  # ten images for each
    assert whitened(np.ones((40, 3))).shape == (40, 0)
    assert mmd_test(np.ones((20, 3)), np.ones((20, 3)), 0.025, seed=0).p == 1


@pytest.mark.parametrize("k", [1, 3, 50])
def test_neighbour_distances_are_those_of_a_loop(k):
    images, reference = DRAW(0).normal(size=(7, 5)), DRAW(1).normal(size=(20, 5))
    expected = [
        sorted(np.linalg.norm(image - each) for each in reference)[min(k, 20) - 1]
        for image in images
    ]
    assert neighbour_distances(images, reference, k) == pytest.approx(expected)
    own = neighbour_distances(reference, reference, k, same=True)
    others = sorted(np.linalg.norm(reference[0] - each) for each in reference[1:])
    assert own[0] == pytest.approx(others[min(k, 19) - 1])

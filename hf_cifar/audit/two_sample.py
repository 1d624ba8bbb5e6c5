"""Two-sample tests: could two sets of images come from the same distribution?

Kolmogorov-Smirnov on each column of a model's outputs (black-box shift detection, Lipton et al. 2018,
Rabanser et al. 2019), and the maximum mean discrepancy (MMD) of feature vectors, with a permutation test
(Gretton et al. 2012). Both assume that the images of a sample are drawn independently.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy.linalg import eigh

Array = np.ndarray
PERMUTATIONS = 499  # and more if the level is so low that these could not reach it
AT_ONCE = 250  # permutations in memory
# Largest number of principal components of the features, and images needed for each of them.
COMPONENTS, IMAGES_EACH = 128, 10


class Discrepancy(NamedTuple):
    """MMD of two samples. squared: unbiased estimate of its square, which may be negative. components: number
    of principal components of the features. bandwidth: of the kernel, a distance."""

    squared: float
    p: float
    components: int
    bandwidth: float
    permutations: int


def ks_test(reference: Array, new: Array) -> tuple[Array, Array]:
    """Compare each column of [N, K] and [M, K]; return statistics [K] and two-sided p-values [K].

    The p-values are exact without ties, and conservative with ties.
    """
    statistics = np.array([_largest_gap(a, b) for a, b in zip(reference.T, new.T, strict=True)])
    found = {gap: _tail(gap, len(reference), len(new)) for gap in set(statistics.tolist())}
    return statistics, np.array([found[gap] for gap in statistics.tolist()])


def _largest_gap(a: Array, b: Array) -> float:
    """The largest distance between the empirical distribution functions of two samples."""
    a, b = np.sort(a), np.sort(b)
    values = np.concatenate([a, b])
    shares = [np.searchsorted(each, values, side="right") / len(each) for each in (a, b)]
    return float(np.abs(shares[0] - shares[1]).max())


def _tail(gap: float, n: int, m: int) -> float:
    """Probability that samples of n and m values from one continuous distribution have at least this gap.

    Each ordering of the pooled values is a lattice path from (0, 0) to (n, m). This counts the paths that
    stay closer to the diagonal, row by row, as a share of all paths to each point (as R's psmirnov does).
    """
    n, m = sorted((n, m))
    least = round(gap * n * m)  # |i m - j n| of the points (i, j) that a path must not reach
    shares = np.zeros(m + 1)
    shares[: -(-least // n)] = 1
    for i in range(1, n + 1):
        low, end = max(0, (i * m - least) // n + 1), -(-(i * m + least) // n)
        shares[:low] = 0
        # To (i, j), a path comes from (i - 1, j) or from (i, j - 1).
        shares[low:end] = (shares[low:end] * (i / (i + m))).cumsum()
    return float(np.clip(1 - shares[-1], 0, 1))


def squared_distances(a: Array, b: Array) -> Array:
    """Squared Euclidean distances [N, M] between the rows of [N, D] and [M, D]."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T
    return squares.clip(min=0)


def whitened(features: Array) -> Array:
    """The first principal components [N, C] of features [N, D], each with variance 1.

    The first few components of a classifier's features tell its classes apart. Unscaled, they would hide a
    shift that moves all images a little in another direction.
    """
    centred = np.asarray(features, np.float64)
    centred = centred - centred.mean(axis=0)
    count, width = centred.shape
    small = centred.T @ centred if width <= count else centred @ centred.T
    wanted = max(1, min(COMPONENTS, width, count // IMAGES_EACH))
    values, axes = eigh(small, subset_by_index=(len(small) - wanted, len(small) - 1))
    kept = values > 1e-9 * max(values[-1], np.finfo(np.float64).tiny)
    values, axes = values[kept], axes[:, kept]
    scores = centred @ axes / np.sqrt(values) if width <= count else axes
    return scores * math.sqrt(count)


def mmd_test(reference: Array, new: Array, level: float, seed: int) -> Discrepancy:
    """Test whether features [N, D] and [M, D], N and M at least 2, have the same distribution.

    The features are whitened, and the kernel is exp(-d^2 / (2 b^2)) with the median distance of all pairs as
    bandwidth b; both depend on all images together, so the test is exact. The p-value is the share of random
    divisions of all images, the given one included, that have at least this discrepancy.
    level: the significance level that the number of permutations must be able to reach.
    """
    n, pooled = len(reference), whitened(np.concatenate([reference, new]))
    kernel, bandwidth = gaussian_kernel(pooled)
    permutations = max(PERMUTATIONS, math.ceil(10 / level))
    generator, chosen = np.random.default_rng(seed), np.zeros((len(pooled), AT_ONCE))
    observed = float(discrepancies(kernel, (np.arange(len(pooled)) < n)[:, None])[0])
    at_least, rounding = 0, 1e-12
    for start in range(0, permutations, AT_ONCE):
        count = min(AT_ONCE, permutations - start)
        chosen[:] = 0
        for column in range(count):
            chosen[generator.permutation(len(pooled))[:n], column] = 1
        drawn = discrepancies(kernel, chosen[:, :count])
        at_least += int((drawn >= observed - rounding).sum())
    p = (1 + at_least) / (1 + permutations)
    return Discrepancy(observed, p, pooled.shape[1], bandwidth, permutations)


def gaussian_kernel(points: Array) -> tuple[Array, float]:
    """Kernel [N, N] of the rows of [N, D], with a diagonal of 0 because an image is not compared with itself,
    and its bandwidth, the median distance."""
    distances = squared_distances(points, points)
    median = float(np.median(distances[np.triu_indices(len(points), 1)]))
    bandwidth = math.sqrt(median) or 1.0  # 0 if most images are the same
    kernel = np.exp(distances / (-2 * bandwidth**2))
    np.fill_diagonal(kernel, 0)
    return kernel, bandwidth


def discrepancies(kernel: Array, first: Array) -> Array:
    """Unbiased squared MMD [P] of P divisions of all images. kernel [N, N]: with a diagonal of 0. first
    [N, P]: 1 for the images of the first sample."""
    first = first.astype(np.float64)
    n = first[:, 0].sum()
    m = len(kernel) - n
    total, of_first = kernel.sum(), kernel.sum(axis=1) @ first
    within = np.einsum("ij,ij->j", first, kernel @ first)
    between = of_first - within
    rest = total - of_first - between
    return within / (n * (n - 1)) + rest / (m * (m - 1)) - 2 * between / (n * m)


def neighbour_distances(images: Array, reference: Array, k: int, *, same: bool = False) -> Array:
    """Distance [N] of each row of `images` to its k-th nearest row of `reference`.

    same: both are the same rows, and a row is not its own neighbour. With fewer than k rows, the furthest one
    counts.
    """
    distances = squared_distances(images, reference)
    if same:
        np.fill_diagonal(distances, np.inf)
    rank = min(k, len(reference) - same) - 1
    return np.sqrt(np.partition(distances, rank, axis=1)[:, rank])

"""95% intervals of metrics, and of the difference between two models on the same images.

Wilson's interval for shares of a known number of images; for all else the bootstrap, from a fixed seed, so
that the same predictions always give the same interval. They show how much another draw of as many images
would change a metric, not how much another training would.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats

from hf_cifar.evaluation.calibration import confidence_bins, confidences_and_hits
from hf_cifar.evaluation.resampling import CHUNK, chunks, resamples

Array = np.ndarray
LEVEL = 0.95


def wilson(hits: Array, count: Array, level: float = LEVEL) -> Array:
    """Interval [..., 2] of a share, from `hits` [...] of `count` [...] images (Wilson 1927); NaN of
    no image."""
    hits, count = np.asarray(hits, np.float64), np.asarray(count, np.float64)
    z = stats.norm.ppf((1 + level) / 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = hits / count
        centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
        spread = np.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
        spread *= z / (1 + z**2 / count)
    # Exactly 0 and 1 at the ends, which rounding would miss.
    low = np.where(hits == 0, np.minimum(centre, 0), centre - spread)
    high = np.where(hits == count, np.maximum(centre, 1), centre + spread)
    return np.stack([low, high], axis=-1)


def by_name(
    single: dict[str, Array], per_class: dict[str, Array], id2label: Mapping[int, str]
) -> dict[str, Any]:
    """Intervals [2], and under "per_class" those of each class [K, 2], as plain values."""
    plain: dict[str, Any] = {name: _plain(interval) for name, interval in single.items()}
    plain["per_class"] = {
        name: {key: _plain(values[label]) for key, values in per_class.items()}
        for label, name in id2label.items()
    }
    return plain


def mcnemar(only_first: int, only_second: int) -> float:
    """p-value, 0..1, of McNemar's exact test (McNemar 1947): how likely two equally good models are to
    differ as much on images that one alone gets right. 1 if there is no such image."""
    if only_first + only_second == 0:
        return 1.0
    return float(stats.binomtest(int(only_first), int(only_first + only_second)).pvalue)


def paired_difference(only_first: int, only_second: int, count: int, level: float = LEVEL) -> Array:
    """Interval [2] of the second accuracy less the first, -1..1, on the same `count` images.

    Wald's interval with half an image added to each of the four outcomes (Agresti and Min 2005).
    """
    first, second, count = only_first + 0.5, only_second + 0.5, count + 2
    difference = (second - first) / count
    spread = np.sqrt(first + second - (second - first) ** 2 / count) / count
    spread *= stats.norm.ppf((1 + level) / 2)
    return np.clip([difference - spread, difference + spread], -1, 1)


def mean_interval(values: Array, level: float = LEVEL) -> Array:
    """Interval [2] of the mean of a metric over trainings, from its `values` [n] in n of them, 2 or more
    (Student's t)."""
    values = np.asarray(values, np.float64)
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values)
    return values.mean() + np.array([-half, half])


def middle(values: Array, level: float = LEVEL) -> Array:
    """Interval [..., 2] of drawn values [draws, ...] between equal tails; NaN where none is defined.

    By the quantiles that leave out 5 in 100 of further draws, however few were drawn ("weibull").
    """
    tails = [(1 - level) / 2, (1 + level) / 2]
    # numpy's function for NaN loops in Python, and warns where all values are NaN.
    quantile = np.nanquantile if np.isnan(values).any() else np.quantile
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice")
        return np.moveaxis(quantile(values, tails, axis=0, method="weibull"), 0, -1)


def middles(drawn: dict[str, Array]) -> dict[str, Array]:
    """Interval [2] by name of values [draws] by name."""
    intervals = middle(np.stack(list(drawn.values()), axis=1))
    return dict(zip(drawn, intervals, strict=True))


def nanmean(values: Array) -> Array:
    """Mean [draws] over the classes of [draws, K] that are defined."""
    defined = ~np.isnan(values)
    count = defined.sum(axis=1)
    total = np.where(defined, values, 0).sum(axis=1)
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def _plain(interval: Array) -> list[float] | None:
    return None if np.isnan(interval).any() else [float(end) for end in interval]


def calibration_interval(
    probabilities: Array, labels: Array, how: str, draws: int, generator: np.random.Generator
) -> Array:
    """Interval [2] of the expected calibration error.

    The error of a sample is larger than the true one, and that of a sample of the sample larger still, so
    that the bootstrap's percentiles would exclude even the 0 of a perfectly calibrated model. So the low end
    is mirrored at the error found (the "basic" bootstrap), and 0 where a calibrated model with these
    confidences would give as large an error in 2.5% of samples or more; the high end is the percentile.
    """
    confidences, hits = confidences_and_hits(probabilities, labels)
    bin_of = confidence_bins(confidences, how)
    in_bin = np.eye(bin_of.max() + 1, dtype=np.float32)[bin_of]
    tail, count = (1 - LEVEL) / 2, len(labels)

    def error(gaps: Array) -> Array:
        return np.abs(in_bin.T @ gaps).sum(axis=0) / count

    found = error(hits - confidences)
    gaps = (hits - confidences).astype(np.float32)[:, None]
    drawn = [error(counts * gaps) for counts in resamples(count, draws, generator)]
    calibrated = [
        error((generator.random((count, size), np.float32) < confidences[:, None]) - confidences[:, None])
        for size in chunks(draws, CHUNK)
    ]  # fmt: skip
    high = np.quantile(np.concatenate(drawn), 1 - tail, method="weibull")
    by_chance = (np.concatenate(calibrated) >= found).mean() >= tail
    return np.array([0 if by_chance else max(0, 2 * found - high), high])

"""95% intervals of metrics, and of the difference between two models on the same images.

Shares of a known number of images have Wilson's interval; everything else has bootstrap intervals with a
fixed seed, so that the same predictions always give the same interval. Intervals show how much a metric would
vary with another sample of as many images, not between training runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from hf_cifar.evaluation.calibration import confidence_bins, confidences_and_hits
from hf_cifar.evaluation.resampling import CHUNK, chunks, resamples

Array = np.ndarray
LEVEL = 0.95


def wilson(hits: ArrayLike, count: ArrayLike, level: float = LEVEL) -> Array:
    """Interval [..., 2] of a share of `hits` [...] among `count` [...] images (Wilson 1927); NaN for no
    images."""
    hits, count = np.asarray(hits, np.float64), np.asarray(count, np.float64)
    z = stats.norm.ppf((1 + level) / 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = hits / count
        centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
        spread = np.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
        spread *= z / (1 + z**2 / count)
    # Exactly 0 and 1 at the ends, despite rounding.
    low = np.where(hits == 0, np.minimum(centre, 0), centre - spread)
    high = np.where(hits == count, np.maximum(centre, 1), centre + spread)
    return np.stack([low, high], axis=-1)


def plain_intervals(
    single: dict[str, Array], per_class: dict[str, Array], id2label: Mapping[int, str]
) -> dict[str, Any]:
    """Convert intervals [2] to plain values, with those of each class [K, 2] under "per_class"."""
    plain: dict[str, Any] = {name: _plain(interval) for name, interval in single.items()}
    plain["per_class"] = {
        name: {key: _plain(values[label]) for key, values in per_class.items()}
        for label, name in id2label.items()
    }
    return plain


def mcnemar(only_first: int, only_second: int) -> float:
    """p-value, 0..1, of McNemar's exact test (McNemar 1947): the probability that two equally good models
    differ at least this much on the images that only one of them gets right. 1 if there are none."""
    if only_first + only_second == 0:
        return 1.0
    return float(stats.binomtest(int(only_first), int(only_first + only_second)).pvalue)


def paired_difference(
    only_first: ArrayLike, only_second: ArrayLike, count: ArrayLike, level: float = LEVEL
) -> Array:
    """Interval [2] of the second accuracy minus the first, -1..1, on the same `count` images.

    For arrays [K] with the images of each class: the interval of the difference in balanced accuracy.

    Wald's interval with half an image added to each of the four outcomes (Agresti and Min 2005).
    """
    first, second = np.asarray(only_first) + 0.5, np.asarray(only_second) + 0.5
    total = np.asarray(count) + 2
    difference = np.mean((second - first) / total)
    variance = (first + second - (second - first) ** 2 / total) / total**2
    spread = np.sqrt(variance.sum()) / variance.size * stats.norm.ppf((1 + level) / 2)
    return np.clip([difference - spread, difference + spread], -1, 1)


def mean_interval(values: ArrayLike, level: float = LEVEL) -> Array:
    """Interval [2] of the mean of a metric over training runs, from its `values` [n] in n >= 2 runs
    (Student's t)."""
    values = np.asarray(values, np.float64)
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values)
    return values.mean() + np.array([-half, half])


def equal_tailed(values: Array, level: float = LEVEL) -> Array:
    """Equal-tailed interval [..., 2] of bootstrap values [draws, ...]; NaN if all values are NaN.

    The "weibull" quantiles exclude 5% of further draws even if the number of draws is small.
    """
    tails = [(1 - level) / 2, (1 + level) / 2]
    # np.nanquantile loops in Python, and warns if all values are NaN.
    quantile = np.nanquantile if np.isnan(values).any() else np.quantile
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice")
        return np.moveaxis(quantile(values, tails, axis=0, method="weibull"), 0, -1)


def equal_tailed_by_name(drawn: dict[str, Array]) -> dict[str, Array]:
    """Map names to the interval [2] of their bootstrap values [draws]."""
    intervals = equal_tailed(np.stack(list(drawn.values()), axis=1))
    return dict(zip(drawn, intervals, strict=True))


def nanmean(values: Array) -> Array:
    """Mean [draws] of [draws, K] over the classes that are not NaN."""
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

    The error of a sample is larger than the true one, and that of a resample larger still, so percentiles of
    the bootstrap would exclude even the 0 of a perfectly calibrated model. The low end is therefore mirrored
    at the observed error (the "basic" bootstrap), and 0 if a calibrated model with these confidences would
    have as large an error in at least 2.5% of samples; the high end is the percentile.
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

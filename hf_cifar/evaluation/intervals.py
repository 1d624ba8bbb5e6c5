"""95% intervals of figures, and of the difference between two models on the same images.

Wilson's interval for shares of a known number of images; for all else the bootstrap, from a fixed seed, so
that the same predictions always give the same interval. They tell what another draw of as many images
would change, not what another training would.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from scipy import stats

from hf_cifar.evaluation.calibration import confidence_bins, confidences_and_hits
from hf_cifar.evaluation.metrics import (
    brier,
    confusion_matrix,
    log_losses,
    membership,
    shares_of_hits,
    softmax,
    top_k_hits,
)
from hf_cifar.evaluation.multi_label import binary_log_losses, decide, figures_of_hits, sigmoid
from hf_cifar.evaluation.resampling import (
    CHUNK,
    chunks,
    confusion_figures,
    image_figures,
    resamples,
)

Array = np.ndarray
LEVEL = 0.95
DRAWS = 1000


def wilson(hits: Array, count: Array, level: float = LEVEL) -> Array:
    """Interval [..., 2] of a share, from `hits` [...] of `count` [...] images (Wilson 1927); NaN of none."""
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


def figure_intervals(
    logits: Array, labels: Array, id2label: dict[int, str], draws: int = DRAWS, seed: int = 0
) -> dict[str, Any]:
    """Interval [low, high] of every figure that `compute_metrics` gives, by the same names, as plain values.

    logits [N, K], labels [N]. None stands for an interval of an undefined figure.
    """
    labels, num_labels = np.asarray(labels), len(id2label)
    probabilities = softmax(logits)
    predictions = probabilities.argmax(axis=1)
    confusion = confusion_matrix(predictions, labels, num_labels)
    hits, predicted, actual = np.diag(confusion), confusion.sum(axis=0), confusion.sum(axis=1)
    generator = np.random.default_rng(seed)
    single: dict[str, Array] = {"accuracy": wilson(hits.sum(), len(labels))}
    if num_labels > 5:
        single["top_5_accuracy"] = wilson(top_k_hits(probabilities, labels).sum(), len(labels))
    per_class = {"precision": wilson(hits, predicted), "recall": wilson(hits, actual)}
    drawn, drawn_f1 = confusion_figures(confusion, draws, generator)
    single |= _middles(drawn)
    per_class["f1"] = _middle(drawn_f1)
    for name, how in (("ece", "equal_width"), ("ece_equal_mass", "equal_mass")):
        single[name] = calibration_interval(probabilities, labels, how, draws, generator)
    losses = {"cross_entropy": log_losses, "brier": brier}
    per_image = np.stack([loss(probabilities, labels) for loss in losses.values()], axis=1)
    positive = membership(labels, num_labels)
    means, areas = image_figures(probabilities, positive, per_image, draws, generator)
    macro = {f"{name}_macro": _nanmean(values) for name, values in areas.items()}
    single |= _middles({**dict(zip(losses, means.T, strict=True)), **macro})
    per_class |= {name: _middle(values) for name, values in areas.items()}
    return _by_name(single, per_class, id2label)


def multi_label_intervals(
    logits: Array,
    labels: Array,
    id2label: dict[int, str],
    thresholds: Array,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Any]:
    """Interval of every figure that `multi_label_metrics` gives, as `figure_intervals` does.

    logits, labels [N, K]; thresholds [K], which are taken as given.
    """
    scores, positive = sigmoid(logits), membership(labels, len(id2label))
    given = decide(scores, thresholds)
    hits = given & positive
    single = {"accuracy": wilson((given == positive).all(axis=1).sum(), len(labels))}
    per_class = {
        "precision": wilson(hits.sum(axis=0), given.sum(axis=0)),
        "recall": wilson(hits.sum(axis=0), positive.sum(axis=0)),
    }
    per_image = np.column_stack([binary_log_losses(logits, labels), hits, given, positive])
    means, areas = image_figures(scores, positive, per_image, draws, np.random.default_rng(seed))
    loss, counts = means[:, 0], np.split(means[:, 1:], 3, axis=1)
    macro = {f"{name}_macro": _nanmean(values) for name, values in areas.items()}
    single |= _middles({**figures_of_hits(*counts), **macro, "cross_entropy": loss})
    per_class["f1"] = _middle(shares_of_hits(*counts)["f1"])
    per_class |= {name: _middle(values) for name, values in areas.items()}
    return _by_name(single, per_class, id2label)


def _by_name(
    single: dict[str, Array], per_class: dict[str, Array], id2label: dict[int, str]
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
    """Interval [2] of the mean of a figure over trainings, from its `values` [n] in n of them, 2 or more
    (Student's t)."""
    values = np.asarray(values, np.float64)
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values)
    return values.mean() + np.array([-half, half])


def _middle(values: Array, level: float = LEVEL) -> Array:
    """Interval [..., 2] of drawn values [draws, ...] between equal tails; NaN where none is.

    By the quantiles that leave out 5 in 100 of further draws, however few were drawn ("weibull").
    """
    tails = [(1 - level) / 2, (1 + level) / 2]
    # numpy's function for NaN loops in Python, and says so when there is nothing else.
    quantile = np.nanquantile if np.isnan(values).any() else np.quantile
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice")
        return np.moveaxis(quantile(values, tails, axis=0, method="weibull"), 0, -1)


def _middles(drawn: dict[str, Array]) -> dict[str, Array]:
    """Interval [2] by name of values [draws] by name."""
    intervals = _middle(np.stack(list(drawn.values()), axis=1))
    return dict(zip(drawn, intervals, strict=True))


def _nanmean(values: Array) -> Array:
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

    The error of a sample lies above the truth's, and that of a sample of the sample higher still, so that
    the bootstrap's percentiles would leave out even a perfectly calibrated model's 0. So the low end is
    mirrored at the error found (the "basic" bootstrap), and 0 where a calibrated model with these
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

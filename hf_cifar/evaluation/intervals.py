"""95% intervals of figures, and of the difference between two models on the same images.

Wilson's interval for shares of a known number of images; for all else the bootstrap, from a fixed seed, so
that the same predictions always give the same interval. They tell what another draw of as many images
would change, not what another training would.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy import stats

from hf_cifar.evaluation.calibration import confidence_bins, confidences_and_hits
from hf_cifar.evaluation.figures import (
    brier,
    confusion_matrix,
    figures_of_confusion,
    log_losses,
    membership,
    precision_recall_f1,
    shares_of_hits,
    softmax,
    top_k_hits,
)
from hf_cifar.evaluation.multilabel import (
    binary_log_losses,
    decide,
    figures_of_hits,
    sigmoid,
)

Array = np.ndarray
LEVEL = 0.95
DRAWS = 1000
# Images x classes x draws: above it, areas and means are drawn less often, down to a tenth.
AREA_WORK = 2e8
CHUNK = 100  # draws at a time: small enough to stay in a cache, and in memory for 50,000 images


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
    drawn, drawn_f1 = _confusion_figures(confusion, draws, generator)
    single |= _middles(drawn)
    per_class["f1"] = _middle(drawn_f1)
    for name, how in (("ece", "equal_width"), ("ece_equal_mass", "equal_mass")):
        single[name] = calibration_interval(probabilities, labels, how, draws, generator)
    losses = {"cross_entropy": log_losses, "brier": brier}
    per_image = np.stack([loss(probabilities, labels) for loss in losses.values()], axis=1)
    positive = membership(labels, num_labels)
    means, areas = _image_figures(probabilities, positive, per_image, draws, generator)
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
    means, areas = _image_figures(scores, positive, per_image, draws, np.random.default_rng(seed))
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


def _confusion_figures(
    confusion: Array, draws: int, generator: np.random.Generator
) -> tuple[dict[str, Array], Array]:
    """Drawn values of the figures of a confusion matrix: single ones [draws], and F1 [draws, K].

    To draw images and count them is to draw the counts: one multinomial over the cells that hold any.
    """
    cells = np.flatnonzero(confusion)
    count = confusion.sum()
    single, f1 = [], []
    for size in _chunks(draws, at_once=max(1, 10_000_000 // confusion.size)):
        drawn = np.zeros((size, confusion.size))
        shares = confusion.ravel()[cells] / count
        drawn[:, cells] = generator.multinomial(count, shares, size=size)
        drawn = drawn.reshape(size, *confusion.shape)
        single.append(figures_of_confusion(drawn))
        f1.append(precision_recall_f1(drawn)["f1"])
    return {
        name: np.concatenate([part[name] for part in single]) for name in single[0]
    }, np.concatenate(f1)


def _image_figures(
    probabilities: Array,
    positive: Array,
    per_image: Array,
    draws: int,
    generator: np.random.Generator,
) -> tuple[Array, dict[str, Array]]:
    """Drawn values of the figures that need each image: means [draws, M], and areas [draws, K] of each class.

    positive [N, K]: whether an image is of a class. per_image [N, M]: what the means are of.
    """
    rankings = [_Ranking(*column) for column in zip(probabilities.T, positive.T, strict=True)]
    draws = int(np.clip(AREA_WORK / probabilities.size, draws / 10, draws))
    means, areas = [], []
    for counts in _resamples(len(positive), draws, generator):
        means.append(counts.T @ per_image / len(positive))
        areas.append(np.stack([ranking.areas(counts) for ranking in rankings], axis=-1))
    roc_auc, average_precision = np.concatenate(areas, axis=1)
    return np.concatenate(means), {"roc_auc": roc_auc, "average_precision": average_precision}


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
    drawn = [error(counts * gaps) for counts in _resamples(count, draws, generator)]
    calibrated = [
        error((generator.random((count, size), np.float32) < confidences[:, None]) - confidences[:, None])
        for size in _chunks(draws, CHUNK)
    ]  # fmt: skip
    high = np.quantile(np.concatenate(drawn), 1 - tail, method="weibull")
    by_chance = (np.concatenate(calibrated) >= found).mean() >= tail
    return np.array([0 if by_chance else max(0, 2 * found - high), high])


class _Ranking:
    """The images in the order of one class's score, to find the areas of many draws at once.

    Where many images of other classes follow one another they count as one step: it changes neither area,
    and with a good model nearly all of them do.
    """

    def __init__(self, scores: Array, positive: Array) -> None:
        self.order = np.argsort(scores, kind="stable")
        ranked, positive = scores[self.order], positive[self.order]
        first = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])  # of the images of one score
        mixed = np.logical_or.reduceat(positive, first)
        self.starts = first[np.r_[True, mixed[1:] | mixed[:-1]]]
        self.positive = np.flatnonzero(positive)
        self.step = np.searchsorted(self.starts, self.positive, side="right") - 1

    def areas(self, counts: Array) -> Array:
        """ROC AUC and average precision [2, draws] of draws `counts` [N, draws]; NaN if undefined."""
        weights = counts[self.order]
        positives = np.zeros((len(self.starts), counts.shape[1]), counts.dtype)
        np.add.at(positives, self.step, weights[self.positive])
        everyone = np.add.reduceat(weights, self.starts, axis=0)
        negatives = everyone - positives
        below = np.cumsum(negatives, axis=0)
        num_negative = below[-1]
        hits = np.cumsum(positives[::-1], axis=0)[::-1]
        num_positive = hits[0]
        seen = np.cumsum(everyone[::-1], axis=0)[::-1]
        with np.errstate(divide="ignore", invalid="ignore"):
            ordered_pairs = (positives * (below - negatives / 2)).sum(axis=0, dtype=np.float64)
            roc = ordered_pairs / num_positive / num_negative
            precision = hits / np.maximum(seen, 1)
            ap = (positives * precision).sum(axis=0, dtype=np.float64) / num_positive
        return np.stack([roc, ap])


def _resamples(count: int, draws: int, generator: np.random.Generator) -> Iterator[Array]:
    """How often each of `count` images is drawn, [count, <= CHUNK], `draws` times in all."""
    for size in _chunks(draws, CHUNK):
        picked = generator.integers(0, count, (count, size)) * size + np.arange(size)
        counts = np.bincount(picked.ravel(), minlength=size * count)
        yield counts.reshape(count, size).astype(np.float32)


def _chunks(draws: int, at_once: int) -> Iterator[int]:
    for start in range(0, draws, at_once):
        yield min(at_once, draws - start)

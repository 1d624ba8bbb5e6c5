"""The bootstrap: counts, means and areas of many resamples of the same images."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy import sparse

from hf_cifar.evaluation.metrics import Counts

Array = np.ndarray
# Images x classes x draws; above this, areas and means get fewer draws, down to a tenth.
AREA_WORK = 2e8
CHUNK = 100  # draws at a time: small enough to stay in a cache, and in memory for 50,000 images


def draw_counts(confusion: Array, draws: int, generator: np.random.Generator) -> Counts:
    """Draw counts [draws, K] of resampled images, given their confusion matrix [K, K].

    Resampling images and counting them equals one multinomial draw over the non-empty cells.
    """
    rows, columns = np.nonzero(confusion)
    count, num_classes = confusion.sum(), len(confusion)
    shares = confusion[rows, columns] / count
    hits = np.where(rows == columns, 1.0, 0.0)
    # Each sums the drawn cells by class: the correct ones, all by prediction, all by truth.
    sums = [
        sparse.csr_array((values, (np.arange(len(rows)), classes)), (len(rows), num_classes))
        for values, classes in (
            (hits, rows),
            (np.ones(len(rows)), columns),
            (np.ones(len(rows)), rows),
        )
    ]
    parts = []
    for size in chunks(draws, at_once=max(1, 10_000_000 // len(rows))):
        drawn = generator.multinomial(count, shares, size=size).astype(np.float64)
        parts.append([drawn @ each for each in sums])
    return Counts(*map(np.concatenate, zip(*parts, strict=True)))


def draw_images(
    probabilities: Array,
    positive: Array,
    per_image: Array,
    draws: int,
    generator: np.random.Generator,
) -> tuple[Array, dict[str, Array]]:
    """Draw means [draws, M] of per-image numbers, and the areas [draws, K] of each class.

    positive [N, K]: True where an image has a class. per_image [N, M]: the numbers of each image.
    """
    rankings = [_Ranking(*column) for column in zip(probabilities.T, positive.T, strict=True)]
    draws = int(np.clip(AREA_WORK / probabilities.size, draws / 10, draws))
    means, areas = [], []
    for counts in resamples(len(positive), draws, generator):
        means.append(counts.T @ per_image / len(positive))
        areas.append(np.stack([ranking.areas(counts) for ranking in rankings], axis=-1))
    roc_auc, average_precision = np.concatenate(areas, axis=1)
    return np.concatenate(means), {"roc_auc": roc_auc, "average_precision": average_precision}


class _Ranking:
    """The images sorted by one class's score, to compute the areas of many draws at once.

    Consecutive images of other classes are merged into one step. That changes neither area, and with a good
    model nearly all of them are consecutive.
    """

    def __init__(self, scores: Array, positive: Array) -> None:
        self.order = np.argsort(scores, kind="stable")
        ranked, positive = scores[self.order], positive[self.order]
        first = np.flatnonzero(
            np.r_[True, ranked[1:] != ranked[:-1]]
        )  # of the images with equal scores
        mixed = np.logical_or.reduceat(positive, first)
        self.starts = first[np.r_[True, mixed[1:] | mixed[:-1]]]
        self.positive = np.flatnonzero(positive)
        self.step = np.searchsorted(self.starts, self.positive, side="right") - 1

    def areas(self, counts: Array) -> Array:
        """ROC AUC and average precision [2, draws] for draws `counts` [N, draws]; NaN if undefined."""
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


def resamples(count: int, draws: int, generator: np.random.Generator) -> Iterator[Array]:
    """Yield how often each of `count` images is drawn, [count, <= CHUNK], for `draws` draws in total."""
    for size in chunks(draws, CHUNK):
        picked = generator.integers(0, count, (count, size)) * size + np.arange(size)
        counts = np.bincount(picked.ravel(), minlength=size * count)
        yield counts.reshape(count, size).astype(np.float32)


def chunks(draws: int, at_once: int) -> Iterator[int]:
    """Yield the sizes of the parts into which `draws` are divided, at most `at_once` each."""
    for start in range(0, draws, at_once):
        yield min(at_once, draws - start)

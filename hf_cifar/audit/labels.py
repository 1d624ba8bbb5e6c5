"""Labels that are probably wrong, by confident learning.

Compares each label with the probabilities of a model that was not trained on it. All results but those of
`doubted_labels` equal those of cleanlab 2.9.

Source: Northcutt, Jiang and Chuang, Confident Learning: Estimating Uncertainty in Dataset Labels, 2021.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

Array = np.ndarray
TOLERANCE = 1e-6  # when probabilities are compared
UNLIKELY = 0.02  # probability of a label, see `unlikely_pairs`
DISCOUNT = 0.8  # weight of the least probable label of an image, see `_quality`


def confident_labels(probabilities: Array, labels: Array) -> Array:
    """Return the class [N] confidently assigned to each image; -1 if no class reaches its threshold.

    The threshold of a class is the mean of its probability [N, K] over the images with that label [N]. A
    class without images is never assigned.
    """
    classes = np.arange(probabilities.shape[1])
    own = [probabilities[labels == label, label] for label in classes]
    thresholds = np.array([each.mean() if len(each) else np.inf for each in own])
    reached = probabilities >= np.maximum(thresholds, 2 * TOLERANCE) - TOLERANCE
    best = np.where(reached.sum(axis=1) > 1, probabilities.argmax(axis=1), reached.argmax(axis=1))
    return np.where(reached.any(axis=1), best, -1)


def confident_joint(probabilities: Array, labels: Array) -> Array:
    """Estimate the number of images of each given label (row) and true label (column), int [K, K].

    A row adds up to the number of images with that label.
    """
    num_classes = probabilities.shape[1]
    confident = confident_labels(probabilities, labels)
    sure = confident >= 0
    joint = np.zeros((num_classes, num_classes))
    np.add.at(joint, (labels[sure], confident[sure]), 1)
    np.fill_diagonal(joint, np.maximum(joint.diagonal(), 1))
    counts = np.bincount(labels, minlength=num_classes)
    joint = joint / joint.sum(axis=1, keepdims=True) * counts[:, None]
    joint = joint / joint.sum() * counts.sum()  # changes the last digits, and so the rounding
    return np.stack([_rounded(row) for row in joint])


def _rounded(values: Array) -> Array:
    """Round numbers so that their sum stays the same."""
    whole = values.round()
    excess = int((values.sum().round() - whole.sum()).round())
    order = np.argsort(values - whole, kind="stable")
    changed = order[::-1][:excess] if excess > 0 else order[: abs(excess)]
    whole[changed] += np.sign(excess)
    return whole.astype(int)


def doubted_labels(probabilities: Array, labels: Array) -> Array:
    """Return True for each label [N] to leave out: in each class, the labels with the lowest probability, as
    many as there are images confidently assigned to another class.

    Every class keeps at least one image. For the same number of labels, this is more precise than
    `pruned_labels`, above all with a weak model.
    """
    certain = _certainly_other(probabilities, labels)
    doubted = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        number = min(int(certain[rows].sum()), len(rows) - 1)
        doubted[rows[np.argsort(probabilities[rows, label], kind="stable")[:number]]] = True
    return doubted


def _certainly_other(probabilities: Array, labels: Array) -> Array:
    """Return True for each label [N] whose image is almost certainly of another class."""
    confident = confident_labels(probabilities, labels)
    return disagreeing(probabilities, labels) & (confident >= 0) & (confident != labels)


def pruned_labels(probabilities: Array, labels: Array) -> Array:
    """Return True for each label [N] that is probably wrong: pruned both by noise rate and by class.

    The joint gives the number of images of each label that belong to each other class. By noise rate, that
    number is pruned for each other class, by the largest margin over the label. By class, the total is
    pruned, by the lowest probability of the label. Every class keeps at least one image.

    probabilities [N, K] must be from a model that was not trained on these labels.
    """
    joint, doubted = confident_joint(probabilities, labels), np.zeros(len(labels), bool)
    for given, counts in enumerate(joint):
        rows = np.flatnonzero(labels == given)
        if len(rows) > 1:
            doubted[rows] = _pruned_by_noise_rate(probabilities[rows], given, counts)
            doubted[rows] &= _pruned_by_class(probabilities[rows], given, counts)
    return doubted & disagreeing(probabilities, labels)


def _pruned_by_noise_rate(probabilities: Array, given: int, counts: Array) -> Array:
    """Prune images of one label, [N, K], by their margin. counts [K]: number of images of each true label."""
    if not counts[given]:  # keep one image
        counts = counts - 1
    pruned = np.zeros(len(probabilities), bool)
    for other in np.flatnonzero(counts > 0):
        if other != given:
            margins = probabilities[:, other] - probabilities[:, given]
            pruned[np.argsort(-margins, kind="stable")[: counts[other]]] = True
    return pruned


def _pruned_by_class(probabilities: Array, given: int, counts: Array) -> Array:
    """Prune all images of one label but the number that truly have it, at least one."""
    pruned = np.zeros(len(probabilities), bool)
    number = len(probabilities) - max(counts[given], 1)
    pruned[np.argsort(probabilities[:, given], kind="stable")[:number]] = True
    return pruned


def disagreeing(probabilities: Array, labels: Array) -> Array:
    """Return True for each label [N] that is not the most probable class."""
    raised = probabilities.copy()
    raised[np.arange(len(labels)), labels] += TOLERANCE
    return raised.argmax(axis=1) != labels


def suspected_labels(probabilities: Array, labels: Array) -> tuple[int, Array]:
    """Estimate the number of wrong labels, and list the positions of labels that disagree with the
    prediction, the least probable first.

    probabilities [N, K] must be from a model that was not trained on these labels [N]; or, for multi-label
    data, labels [N, K] of 0 and 1, where each image is counted and listed once.
    """
    labels = np.asarray(labels)
    probabilities = np.asarray(probabilities, dtype=np.float64)
    if labels.ndim == 2:
        return _suspected_in_any(probabilities, labels)
    if not len(labels):
        return 0, np.zeros(0, np.int64)
    count = np.count_nonzero(_certainly_other(probabilities, labels))
    rows = np.flatnonzero(disagreeing(probabilities, labels))
    order = np.argsort(probabilities[rows, labels[rows]], kind="stable")
    return int(count), rows[order]


def _suspected_in_any(scores: Array, labels: Array) -> tuple[int, Array]:
    """Do the same for scores and labels [N, K], class by class. A class that all images have, or none, is not
    checked."""
    varied = np.flatnonzero(labels.any(axis=0) & ~labels.all(axis=0))
    doubted, differs = np.zeros((2, len(labels)), bool)
    for label in varied:
        pair, given = np.stack([1 - scores[:, label], scores[:, label]], axis=1), labels[:, label]
        doubted |= pruned_labels(pair, given.astype(int))
        differs |= disagreeing(pair, given.astype(int))
    rows = np.flatnonzero(differs)
    return int(doubted.sum()), rows[np.argsort(_quality(scores, labels)[rows], kind="stable")]


def _quality(scores: Array, labels: Array) -> Array:
    """Return how well the labels of an image fit, 0..1 [N]: an exponential moving average of the
    probabilities of its labels, in which the least probable label counts most."""
    ordered = np.sort(np.where(labels, scores, 1 - scores), axis=1)[:, ::-1]
    average = ordered[:, 0]
    for column in ordered.T[1:]:
        average = DISCOUNT * column + (1 - DISCOUNT) * average
    return average


class UnlikelyPair(NamedTuple):
    """Images labelled `given` that look like class `suggested`, and for which `given` is very unlikely.

    rows: their positions. expected: how many there would be if the probabilities were right.
    """

    given: int
    suggested: int
    rows: Array
    expected: float

    @property
    def score(self) -> float:
        """How far the number is above the expected one, in about standard deviations."""
        return (len(self.rows) - self.expected) / float(np.sqrt(self.expected + 1))


def unlikely_pairs(probabilities: Array, labels: Array) -> list[UnlikelyPair]:
    """Count labels [N] with a probability of at most `UNLIKELY`, by pairs of classes; highest score first.

    A weak head disagrees with many correct labels, but if its probabilities [N, K] fit the labels overall,
    their sum is the number to expect. Only a larger number is evidence against the labels. So wrong labels
    between classes that the head often confuses, such as cat and dog, are not found.
    """
    found, predicted = [], probabilities.argmax(axis=1)
    for suggested in np.unique(predicted).tolist():
        rows = np.flatnonzero(predicted == suggested)
        for given in set(np.unique(labels[rows]).tolist()) - {suggested}:
            unlikely = rows[probabilities[rows, given] <= UNLIKELY]
            expected = float(probabilities[unlikely, given].sum())
            here = unlikely[labels[unlikely] == given]
            order = np.argsort(probabilities[here, given], kind="stable")
            found.append(UnlikelyPair(given, suggested, here[order], expected))
    return sorted(found, key=lambda pair: -pair.score)

"""Choose rows so that each class keeps its share, for one or multiple labels per image."""

from __future__ import annotations

import logging
import math

import numpy as np

from hf_cifar.data.labels import SHOWN_CLASSES, class_counts
from hf_cifar.data.split import Split, subset
from hf_cifar.errors import UserError
from hf_cifar.text import listed

logger = logging.getLogger(__name__)


def subsample(split: Split, limit: int | None, seed: int, flag: str = "limit") -> Split:
    """Choose at most `limit` rows, stratified, in the original order."""
    if limit is None or limit >= len(split):
        return split
    present = np.count_nonzero(class_counts(split.labels, len(split.id2label)))
    if limit < present:
        raise UserError(
            f"{flag} {limit} is less than the {present} classes of {split.name}; raise it"
        )
    kept = _choose_rows(split.labels, limit, seed)
    return subset(split, kept)


def representative_rows(labels: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Choose `size` row numbers, stratified, or at random if there are more classes; all rows if fewer."""
    if size >= len(labels):
        return np.arange(len(labels))
    if size < len(np.unique(labels) if labels.ndim == 1 else labels.T):
        return np.sort(np.random.default_rng(seed).permutation(len(labels))[:size])
    return _choose_rows(labels, size, seed)


def equal_rows(labels: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Choose `size` row numbers, sorted, as equally divided among the classes as possible.

    The rows are shuffled and numbered within their class; those with the lowest numbers are chosen, so that
    a smaller choice is part of a larger one. For labels [N, K], a row has the lowest number that it has in
    any of its classes, and rows without a label come last.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    shuffled, numbers = labels[order], np.full(len(labels), len(labels))
    for label in range(labels.shape[1]) if labels.ndim == 2 else np.unique(labels):
        rows = np.flatnonzero(shuffled[:, label] if labels.ndim == 2 else shuffled == label)
        numbers[rows] = np.minimum(numbers[rows], np.arange(len(rows)))
    return np.sort(order[np.argsort(numbers, kind="stable")[:size]])


def long_tail(split: Split, factor: float, seed: int) -> Split:
    """Keep all images of the first class, 1 / factor of the last one's, and exponentially fewer between.

    A class that is larger than average counts as average, as in CIFAR-10-LT; each keeps an image.

    Source: Cao et al., Learning Imbalanced Datasets with LDAM, 2019, appendix.
    """
    if factor == 1:
        return split
    _require_single_labels(split, "imbalance_factor")
    num_classes = len(split.id2label)
    most = len(split) / num_classes
    exponents = np.arange(num_classes) / max(1, num_classes - 1)
    tail = _first_of_each(split, np.maximum(1, (most * factor**-exponents).astype(int)), seed)
    counts = class_counts(tail.labels, num_classes)
    logger.info(
        "--imbalance_factor %g: %s of %s training images, from %s of %r to %s of %r",
        factor, f"{len(tail):,}", f"{len(split):,}",
        f"{counts.max():,}", split.id2label[int(counts.argmax())],
        f"{counts.min():,}", split.id2label[int(counts.argmin())],
    )  # fmt: skip
    return tail


def few_shot(split: Split, shots: int | None, seed: int) -> Split:
    """Keep this many images of each class. Raises: UserError if a class has fewer."""
    if shots is None:
        return split
    _require_single_labels(split, "shots")
    counts = class_counts(split.labels, len(split.id2label))
    if shots > counts.min():
        name = split.id2label[int(counts.argmin())]
        raise UserError(
            f"--shots {shots}: class {name!r} has {counts.min():,} training images; pass at most as many"
        )
    return _first_of_each(split, np.full(len(counts), shots), seed)


def _require_single_labels(split: Split, option: str) -> None:
    if split.labels.ndim == 2:
        raise UserError(f"--{option} needs one label per image, and this data is multi-label")


def _first_of_each(split: Split, sizes: np.ndarray, seed: int) -> Split:
    """Choose `sizes` [K] images of the classes at random, in the original order; a larger number of fewer
    images contains those of a smaller one."""
    order = np.random.default_rng(seed).permutation(len(split))
    labels = split.labels[order]
    kept = [order[labels == label][:size] for label, size in enumerate(sizes)]
    return subset(split, np.sort(np.concatenate(kept)))


def stratified(
    labels: np.ndarray, share: float, names: list[str], seed: int, split: str
) -> tuple[np.ndarray, np.ndarray]:
    """Divide rows into two sorted arrays of row numbers; the second gets `share` of each class."""
    counts = class_counts(labels, len(names))
    alone = [name for name, count in zip(names, counts, strict=True) if count == 1]
    if len(labels) < 2 or (labels.ndim == 1 and counts.max() < 2):
        raise UserError(
            f"class {names[counts.argmax()]!r} has one image in {split}, and no class has more; train and "
            "validation need one each, so add images"
        )
    if alone:
        logger.warning(
            "%s of %s classes have one image, which is in train, so validation has none of them: %s",
            f"{len(alone):,}", f"{len(names):,}", listed(alone, SHOWN_CLASSES),
        )  # fmt: skip
    # At least one image of each class in both parts, if it has two.
    if labels.ndim == 1:
        fewest, most = int((counts > 1).sum()), len(labels) - int((counts > 0).sum())
    else:
        fewest = min(fewest_images(labels), len(labels) // 2)
        most = len(labels) - fewest
    size = min(max(round(len(labels) * share), fewest), most)
    second = _choose_rows(labels, size, seed, spare=1)
    return np.setdiff1d(np.arange(len(labels)), second), second


def assign_folds(
    labels: np.ndarray, num_folds: int, seed: int, groups: np.ndarray | None = None
) -> np.ndarray:
    """Assign each row to a fold, 0..num_folds - 1 [N], so that every fold gets its share of each class.

    Without groups, fold sizes, and the images of a class in each fold, differ by at most one; for labels
    [N, K], classes are balanced as far as possible. groups: [N], equal for rows that must be in one fold.
    """
    generator = np.random.default_rng(seed)
    if groups is not None:
        return _folds_of_groups(labels, num_folds, groups, generator)
    fold_of = np.full(len(labels), num_folds - 1)
    if labels.ndim == 2:
        rest = np.arange(len(labels))
        for fold in range(num_folds - 1):
            size = len(rest) // (num_folds - fold)
            chosen = stratified_choice(labels[rest], size, int(generator.integers(2**31)))
            fold_of[rest[chosen]] = fold
            rest = np.delete(rest, chosen)
        return fold_of
    shuffled = generator.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    fold_of[by_class] = np.arange(len(labels)) % num_folds
    return fold_of


def _folds_of_groups(
    labels: np.ndarray, num_folds: int, groups: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Assign groups to folds one by one, those with the most uneven classes first. Each goes to the fold that
    makes the classes most even over the folds; of equal ones, to the smallest.

    Source: scikit-learn, StratifiedGroupKFold.
    """
    group_of = np.unique(groups, return_inverse=True)[1]
    each = labels if labels.ndim == 2 else np.eye(labels.max() + 1, dtype=np.int64)[labels]
    counts = np.zeros((group_of.max() + 1, each.shape[1]))
    np.add.at(counts, group_of, each)
    shares = counts / np.maximum(counts.sum(axis=0), 1)
    order = generator.permutation(len(counts))
    order = order[np.argsort(-counts[order].std(axis=1), kind="stable")]
    sizes, num_images = np.bincount(group_of), np.zeros(num_folds, np.int64)
    folds, fold_of_group = np.zeros((num_folds, counts.shape[1])), np.zeros(len(counts), np.int64)
    for group in order:
        spread = []
        for fold in range(num_folds):
            folds[fold] += shares[group]
            spread.append((round(folds.std(axis=0).mean(), 12), num_images[fold]))
            folds[fold] -= shares[group]
        best = min(range(num_folds), key=spread.__getitem__)
        folds[best] += shares[group]
        num_images[best] += sizes[group]
        fold_of_group[group] = best
    return fold_of_group[group_of]


def _choose_rows(labels: np.ndarray, size: int, seed: int, spare: int = 0) -> np.ndarray:
    """Choose `size` row numbers, sorted, with each class in proportion (largest remainder, at least one row).

    spare: minimum number of rows of each class that are not chosen.
    """
    if labels.ndim == 2:
        return stratified_choice(labels, size, seed, spare)
    generator = np.random.default_rng(seed)
    counts = np.unique(labels, return_counts=True)[1]
    exact = counts * size / len(labels)
    take = np.clip(np.floor(exact).astype(int), 1, counts - spare)
    order = np.argsort(-(exact - np.floor(exact)), kind="stable")
    while take.sum() != size:
        step = 1 if take.sum() < size else -1
        for i in order if step > 0 else order[::-1]:
            if take.sum() == size:
                break
            if (step > 0 and take[i] < counts[i] - spare) or (step < 0 and take[i] > 1):
                take[i] += step
    by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
    chosen = [
        generator.permutation(rows)[:count] for rows, count in zip(by_class, take, strict=True)
    ]
    return np.sort(np.concatenate(chosen))


def fewest_images(labels: np.ndarray) -> int:
    """Average number of images needed to see one label per class. labels [N, K]."""
    return math.ceil(labels.shape[1] / max(1.0, labels.sum(axis=1).mean()))


def stratified_choice(labels: np.ndarray, size: int, seed: int, spare: int = 0) -> np.ndarray:
    """Choose `size` row numbers of labels [N, K], sorted, with each class in proportion and, where possible,
    at least one row of each.

    spare: minimum number of rows of each class that are not chosen; takes priority.

    Source: Sechidis, Tsoumakas and Vlahavas, On the Stratification of Multi-Label Data, 2011.
    """
    num_rows = len(labels)
    counts = labels.sum(axis=0, dtype=np.int64)
    # Labels per class, and images, still needed in the first part (not chosen) and the second (chosen).
    chosen = np.minimum(np.maximum(counts * size / num_rows, 1), np.maximum(counts - spare, 0))
    wanted = np.stack([counts - chosen, chosen])
    room = np.array([num_rows - size, size])
    part = np.full(num_rows, -1)
    shuffled = np.random.default_rng(seed).permutation(num_rows)
    classes_of = _nonzero_by_row(labels)  # of each row
    rows_of = _nonzero_by_row(labels[shuffled].T)  # of each class, as positions in `shuffled`
    left = counts.copy()  # labels per class that wait for a part

    def place(row: int, need: np.ndarray) -> None:
        """Put a row into the part that needs it more; if equal, into the one with more room."""
        first, second = zip(need, room, strict=True)
        into = int(room[1] > 0 and (room[0] == 0 or second > first))
        part[row] = into
        room[into] -= 1
        wanted[into, classes_of[row]] -= 1
        left[classes_of[row]] -= 1

    while left.any():
        rarest = np.where(left > 0, left, num_rows + 1).argmin()
        rows = shuffled[rows_of[rarest]]
        for row in rows[part[rows] < 0]:
            place(row, wanted[:, rarest])
    for row in shuffled[part[shuffled] < 0]:  # those without a label
        place(row, room)
    return np.flatnonzero(part == 1)


def _nonzero_by_row(array: np.ndarray) -> list[np.ndarray]:
    """The columns that are not 0 in each row."""
    rows, columns = np.nonzero(array)
    return np.split(columns, np.searchsorted(rows, np.arange(1, len(array))))

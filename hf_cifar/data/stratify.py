"""Choose rows so that each class keeps its share, for one or multiple labels per image."""

from __future__ import annotations

import math

import numpy as np

from hf_cifar.data.columns import class_counts
from hf_cifar.data.split import Split, subset
from hf_cifar.errors import UserError


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


def stratified(
    labels: np.ndarray, share: float, names: list[str], seed: int, split: str
) -> tuple[np.ndarray, np.ndarray]:
    """Divide rows into two sorted arrays of row numbers; the second gets `share` of each class."""
    counts = class_counts(labels, len(names))
    # With multiple labels per image, a rare label may be in train only.
    if len(labels) < 2 or (labels.ndim == 1 and counts.min() < 2):
        raise UserError(
            f"class {names[counts.argmin()]!r} has one image in {split}; train and validation need one each, "
            "so add another"
        )
    # At least one image of each class in both parts.
    fewest = len(names) if labels.ndim == 1 else min(fewest_images(labels), len(labels) // 2)
    size = min(max(round(len(labels) * share), fewest), len(labels) - fewest)
    second = _choose_rows(labels, size, seed, spare=1)
    return np.setdiff1d(np.arange(len(labels)), second), second


def _choose_rows(labels: np.ndarray, size: int, seed: int, spare: int = 0) -> np.ndarray:
    """Choose `size` row numbers, sorted, with each class in proportion (largest remainder, at least one row).

    spare: minimum number of rows of each class that are not chosen.
    """
    if labels.ndim == 2:
        return stratified_choice(labels, size, seed, spare)
    generator = np.random.default_rng(seed)
    classes, counts = np.unique(labels, return_counts=True)
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
    chosen = [
        generator.permutation(np.flatnonzero(labels == c))[:n]
        for c, n in zip(classes, take, strict=True)
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
    num_rows, labels = len(labels), labels.astype(np.int64)
    counts = labels.sum(axis=0)
    # Labels per class, and images, still needed in the first part (not chosen) and the second (chosen).
    chosen = np.minimum(np.maximum(counts * size / num_rows, 1), np.maximum(counts - spare, 0))
    wanted = np.stack([counts - chosen, chosen])
    room = np.array([num_rows - size, size])
    part = np.full(num_rows, -1)
    shuffled = np.random.default_rng(seed).permutation(num_rows)

    def place(row: int, need: np.ndarray) -> None:
        """Put a row into the part that needs it more; if equal, into the one with more room."""
        first, second = zip(need, room, strict=True)
        into = int(room[1] > 0 and (room[0] == 0 or second > first))
        part[row] = into
        room[into] -= 1
        wanted[into] -= labels[row]

    while True:
        waiting = shuffled[part[shuffled] < 0]
        left = labels[waiting].sum(axis=0)
        if not left.any():
            break
        rarest = np.where(left > 0, left, num_rows + 1).argmin()
        for row in waiting[labels[waiting, rarest] > 0]:
            place(row, wanted[:, rarest])
    for row in waiting:  # those without a label
        place(row, room)
    return np.flatnonzero(part == 1)

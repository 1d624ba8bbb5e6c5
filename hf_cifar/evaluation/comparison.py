"""Compare two models on the same images: is one better, or is the difference due to chance?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_cifar.config.metrics import shown
from hf_cifar.errors import UserError
from hf_cifar.evaluation.intervals import LEVEL, mcnemar, paired_difference
from hf_cifar.evaluation.predictions import Predictions, saved_splits
from hf_cifar.evaluation.tables import render_cell
from hf_cifar.text import listed, render_table

Array = np.ndarray
# Balanced accuracy is compared too if the largest class has at least this many times the images of the
# smallest.
UNEQUAL = 2


def compare_runs(folders: Sequence[str | Path], split: str = "auto") -> dict[str, Any]:
    """Compare the saved predictions of two runs.

    split: "validation", "test", or "auto": test if both have it, else validation.

    Raises: UserError if they have no split in common, or the images or classes differ.
    """
    first, second = folders
    if Path(first).resolve() == Path(second).resolve():
        raise UserError(f"{first} and {second} are the same run; pass two different folders")
    if split == "auto":
        common = [s for s in ("test", "validation") if all(s in saved_splits(f) for f in folders)]
        if not common:
            raise UserError(
                f"{first} has predictions for {listed(saved_splits(first)) or 'no split'}, {second} for "
                f"{listed(saved_splits(second)) or 'no split'}; run hf-cifar evaluate for the missing split"
            )
        split = common[0]
    return compare_predictions(Predictions.load(first, split), Predictions.load(second, split))


def compare_predictions(first: Predictions, second: Predictions) -> dict[str, Any]:
    """Compute the metrics of both, and the differences in accuracy and balanced accuracy (second minus
    first), as plain values. Balanced accuracy is not defined for multi-label data.

    Raises: UserError if their rows, labels or classes differ.
    """
    _require_same_images(first, second)
    order = [np.argsort(predictions.row_ids) for predictions in (first, second)]
    hits = [p.correct[rows] for p, rows in zip((first, second), order, strict=True)]
    only_first, only_second = int((hits[0] & ~hits[1]).sum()), int((hits[1] & ~hits[0]).sum())
    count, balanced = len(hits[0]), {}
    if first.labels.ndim == 1:
        balanced = _balanced_difference(hits[0], hits[1], first.labels[order[0]])
    return {
        "split": first.split,
        "num_images": count,
        "first": first.metrics,
        "second": second.metrics,
        "both_correct": int((hits[0] & hits[1]).sum()),
        "only_first_correct": only_first,
        "only_second_correct": only_second,
        "both_wrong": int((~hits[0] & ~hits[1]).sum()),
        "accuracy_difference": (only_second - only_first) / count,
        "accuracy_difference_interval": paired_difference(only_first, only_second, count).tolist(),
        "mcnemar_p": mcnemar(only_first, only_second),
        **balanced,
    }


def _balanced_difference(first: Array, second: Array, labels: Array) -> dict[str, Any]:
    """Return the difference in the mean recall of the classes that have images, and its interval."""
    counts = np.bincount(labels)
    has_images = counts > 0
    only_first, only_second = (
        np.bincount(labels[wins], minlength=len(counts))[has_images]
        for wins in (first & ~second, second & ~first)
    )
    counts = counts[has_images]
    return {
        "balanced_accuracy_difference": float(((only_second - only_first) / counts).mean()),
        "balanced_accuracy_difference_interval": paired_difference(
            only_first, only_second, counts
        ).tolist(),
        "smallest_class": int(counts.min()),
        "largest_class": int(counts.max()),
    }


def _require_same_images(first: Predictions, second: Predictions) -> None:
    if first.id2label != second.id2label:
        raise UserError(
            f"the two runs have different classes: {listed(list(first.id2label.values())[:5])} and "
            f"{listed(list(second.id2label.values())[:5])}; compare runs on the same data"
        )
    a, b = (dict(zip(p.row_ids.tolist(), p.labels.tolist(), strict=True)) for p in (first, second))
    if a.keys() != b.keys():
        raise UserError(
            f"the two runs predicted different {first.split} images: {len(a):,} and {len(b):,}, with "
            f"{len(a.keys() & b.keys()):,} in common; compare runs on the same data, evaluated with the same "
            "--split_seed and limit"
        )
    differing = sum(a[row] != b[row] for row in a)
    if differing:
        raise UserError(
            f"{differing:,} of {len(a):,} {first.split} images have different labels in the two runs; "
            "compare runs on the same data"
        )


def render_comparison(comparison: dict[str, Any], names: Sequence[str]) -> str:
    """Format a comparison for people: the metrics of both runs, and a sentence about the difference."""
    table = render_table(
        [f"{comparison['split']}, {LEVEL:.0%} interval", *names],
        [
            [name, *(render_cell(comparison[run], name) for run in ("first", "second"))]
            for name in ("num_images", *shown("comparison", comparison["first"]))
        ],
    )
    balanced = ""
    if comparison.get("largest_class", 0) >= UNEQUAL * comparison.get("smallest_class", 1):
        found = comparison["balanced_accuracy_difference"]
        ends = comparison["balanced_accuracy_difference_interval"]
        clear = ends[0] > 0 or ends[1] < 0
        balanced = (
            f"\nbalanced accuracy of {names[1]} minus {names[0]}: {found:+.4f} [{ends[0]:+.4f}, "
            f"{ends[1]:+.4f}]: {_verdict(names, found, is_clear=clear)}"
        )
    return (
        f"{table}\n\ncorrect only in {names[0]}: {comparison['only_first_correct']:,}; only in {names[1]}: "
        f"{comparison['only_second_correct']:,}; in both: {comparison['both_correct']:,}; in neither: "
        f"{comparison['both_wrong']:,}\n"
        f"{render_difference(comparison, names)}{balanced}"
    )


def render_difference(comparison: dict[str, Any], names: Sequence[str]) -> str:
    """Format the difference in accuracy with its interval, and what follows from it."""
    difference, (low, high) = (
        comparison["accuracy_difference"], comparison["accuracy_difference_interval"],
    )  # fmt: skip
    p = comparison["mcnemar_p"]
    verdict = _verdict(names, difference, is_clear=p < 1 - LEVEL)
    return (
        f"accuracy of {names[1]} minus {names[0]}: {difference:+.4f} [{low:+.4f}, {high:+.4f}], McNemar's "
        f"exact p = {p:.2g}: {verdict}"
    )


def _verdict(names: Sequence[str], difference: float, *, is_clear: bool) -> str:
    return (
        f"{names[difference > 0]} is better" if is_clear else "the difference may be due to chance"
    )

from __future__ import annotations

import numpy as np
import pytest

from hf_cifar.evaluation.intervals import wilson
from hf_cifar.evaluation.mistakes import (
    confused_pairs,
    least_confident_hits,
    slices,
    worst_errors,
)

NAMES = ["cat", "dog", "frog"]


def test_most_confused_pairs_come_first_with_their_share():
    confusion = np.array([[6, 3, 1], [4, 16, 0], [0, 0, 5]])
    assert confused_pairs(confusion, NAMES) == [
        {"truth": "dog", "prediction": "cat", "num_images": 4, "share": 0.2},
        {"truth": "cat", "prediction": "dog", "num_images": 3, "share": 0.3},
        {"truth": "cat", "prediction": "frog", "num_images": 1, "share": 0.1},
    ]


def test_confused_pairs_are_limited_and_do_not_change_the_matrix():
    confusion = np.array([[6, 3, 1], [4, 16, 0], [0, 0, 5]])
    assert len(confused_pairs(confusion, NAMES, limit=2)) == 2
    assert confusion.trace() == 27


def test_confused_pairs_have_images_and_ties_are_in_class_order():
    assert confused_pairs(np.diag([3, 4, 5]), NAMES) == []
    pairs = confused_pairs([[1, 2, 2], [0, 1, 0], [2, 0, 1]], NAMES)
    assert [(p["truth"], p["prediction"]) for p in pairs] == [
        ("cat", "dog"), ("cat", "frog"), ("frog", "cat"),
    ]  # fmt: skip


def test_errors_and_hits_are_ordered_by_confidence():
    confidences = np.array([0.9, 0.6, 0.8, 0.55, 0.7])
    hits = np.array([False, True, False, True, True])
    assert worst_errors(confidences, hits).tolist() == [0, 2]
    assert worst_errors(confidences, hits, limit=1).tolist() == [0]
    assert least_confident_hits(confidences, hits).tolist() == [3, 1, 4]


def test_slices_have_equal_sizes_and_their_accuracy():
    values = np.arange(100.0)[::-1]
    hits = values < 75  # correct except in the highest quarter
    parts = slices(values, hits)
    assert [part["num_images"] for part in parts] == [25] * 4
    assert [part["accuracy"] for part in parts] == [1, 1, 1, 0]
    assert [(part["low"], part["high"]) for part in parts] == [
        (0, 24),
        (25, 49),
        (50, 74),
        (75, 99),
    ]
    assert parts[3]["interval"] == pytest.approx(wilson(0, 25).tolist())


def test_equal_values_form_one_slice():
    part, *empty = slices(np.zeros(10), np.ones(10))
    assert (part["num_images"], part["accuracy"]) == (10, 1)
    assert empty == [None] * 3

from __future__ import annotations

import numpy as np

from hf_cifar.evaluation.errors import confused_pairs

NAMES = ["cat", "dog", "frog"]


def test_the_most_confused_pairs_come_first_with_their_share_of_the_truth():
    confusion = np.array([[6, 3, 1], [4, 16, 0], [0, 0, 5]])
    assert confused_pairs(confusion, NAMES) == [
        {"truth": "dog", "prediction": "cat", "num_images": 4, "share": 0.2},
        {"truth": "cat", "prediction": "dog", "num_images": 3, "share": 0.3},
        {"truth": "cat", "prediction": "frog", "num_images": 1, "share": 0.1},
    ]


def test_confused_pairs_are_limited_and_leave_the_matrix_alone():
    confusion = np.array([[6, 3, 1], [4, 16, 0], [0, 0, 5]])
    assert len(confused_pairs(confusion, NAMES, limit=2)) == 2
    assert confusion.trace() == 27


def test_no_mistake_is_no_pair_and_equal_pairs_keep_the_order_of_the_classes():
    assert confused_pairs(np.diag([3, 4, 5]), NAMES) == []
    pairs = confused_pairs([[1, 2, 2], [0, 1, 0], [2, 0, 1]], NAMES)
    assert [(p["truth"], p["prediction"]) for p in pairs] == [
        ("cat", "dog"), ("cat", "frog"), ("frog", "cat"),
    ]  # fmt: skip

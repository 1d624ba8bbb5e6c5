from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier

from hf_cifar.evaluation.intervals import wilson
from hf_cifar.evaluation.mistakes import (
    confused_pairs,
    least_confident_hits,
    slices,
    suspected_label_errors,
    suspected_multi_label_errors,
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


def test_planted_label_errors_are_found_on_real_images():
    digits = load_digits()
    generator = np.random.default_rng(0)
    planted = generator.choice(len(digits.target), 50, replace=False)
    labels = digits.target.copy()
    labels[planted] = (labels[planted] + generator.integers(1, 10, 50)) % 10
    # Each image is judged by a model that has not seen its label.
    probabilities = cross_val_predict(
        KNeighborsClassifier(10),
        digits.data,
        labels,
        cv=StratifiedKFold(5, shuffle=True, random_state=0),
        method="predict_proba",
    )
    count, order = suspected_label_errors(probabilities, labels)
    assert len(np.intersect1d(order[:60], planted)) >= 45
    assert 30 <= count <= 60  # the estimate is conservative


def test_planted_multi_label_errors_are_found_on_real_images():
    digits = load_digits()
    generator = np.random.default_rng(0)
    truth = np.stack(
        [digits.target % 2, digits.target > 4, np.isin(digits.target, [2, 3, 5, 7])], 1
    )
    planted = generator.choice(len(truth), 50, replace=False)
    labels = truth.astype(int)
    labels[planted, generator.integers(0, 3, 50)] ^= 1
    scores = np.stack(
        [
            cross_val_predict(
                KNeighborsClassifier(10), digits.data, column, method="predict_proba",
                cv=StratifiedKFold(5, shuffle=True, random_state=0),
            )[:, 1]
            for column in labels.T
        ],
        axis=1,
    )  # fmt: skip
    count, order = suspected_multi_label_errors(scores, labels)
    assert len(np.intersect1d(order[:60], planted)) >= 45
    assert 30 <= count <= 80
    labels[:, 0] = 1  # not informative
    assert suspected_multi_label_errors(scores[:, :1], labels[:, :1])[0] == 0
    assert suspected_multi_label_errors(scores, labels)[0] > 0


def test_suspect_positions_are_right_if_a_class_has_no_images():
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 2, 3], 40)  # class 1 is missing
    probabilities = np.full((120, 4), 0.01)
    probabilities[np.arange(120), labels] += 0.9 + generator.uniform(0, 0.06, 120)
    labels[7] = 3
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    count, order = suspected_label_errors(probabilities, labels)
    assert (count, order.tolist()) == (1, [7])
    assert suspected_label_errors(probabilities[:5], labels[:5])[0] == 0  # a single class


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

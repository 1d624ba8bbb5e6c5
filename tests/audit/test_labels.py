"""hf_cifar.audit.labels: the results of cleanlab, and planted errors."""

from __future__ import annotations

import numpy as np
import pytest
from cleanlab.count import compute_confident_joint, num_label_issues
from cleanlab.filter import find_label_issues
from cleanlab.multilabel_classification.filter import find_label_issues as find_multi_label_issues
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier

from hf_cifar.audit.labels import confident_joint, doubted_labels, pruned_labels, suspected_labels


def random_predictions(seed):
    """Probabilities [N, K] of a model that is right more or less often; labels [N], some of them wrong."""
    generator = np.random.default_rng(seed)
    num_classes = int(generator.integers(2, 9))
    truth = np.append(np.arange(num_classes), generator.integers(0, num_classes, 300))
    logits = generator.normal(size=(len(truth), num_classes))
    logits += generator.uniform(0, 3) * np.eye(num_classes)[truth]
    probabilities = np.exp(logits * generator.uniform(0.3, 3))
    wrong = generator.random(len(truth)) < generator.uniform(0, 0.4)
    labels = np.where(wrong, generator.integers(0, num_classes, len(truth)), truth)
    labels[:num_classes] = np.arange(num_classes)
    return probabilities / probabilities.sum(axis=1, keepdims=True), labels


@pytest.mark.filterwarnings("ignore:May not flag")
@pytest.mark.parametrize("seed", range(60))
def test_joint_and_pruned_labels_are_those_of_cleanlab(seed):
    """Except where equal counts are rounded: which one is rounded up there depends on numpy's sort."""
    probabilities, labels = random_predictions(seed)
    ours, theirs = (
        confident_joint(probabilities, labels),
        compute_confident_joint(labels, probabilities),
    )
    assert ours.sum(axis=1).tolist() == np.bincount(labels).tolist()
    assert np.abs(ours - theirs).max() <= 1
    counted = compute_confident_joint(labels, probabilities, calibrate=False)
    clear = np.array([len(set(row[row > 0])) == np.count_nonzero(row) for row in counted])
    assert np.array_equal(ours[clear], theirs[clear])
    same = (ours == theirs).all(axis=1)[labels]
    found, expected = (
        pruned_labels(probabilities, labels),
        find_label_issues(labels, probabilities, filter_by="both", n_jobs=1),
    )
    assert np.array_equal(found[same], expected[same])


def test_the_comparison_with_cleanlab_covers_many_labels():
    """Guards the test above: few of its rows are left out, and many labels are doubted."""
    doubted = clear = classes = 0
    for seed in range(60):
        probabilities, labels = random_predictions(seed)
        ours = confident_joint(probabilities, labels)
        clear += (ours == compute_confident_joint(labels, probabilities)).all(axis=1).sum()
        classes += len(ours)
        doubted += pruned_labels(probabilities, labels).sum()
    assert clear > 0.95 * classes
    assert doubted > 1000


@pytest.mark.parametrize("seed", range(20))
def test_doubted_labels_are_the_least_probable_of_each_class(seed):
    """As many of each class as cleanlab finds by confident learning."""
    probabilities, labels = random_predictions(seed)
    found = doubted_labels(probabilities, labels)
    expected = find_label_issues(labels, probabilities, filter_by="confident_learning", n_jobs=1)
    for label in np.unique(labels):
        own, rows = probabilities[:, label], labels == label
        assert found[rows].sum() == min(expected[rows].sum(), rows.sum() - 1)
        if found[rows].any():
            assert own[rows & found].max() <= own[rows & ~found].min()


@pytest.mark.parametrize("seed", range(20))
def test_suspects_are_those_of_cleanlab(seed):
    probabilities, labels = random_predictions(seed)
    count, order = suspected_labels(probabilities, labels)
    assert count == num_label_issues(labels, probabilities)
    expected = find_label_issues(
        labels, probabilities, n_jobs=1, filter_by="predicted_neq_given",
        return_indices_ranked_by="self_confidence",
    )  # fmt: skip
    assert order.tolist() == expected.tolist()


@pytest.mark.parametrize("seed", range(20))
def test_multi_label_suspects_are_those_of_cleanlab(seed):
    generator = np.random.default_rng(seed)
    labels = (generator.random((200, 4)) < 0.4).astype(int)
    scores = 1 / (1 + np.exp(-generator.normal(size=labels.shape) - 3 * (labels - 0.5)))
    given = [np.flatnonzero(row).tolist() for row in labels]
    count, order = suspected_labels(scores, labels)
    assert count == find_multi_label_issues(given, scores, filter_by="both", n_jobs=1).sum()
    expected = find_multi_label_issues(
        given, scores, n_jobs=1, filter_by="predicted_neq_given",
        return_indices_ranked_by="self_confidence",
    )  # fmt: skip
    assert order.tolist() == expected.tolist()


def test_every_class_keeps_an_image():
    """Even one whose images all look like another class."""
    labels = np.repeat([0, 1], [20, 4])
    probabilities = np.tile([0.9, 0.1], (24, 1))
    for find in (doubted_labels, pruned_labels):
        doubted = find(probabilities, labels)
        assert doubted[20:].sum() == 3 and not doubted[:20].any()


def test_planted_label_errors_are_found_on_real_images():
    digits = load_digits()
    generator = np.random.default_rng(0)
    planted = generator.choice(len(digits.target), 50, replace=False)
    labels = digits.target.copy()
    labels[planted] = (labels[planted] + generator.integers(1, 10, 50)) % 10
    # Each image is predicted by a model that was not trained on its label.
    probabilities = cross_val_predict(
        KNeighborsClassifier(10),
        digits.data,
        labels,
        cv=StratifiedKFold(5, shuffle=True, random_state=0),
        method="predict_proba",
    )
    count, order = suspected_labels(probabilities, labels)
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
    count, order = suspected_labels(scores, labels)
    assert len(np.intersect1d(order[:60], planted)) >= 45
    assert 30 <= count <= 80
    labels[:, 0] = 1  # not informative
    assert suspected_labels(scores[:, :1], labels[:, :1])[0] == 0
    assert suspected_labels(scores, labels)[0] > 0


def test_suspect_positions_are_right_if_a_class_has_no_images():
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 2, 3], 40)  # class 1 is missing
    probabilities = np.full((120, 4), 0.01)
    probabilities[np.arange(120), labels] += 0.9 + generator.uniform(0, 0.06, 120)
    labels[7] = 3
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    count, order = suspected_labels(probabilities, labels)
    assert (count, order.tolist()) == (1, [7])
    assert suspected_labels(probabilities[:5], labels[:5])[0] == 0  # a single class

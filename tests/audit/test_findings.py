"""hf_cifar.audit: similar names, heads in closed form, and labels that are unlikely."""

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from hf_cifar.audit.class_names import misspelt_names, similar_names
from hf_cifar.audit.discriminants import SHRINKAGE, out_of_fold_probabilities
from hf_cifar.audit.labels import UNLIKELY, unlikely_pairs


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["cat", "Cats", "dog"], [["cat", "Cats"]]),
        (["T-shirt", "t_shirt", "T shirts", "shirt"], [["T-shirt", "t_shirt", "T shirts"]]),
        (["1-1", "11", "1_1"], []),
        (["bus", "glass", "gas"], []),
        (["café", "CAFÉ"], [["café", "CAFÉ"]]),
    ],
)
def test_names_that_differ_in_spelling_are_grouped(names, expected):
    assert similar_names(names) == expected


def clusters(count=600, num_classes=4, distance=3.0):
    generator = np.random.default_rng(0)
    labels = np.arange(count) % num_classes
    centres = distance * generator.normal(size=(num_classes, 12))
    return centres[labels] + generator.normal(size=(count, 12)), labels


def test_the_heads_equal_those_of_scikit_learn():
    features, labels = clusters(distance=0.6)
    folds = np.random.default_rng(1).integers(0, 5, len(labels))
    found = out_of_fold_probabilities(features, labels, folds, 4)
    logits = np.zeros((len(labels), 4))
    for fold in range(5):
        out = folds == fold
        x, y = features[~out], labels[~out]
        # scikit-learn's own estimate divides by all images, this one by fewer.
        means = np.stack([x[y == k].mean(axis=0) for k in range(4)])
        inside = x - means[y]
        covariance = inside.T @ inside / (len(x) - 4)
        ridge = SHRINKAGE * np.trace(covariance) / len(covariance)
        shrunk = (1 - SHRINKAGE) * covariance + ridge * np.eye(len(covariance))
        weights = np.linalg.solve(shrunk, means.T)
        prior = np.log(np.bincount(y) / len(y))
        logits[out] = features[out] @ weights - 0.5 * (means.T * weights).sum(axis=0) + prior
        theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=SHRINKAGE).fit(x, y)
        agree = (found[out].argmax(axis=1) == theirs.predict(features[out])).mean()
        assert agree >= 0.99
    # The same logits, up to one temperature, and no other temperature fits the labels better.
    centred = logits - logits.mean(axis=1, keepdims=True)
    own = np.log(found) - np.log(found).mean(axis=1, keepdims=True)
    temperature = (centred * own).sum() / (centred * centred).sum()
    np.testing.assert_allclose(own, temperature * centred, atol=2e-2)

    def loss(scale):
        return -np.log(softmax(scale * centred, axis=1)[np.arange(len(labels)), labels]).mean()

    assert loss(temperature) <= min(loss(1.1 * temperature), loss(0.9 * temperature)) + 0.01


def test_labels_are_found_that_were_moved_and_none_without():
    features, labels = clusters(count=2000)
    folds = np.random.default_rng(1).integers(0, 5, len(labels))
    clean = unlikely_pairs(out_of_fold_probabilities(features, labels, folds, 4), labels)
    assert all(pair.score < 5 for pair in clean)
    wrong, moved = labels.copy(), np.flatnonzero(labels == 2)[:50]
    wrong[moved] = 0
    first, *others = unlikely_pairs(out_of_fold_probabilities(features, wrong, folds, 4), wrong)
    assert (first.given, first.suggested) == (0, 2) and first.score > 15
    assert len(np.intersect1d(first.rows, moved)) >= 40 and all(pair.score < 5 for pair in others)


def test_the_expected_number_is_the_sum_of_the_probabilities():
    probabilities = np.tile([0.985, 0.015], (200, 1))
    labels = np.array([1] * 3 + [0] * 197)
    (pair,) = unlikely_pairs(probabilities, labels)
    assert (pair.given, pair.suggested, len(pair.rows)) == (1, 0, 3) and UNLIKELY >= 0.015
    assert pair.expected == pytest.approx(3) and pair.score == pytest.approx(0)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"ship": 100, "shipp": 4, "dog": 90, "dgo": 3}, [["ship", "shipp"], ["dog", "dgo"]]),
        ({"horse": 100, "house": 90}, []),  # two real classes
        ({"horse": 100, "hose": 20}, [["horse", "hose"]]),
        ({"ship": 100, "ships": 3}, []),  # already similar
        ({"class 10": 100, "class 11": 2, "a": 50, "b": 1}, []),
        ({"frog": 100, "dog": 2, "cat": 1}, []),
        ({"Bird": 50, "brid": 2}, [["Bird", "brid"]]),
    ],
)
def test_rare_classes_one_edit_from_another(sizes, expected):
    assert misspelt_names(sizes) == expected

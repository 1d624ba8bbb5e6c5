"""hf_cifar.data.stratify: a stratified split of multi-label images, and folds."""

import hashlib

import numpy as np
import pytest
from datasets import ClassLabel, List
from sklearn.model_selection import StratifiedGroupKFold

from hf_cifar.config.data import DataConfig
from hf_cifar.data.splits import load_splits
from hf_cifar.data.stratify import assign_folds, stratified, stratified_choice
from hf_cifar.errors import UserError

TAGS = ClassLabel(names=["cat", "dog", "owl"])


def config(folder, **options):
    return DataConfig(dataset_name=str(folder), **options)


def drawn_labels(seed, num_rows=400, num_labels=12):
    """Make labels [N, K] with frequencies from one in a hundred images to one in two; some have none."""
    shares = np.geomspace(0.01, 0.5, num_labels)
    return (np.random.default_rng(seed).random((num_rows, num_labels)) < shares).astype(np.uint8)


def test_stratified_choice_has_its_size_seed_and_class_shares():
    labels = drawn_labels(0)
    chosen = stratified_choice(labels, 100, seed=1, spare=1)
    assert len(chosen) == 100 == len(np.unique(chosen)) and (np.diff(chosen) > 0).all()
    np.testing.assert_array_equal(chosen, stratified_choice(labels, 100, seed=1, spare=1))
    assert not np.array_equal(chosen, stratified_choice(labels, 100, seed=2, spare=1))
    # Without stratification, the standard deviation would be 4.3 for 100 images of a class.
    assert np.abs(labels[chosen].sum(axis=0) - labels.sum(axis=0) / 4).max() <= 2


@pytest.mark.parametrize("seed", range(20))
def test_every_class_that_has_two_images_is_in_both_parts(seed):
    labels = drawn_labels(seed)
    chosen = stratified_choice(labels, 40, seed=seed, spare=1)
    inside, counts = labels[chosen].sum(axis=0), labels.sum(axis=0)
    assert (inside[counts > 1] > 0).all()
    assert (counts - inside)[counts > 0].all()


def test_validation_is_taken_from_train(save, make_rows):
    lists = [
        np.flatnonzero(row).tolist() for row in drawn_labels(0, 200, 3) | drawn_labels(1, 200, 3)
    ]
    folder = save(train=make_rows(lists, List(TAGS)))
    splits = load_splits(config(folder))
    assert (len(splits.train), len(splits.validation)) == (180, 20)
    assert not np.intersect1d(splits.train.row_ids, splits.validation.row_ids).size
    assert splits.validation.labels.any(axis=0).all()
    assert splits.hash == load_splits(config(folder)).hash
    assert splits.hash != load_splits(config(folder, split_seed=1)).hash
    few = load_splits(config(folder, max_train_samples=30, max_eval_samples=5))
    assert (len(few.train), len(few.validation)) == (30, 5)
    assert few.train.labels.any(axis=0).all()
    assert np.isin(few.train.row_ids, splits.train.row_ids).all()


def test_the_chosen_rows_never_change():
    # A saved run is resumed, and evaluated later, on the split that these rows define.
    labels = np.random.default_rng(0).integers(0, 7, 300) ** 2 // 7
    single = np.unique(labels, return_inverse=True)[1]
    for each, num_labels, digest in (
        (single, 5, "87294ca8c7204e95"),
        (drawn_labels(0), 12, "2f60d178cd1b4cc5"),
    ):
        chosen = stratified(each, 0.1, [str(i) for i in range(num_labels)], 42, "train")[1]
        assert hashlib.sha256(chosen.astype("<i8").tobytes()).hexdigest()[:16] == digest


def test_a_long_tail_has_the_sizes_of_cifar_10_lt(save, make_rows, caplog):
    caplog.set_level("INFO", logger="hf_cifar")
    rows = make_rows([i % 10 for i in range(1000)], ClassLabel(num_classes=10))
    folder = save(train=rows, validation=rows.select(range(10)))
    splits = load_splits(config(folder, imbalance_factor=100))
    counts = np.bincount(splits.train.labels)
    assert counts.tolist() == [int(100 * 0.01 ** (i / 9)) for i in range(10)]
    assert (
        "--imbalance_factor 100: 242 of 1,000 training images, from 100 of '0' to 1 of '8'"
        in caplog.text
    )
    assert np.array_equal(splits.train.row_ids, np.sort(splits.train.row_ids))
    milder = load_splits(config(folder, imbalance_factor=10))
    assert set(splits.train.row_ids) < set(milder.train.row_ids)


def test_shots_are_images_of_each_class(save, make_rows):
    folder = save(train=make_rows([0] * 30 + [1] * 12))
    one, five = (load_splits(config(folder, shots=shots)).train for shots in (1, 5))
    assert np.bincount(one.labels).tolist() == [1, 1]
    assert np.bincount(five.labels).tolist() == [5, 5]
    assert set(one.row_ids) < set(five.row_ids)
    with pytest.raises(UserError, match=r"--shots 12: class .* has 11 training images"):
        load_splits(config(folder, shots=12))


@pytest.mark.parametrize("num_folds", [2, 5, 7])
def test_folds_and_their_classes_differ_by_at_most_one_image(num_folds):
    labels = np.random.default_rng(0).choice(4, 403, p=[0.6, 0.25, 0.1, 0.05])
    fold_of = assign_folds(labels, num_folds, seed=0)
    table = np.zeros((num_folds, 4), int)
    np.add.at(table, (fold_of, labels), 1)
    assert np.ptp(table.sum(axis=1)) <= 1 and np.ptp(table, axis=0).max() <= 1
    np.testing.assert_array_equal(fold_of, assign_folds(labels, num_folds, seed=0))
    assert not np.array_equal(fold_of, assign_folds(labels, num_folds, seed=1))


def test_folds_of_multiple_labels_have_their_shares():
    labels = drawn_labels(0)
    fold_of = assign_folds(labels, 4, seed=0)
    assert np.bincount(fold_of).tolist() == [100] * 4
    table = np.stack([labels[fold_of == fold].sum(axis=0) for fold in range(4)])
    # Without stratification, the standard deviation would be 4.3 for 100 images of a class.
    assert np.abs(table - labels.sum(axis=0) / 4).max() <= 3


def test_groups_are_divided_as_evenly_as_by_scikit_learn():
    found = np.array([unevenness_of_groups(seed) for seed in range(20)])
    ours, reference = found.mean(axis=0)
    assert ours < 1.1 * reference


def unevenness_of_groups(seed):
    """The mean standard deviation of the classes' shares over five folds: ours, and scikit-learn's."""
    generator = np.random.default_rng(seed)
    groups = generator.choice(60, 500)
    labels = (generator.choice(3, 60)[groups] + (generator.random(500) < 0.3)) % 3
    fold_of = assign_folds(labels, 5, seed, groups)
    assert all(len(set(fold_of[groups == group])) == 1 for group in np.unique(groups))
    reference = np.zeros(500, int)
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(labels, labels, groups)
    for fold, (_, held_out) in enumerate(folds):
        reference[held_out] = fold

    def unevenness(fold_of):
        table = np.zeros((5, 3))
        np.add.at(table, (fold_of, labels), 1)
        return (table / table.sum(axis=0)).std(axis=0).mean()

    return unevenness(fold_of), unevenness(reference)


def test_groups_of_multiple_labels_stay_together():
    labels, groups = drawn_labels(3), np.arange(400) // 8
    fold_of = assign_folds(labels, 5, 0, groups)
    assert (fold_of.reshape(50, 8) == fold_of[::8, None]).all()
    assert np.abs(np.bincount(fold_of) - 80).max() <= 16

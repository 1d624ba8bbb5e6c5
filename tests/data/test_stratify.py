"""hf_cifar.data.stratify: a stratified split of multi-label images."""

import hashlib

import numpy as np
import pytest
from datasets import ClassLabel, List

from hf_cifar.config.data import DataConfig
from hf_cifar.data.splits import load_splits
from hf_cifar.data.stratify import stratified, stratified_choice
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

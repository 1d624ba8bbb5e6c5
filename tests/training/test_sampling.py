"""hf_cifar.training.sampling: classes drawn equally often."""

from collections import Counter

import numpy as np
import pytest

from hf_cifar.training.sampling import BalancedSampler

LABELS = np.array([0] * 10 + [1] * 4 + [3] * 3)


@pytest.mark.parametrize(("balance", "draws"), [("oversample", 10), ("undersample", 3)])
def test_every_class_is_drawn_equally_often_and_its_rows_nearly(balance, draws):
    sampler = BalancedSampler(LABELS, balance, seed=1)
    rows = list(sampler)
    assert len(rows) == len(sampler) == 3 * draws
    assert set(Counter(LABELS[rows]).values()) == {draws}
    for label in (0, 1, 3):
        counts = [rows.count(row) for row in np.flatnonzero(label == LABELS)]
        assert max(counts) - min(counts) <= 1


def test_an_epoch_has_its_own_order_and_always_the_same():
    def epoch(number, seed=1):
        sampler = BalancedSampler(LABELS, "undersample", seed)
        sampler.set_epoch(number)
        return list(sampler)

    assert epoch(0) == epoch(0) != epoch(1)
    assert epoch(1) != epoch(1, seed=2)
    seen = set().union(*(epoch(number) for number in range(20)))
    assert seen == set(range(len(LABELS)))

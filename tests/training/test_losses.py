"""hf_cifar.training.losses: the loss by the kind of labels, against torch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight

from hf_cifar.training.losses import (
    LOSSES,
    binary_cross_entropy,
    binary_focal,
    effective_weights,
    evaluation_loss,
    focal,
    inverse_weights,
    training_loss,
)


@pytest.fixture
def logits():
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def test_smoothing_of_one_label_equals_cross_entropy(logits):
    labels = F.one_hot(torch.tensor([1, 3, 0, 2, 2, 1]), 4)
    smoothed = labels * 0.9 + 0.1 / 4
    wanted = F.binary_cross_entropy_with_logits(logits, smoothed)
    assert binary_cross_entropy(logits, labels, 0.1) == pytest.approx(wanted.item())


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_suits_the_labels(logits, smoothing):
    ids = torch.tensor([1, 3, 0, 2, 2, 1])
    lists = (logits > 0.3).long()
    single, multiple = (training_loss(smoothing, multi_label=kind) for kind in (False, True))
    wanted = F.cross_entropy(logits, ids, label_smoothing=smoothing)
    assert torch.equal(single(logits, ids), wanted)
    assert torch.equal(multiple(logits, lists), binary_cross_entropy(logits, lists, smoothing))
    single, multiple = (evaluation_loss(multi_label=kind) for kind in (False, True))
    assert torch.equal(single(logits, ids), F.cross_entropy(logits, ids))
    assert torch.equal(multiple(logits, lists), binary_cross_entropy(logits, lists))


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_a_mean_over_the_images(logits, name):
    """Required for accumulation of equal micro-batches."""
    targets = F.one_hot(torch.tensor([1, 3, 0, 2, 2, 1]), 4).float()
    whole = LOSSES[name](logits, targets, label_smoothing=0.1)
    parts = [
        LOSSES[name](logits[i], targets[i], label_smoothing=0.1) for i in torch.arange(6).split(2)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


IDS = torch.tensor([1, 3, 0, 2, 2, 1])
COUNTS = torch.tensor([60.0, 20, 10, 2])


def test_focal_loss_by_hand(logits):
    p = logits.softmax(dim=1)[range(6), IDS]
    assert focal(logits, IDS) == pytest.approx((-((1 - p) ** 2) * p.log()).mean().item())
    assert focal(logits, IDS, gamma=0) == pytest.approx(F.cross_entropy(logits, IDS).item())
    for smoothing in (0.0, 0.1):
        plain = F.cross_entropy(logits, IDS, label_smoothing=smoothing)
        assert focal(logits, IDS, smoothing, gamma=0) == pytest.approx(plain.item())
    each = F.cross_entropy(logits, IDS, reduction="none")
    torch.testing.assert_close(focal(logits, IDS, gamma=0, reduction="none"), each)
    soft = F.one_hot(IDS, 4).float()
    assert focal(logits, soft) == pytest.approx(focal(logits, IDS).item())


def test_binary_focal_loss_equals_torchvision(logits):
    ops = pytest.importorskip("torchvision.ops")
    lists = (logits > 0.3).float()
    wanted = ops.sigmoid_focal_loss(logits, lists, alpha=-1, gamma=2, reduction="mean")
    assert binary_focal(logits, lists) == pytest.approx(wanted.item())


def test_class_weights_are_those_of_scikit_learn_and_of_the_effective_number():
    labels = np.repeat(np.arange(4), COUNTS.int())
    wanted = compute_class_weight("balanced", classes=np.arange(4), y=labels)
    assert inverse_weights(COUNTS).tolist() == pytest.approx(wanted.tolist())
    # By hand: effective numbers (1 - 0.9 ** n) / 0.1.
    numbers = [(1 - 0.9**n) / 0.1 for n in COUNTS.tolist()]
    inverse = [1 / number for number in numbers]
    mean = sum(n * value for n, value in zip(COUNTS.tolist(), inverse, strict=True)) / 92
    wanted = [value / mean for value in inverse]
    assert effective_weights(COUNTS, 0.9).tolist() == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("balance", ["weights", "effective"])
def test_class_weights_reach_the_loss(logits, balance):
    weights = {"weights": inverse_weights, "effective": effective_weights}[balance](COUNTS)
    loss = training_loss(0.0, multi_label=False, balance=balance, counts=COUNTS)
    each = F.cross_entropy(logits, IDS, reduction="none")
    assert loss(logits, IDS) == pytest.approx((each * weights[IDS]).mean().item())
    torch.testing.assert_close(loss(logits, F.one_hot(IDS, 4).float()), loss(logits, IDS))
    smooth = training_loss(0.1, multi_label=False, balance=balance, counts=COUNTS)
    each = F.cross_entropy(logits, IDS, reduction="none", label_smoothing=0.1)
    assert smooth(logits, IDS) == pytest.approx((each * weights[IDS]).mean().item())
    halves = [loss(logits[i], IDS[i]) for i in torch.arange(6).split(3)]
    torch.testing.assert_close(torch.stack(halves).mean(), loss(logits, IDS))


def test_logit_adjustment_by_hand(logits):
    """-log(p_y e^z_y / sum_k p_k e^z_k), Menon et al., equation 10."""
    prior = COUNTS / COUNTS.sum()
    odds = prior * logits.exp()
    wanted = -(odds[range(6), IDS] / odds.sum(dim=1)).log().mean()
    loss = training_loss(0.0, multi_label=False, balance="logit_adjustment", counts=COUNTS)
    assert loss(logits, IDS) == pytest.approx(wanted.item())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_adjusted_logits_of_an_image_without_evidence_are_equal(smoothing):
    """If images of all classes look the same, the best logits are those of equal classes, smoothed or not."""
    labels = torch.repeat_interleave(torch.arange(4), COUNTS.int())
    bias = torch.zeros(4, requires_grad=True)
    loss = training_loss(smoothing, multi_label=False, balance="logit_adjustment", counts=COUNTS)
    loss(bias.expand(len(labels), 4), labels).backward()
    assert bias.grad.tolist() == pytest.approx([0] * 4, abs=1e-6)

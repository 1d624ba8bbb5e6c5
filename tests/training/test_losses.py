"""hf_cifar.training.losses: the loss by the kind of labels, against torch."""

import pytest
import torch
import torch.nn.functional as F

from hf_cifar.training.losses import LOSSES, binary_cross_entropy, evaluation_loss, training_loss


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

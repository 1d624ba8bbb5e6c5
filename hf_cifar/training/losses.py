"""Losses: functions from logits and targets to the mean loss of a batch."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def binary_cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Binary cross-entropy, mean over images and classes. logits, targets [N, K].

    label_smoothing: share of an image's labels that is spread evenly over all classes, like `F.cross_entropy`
    does with a single label: the sum of the labels does not change, and an image without labels has none.
    """
    targets = targets.to(logits.dtype)
    targets = targets.lerp(targets.mean(dim=1, keepdim=True), label_smoothing)
    return F.binary_cross_entropy_with_logits(logits, targets)


# Functions of logits [N, K], targets and label_smoothing. Targets are class ids [N] or probabilities [N, K].
LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "binary_cross_entropy": binary_cross_entropy,
}


def training_loss(label_smoothing: float, *, multi_label: bool) -> Loss:
    """Return the loss to minimise, on images with one label each or with any number of labels."""
    return functools.partial(LOSSES[_name(multi_label)], label_smoothing=label_smoothing)


def evaluation_loss(*, multi_label: bool) -> Loss:
    """Return the loss reported for evaluations, the same for all runs, without label smoothing."""
    return LOSSES[_name(multi_label)]


def _name(multi_label: bool) -> str:
    return "binary_cross_entropy" if multi_label else "cross_entropy"

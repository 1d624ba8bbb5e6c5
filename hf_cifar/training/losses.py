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


def focal(
    logits: Tensor,
    targets: Tensor,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    gamma: float = 2.0,
) -> Tensor:
    """Cross-entropy in which each image counts (1 - p) ** gamma times, with p the probability of its label:
    images that the model already gets right count little.

    Arguments of `F.cross_entropy`; with soft targets, each class counts by its own probability.
    Source: Lin et al., Focal Loss for Dense Object Detection, 2017.
    """
    log_probabilities = F.log_softmax(logits, dim=1)
    if targets.ndim == 1:
        targets = F.one_hot(targets, logits.shape[1])
    soft = targets.to(logits.dtype)
    soft = soft.lerp(soft.new_tensor(1 / logits.shape[1]), label_smoothing)
    losses = (soft * (1 - log_probabilities.exp()) ** gamma * -log_probabilities).sum(dim=1)
    return losses.mean() if reduction == "mean" else losses


def binary_focal(
    logits: Tensor, targets: Tensor, label_smoothing: float = 0.0, gamma: float = 2.0
) -> Tensor:
    """`focal` for multi-label data, mean over images and classes. logits, targets [N, K]."""
    targets = targets.to(logits.dtype)
    off = (targets * logits.neg().sigmoid() + (1 - targets) * logits.sigmoid()) ** gamma
    targets = targets.lerp(targets.mean(dim=1, keepdim=True), label_smoothing)
    return (off * F.binary_cross_entropy_with_logits(logits, targets, reduction="none")).mean()


def adjusted(loss: Callable[..., Tensor], prior: Tensor, label_smoothing: float = 0.0) -> Loss:
    """Add the log of the classes' shares to the logits that `loss` sees.

    The model itself then learns logits for classes that are equally frequent. Labels are smoothed towards
    the shares: an equal part for each class would be more than a rare class has, and raise its logits for
    all images.

    prior: shares [K]. Source: Menon et al., Long-tail Learning via Logit Adjustment, 2021, with tau = 1.
    """

    def adjusted_loss(logits: Tensor, targets: Tensor) -> Tensor:
        shares = prior.to(logits.device)
        if targets.ndim == 1:
            targets = F.one_hot(targets, logits.shape[1])
        smoothed = targets.to(logits.dtype).lerp(shares.expand_as(logits), label_smoothing)
        return loss(logits + shares.log(), smoothed)

    return adjusted_loss


def weighted(loss: Callable[..., Tensor], weights: Tensor) -> Loss:
    """Give each image the weight of its class in `loss`, as a mean over images.

    torch divides by the weights in the batch instead, so that micro-batches would not add up to their batch;
    and it weights the smoothed part of each label by the other classes, where the rare ones dominate.
    """

    def weighted_loss(logits: Tensor, targets: Tensor) -> Tensor:
        own = weights.to(logits.device)
        own = own[targets] if targets.ndim == 1 else targets.to(own.dtype) @ own
        return (own * loss(logits, targets, reduction="none")).mean()

    return weighted_loss


def inverse_weights(counts: Tensor) -> Tensor:
    """Weights [K] proportional to 1 / counts, with mean 1 over the images.

    Source: scikit-learn, class_weight="balanced".
    """
    return counts.sum() / (len(counts) * counts)


def effective_weights(counts: Tensor, beta: float = 0.9999) -> Tensor:
    """Weights [K] proportional to 1 / (1 - beta ** counts), with mean 1 over the images.

    Source: Cui et al., Class-Balanced Loss Based on Effective Number of Samples, 2019.
    """
    weights = (1 - beta) / (1 - beta**counts)
    return weights * counts.sum() / (weights * counts).sum()


# Functions of logits [N, K], targets and label_smoothing. Targets are class ids [N] or probabilities [N, K].
LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "focal": focal,
    "binary_cross_entropy": binary_cross_entropy,
    "binary_focal": binary_focal,
}


def training_loss(
    label_smoothing: float,
    *,
    multi_label: bool,
    name: str = "cross_entropy",
    balance: str = "none",
    counts: Tensor | None = None,
) -> Loss:
    """Return the loss to minimise, on images with one label each or with any number of labels.

    balance: a value of --class_balance; of these, weights, effective and logit_adjustment change the loss,
    by the training images of each class, counts [K].
    """
    plain = LOSSES[("binary_" if multi_label else "") + name]
    loss = functools.partial(plain, label_smoothing=label_smoothing)
    if balance == "logit_adjustment":
        assert counts is not None
        return adjusted(plain, counts / counts.sum(), label_smoothing)
    if balance in CLASS_WEIGHTS:
        assert counts is not None
        return weighted(loss, CLASS_WEIGHTS[balance](counts))
    return loss


def evaluation_loss(*, multi_label: bool) -> Loss:
    """Return the loss reported for evaluations, the same for all runs, without label smoothing."""
    return LOSSES["binary_cross_entropy" if multi_label else "cross_entropy"]


CLASS_WEIGHTS = {"weights": inverse_weights, "effective": effective_weights}

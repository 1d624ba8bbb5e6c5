"""Losses that torch does not have."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def binary_cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Binary cross-entropy, mean over images and classes. logits, targets [N, K].

    label_smoothing: share of an image's labels that is spread evenly over all classes, as `F.cross_entropy`
    does with its one: their number stays, and an image without any stays so.
    """
    targets = targets.to(logits.dtype)
    targets = targets.lerp(targets.mean(dim=1, keepdim=True), label_smoothing)
    return F.binary_cross_entropy_with_logits(logits, targets)

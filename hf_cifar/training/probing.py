"""Linear probing: fit a new head to the features of the pretrained backbone, before all layers train.

A random head has large gradients that change the backbone before the head is of any use. With a fitted head,
training starts from an accurate classifier.

Source: Kumar et al., Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution, 2022.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_cifar.data.split import Split, readable, subset
from hf_cifar.data.stratify import representative_rows
from hf_cifar.data.streams import Stream
from hf_cifar.models.heads import set_head
from hf_cifar.training.features import FeatureStore, described, solve_best

logger = logging.getLogger(__name__)
HELD_OUT = 5  # of this many images, one judges the penalties of the head


def why_not_probed(train: Split | Stream, *, has_vectors: bool) -> str | None:
    """Return the reason why a new head cannot be fitted, or None."""
    if isinstance(train, Stream):
        return "a stream is not read in advance"
    return None if has_vectors else "it is not one linear layer on one feature vector per image"


def probe_sample(train: Split, size: int, seed: int, on_bad_image: str) -> Split:
    """Choose up to `size` images, stratified, that the head is fitted to.

    Raises: UnreadableImages unless `on_bad_image` is skip.
    """
    sample = subset(train, representative_rows(train.labels, size, seed))
    return readable(sample, on_bad_image=on_bad_image)[0]


def probe_head(model: PreTrainedModel, store: FeatureStore, seed: int) -> None:
    """Solve for the head on these features, with the L2 penalty that is best on a fifth of them."""
    labels = store.labels.cpu().numpy()
    held_out = torch.zeros(len(store), dtype=torch.bool)
    held_out[representative_rows(labels, max(1, len(store) // HELD_OUT), seed)] = True
    num_labels = model.config.num_labels
    _, penalty, score = solve_best(part(store, ~held_out), part(store, held_out), num_labels)
    solution, *_ = solve_best(store, store, num_labels, (penalty,))
    set_head(model, solution)
    logger.info(
        "head: fitted to the features of %s training images (%s on %s of them, held out at first)",
        f"{len(store):,}", described(score, store.labels), f"{int(held_out.sum()):,}",
    )  # fmt: skip


def part(store: FeatureStore, chosen: Tensor) -> FeatureStore:
    """Select the images of a store by a mask [N]."""
    chosen = chosen.to(store.labels.device)
    return FeatureStore(store.features[:, chosen], store.labels[chosen], store.name)

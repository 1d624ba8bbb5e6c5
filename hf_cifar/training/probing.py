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
from hf_cifar.models.heads import linear_head, set_head
from hf_cifar.runs.processes import is_sharded
from hf_cifar.training.features import FeatureStore, HeadSolver, solve_best
from hf_cifar.training.losses import Loss

logger = logging.getLogger(__name__)
HELD_OUT = 5  # one image in this many is held out to choose the penalty of the head


def why_not_probed(model: PreTrainedModel, sample: Split | Stream) -> str | None:
    """Return the reason why a new head cannot be fitted to a sample of images, or None."""
    head, classes = linear_head(model), model.config.num_labels
    if head is None or head.bias is None:
        return "it is not one linear layer with a bias"
    if isinstance(sample, Stream):
        return "a stream is not read in advance"
    if len(sample) < max(2, classes):
        return f"there are too few images ({len(sample):,}) for the number of classes ({classes:,})"
    if is_sharded():
        return "with FSDP or DeepSpeed, the complete model may not fit on one device"
    return None


def probe_sample(train: Split | Stream, size: int, seed: int) -> Split | Stream:
    """Choose up to `size` images, stratified, that the head is fitted to. Unreadable ones are left out. A
    stream is returned as it is."""
    if isinstance(train, Stream):
        return train
    sample = subset(train, representative_rows(train.labels, size, seed))
    return readable(sample, on_bad_image="skip")[0]


def probe_new_rows(model: PreTrainedModel, store: FeatureStore, seed: int, loss: Loss) -> None:
    """Solve for the rows of new classes in a grown head, as `probe_head` does; the other rows stay."""
    head, features, labels = linear_head(model), store.features[0], store.labels
    assert head is not None
    rows = torch.tensor(model.new_rows, device=features.device)
    with torch.inference_mode():
        known = head(features).clone()

    def loss_of(logits: Tensor, images: Tensor) -> Tensor:
        return loss(known[images].index_copy(1, rows, logits), labels[images])

    images = torch.arange(len(store), device=features.device)
    held_out = held_out_rows(store, seed)
    solver = HeadSolver(features, images, len(rows), loss_of)
    _, penalty, found = solve_best(solver.of(~held_out), features[held_out], images[held_out])
    solution = solver.solve(penalty)
    with torch.no_grad():
        head.weight[rows] = solution[:, :-1]
        head.bias[rows] = solution[:, -1]
    logger.info(
        "head: %d new rows fitted to the features of %s training images; cross-entropy on %s of them, which "
        "were held out to choose the L2 penalty: %.4f",
        len(rows), f"{len(store):,}", f"{int(held_out.sum()):,}", found,
    )  # fmt: skip


def held_out_rows(store: FeatureStore, seed: int) -> Tensor:
    """Return which images choose the penalty, a mask [N]."""
    held_out = torch.zeros(len(store), dtype=torch.bool)
    size = max(1, len(store) // HELD_OUT)
    held_out[representative_rows(store.labels.cpu().numpy(), size, seed)] = True
    return held_out.to(store.labels.device)


def probe_head(model: PreTrainedModel, store: FeatureStore, seed: int, loss: Loss) -> None:
    """Solve for the head on these features, with the L2 penalty that is best on a fifth of them."""
    features, labels = store.features[0], store.labels
    held_out = held_out_rows(store, seed)
    solver = HeadSolver(features, labels, model.config.num_labels, loss)
    _, penalty, found = solve_best(solver.of(~held_out), features[held_out], labels[held_out])
    set_head(model, solver.solve(penalty))
    logger.info(
        "head: fitted to the features of %s training images; cross-entropy on %s of them, which were held "
        "out to choose the L2 penalty: %.4f", f"{len(store):,}", f"{int(held_out.sum()):,}", found,
    )  # fmt: skip

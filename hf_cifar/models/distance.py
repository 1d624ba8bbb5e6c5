"""The distance of an image from the training images, in feature space.

The feature is the input of the head, scaled to length 1. The distance is the Mahalanobis distance to the
nearest class: each class has the mean of its training images, and all share one covariance matrix, estimated
with shrinkage because there are few images for its size.

Sources: Lee et al., A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial
Attacks, 2018; Mueller and Hein, Mahalanobis++: Improving OOD Detection via Feature Normalization, 2025;
Ledoit and Wolf, A well-conditioned estimator for large-dimensional covariance matrices, 2004.
"""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from hf_cifar.errors import UserError
from hf_cifar.models.files import REJECT
from hf_cifar.text import one_line

# Smallest variance of a direction, relative to the mean one: features of one class can be all the same.
LEAST_VARIANCE = 1e-6


@dataclass
class RejectableOutput(ImageClassifierOutput):
    """Logits [N, K], and the distance [N] of each image."""

    distances: Tensor | None = None


class Distance(nn.Module):
    """Features [N, D] -> distances [N], in float32 whatever the features are.

    center [D] is subtracted from features of length 1, which are then multiplied by whitening [D, D].
    means [K, D]: of the classes, after both.
    """

    center: Tensor
    whitening: Tensor
    means: Tensor

    def __init__(self, center: Tensor, whitening: Tensor, means: Tensor) -> None:
        super().__init__()
        for name, value in (("center", center), ("whitening", whitening), ("means", means)):
            self.register_buffer(name, value)

    @classmethod
    def fit(cls, features: np.ndarray, labels: np.ndarray) -> Distance:
        """Fit class means and the shared covariance to features [N, D] and labels [N]. A class without images
        is left out."""
        from sklearn.covariance import ledoit_wolf

        features = features.astype(np.float64)
        lengths = np.linalg.norm(features, axis=1, keepdims=True)
        features = features / np.maximum(lengths, np.finfo(np.float32).tiny)
        classes, rows = np.unique(labels, return_inverse=True)
        means = np.stack([features[rows == row].mean(axis=0) for row in range(len(classes))])
        covariance, _ = ledoit_wolf(features - means[rows], assume_centered=True)
        variances, axes = np.linalg.eigh(covariance)
        least = LEAST_VARIANCE * max(variances.mean(), np.finfo(np.float32).tiny)
        whitening = axes / np.sqrt(np.maximum(variances, least))
        center = features.mean(axis=0)
        values = (center, whitening, (means - center) @ whitening)
        return cls(*(torch.from_numpy(value).float() for value in values))

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            points = (F.normalize(features.float(), dim=1) - self.center) @ self.whitening
            squares = points.square().sum(dim=1, keepdim=True) + self.means.square().sum(dim=1)
            squares = squares - 2 * points @ self.means.T
            return squares.clamp_min(0).amin(dim=1).sqrt()

    def to_bytes(self) -> bytes:
        """Return the content of the file beside a model."""
        return save({name: value.cpu().contiguous() for name, value in self.state_dict().items()})


def load_distance(folder: Path) -> Distance:
    """Load the file beside a saved model. Raises: UserError for a missing or damaged one."""
    path = folder / REJECT
    problem = f"cannot read {path}, which the model needs to reject images"
    step = "restore it, or remove 'reject' from its config.json"
    if not path.is_file():
        raise UserError(f"{problem}: it is missing; {step}")
    try:
        tensors = load_file(path)
        center, whitening, means = (
            tensors[each].float() for each in ("center", "whitening", "means")
        )
        width = len(center)
        if whitening.shape != (width, width) or means.shape[1:] != (width,) or not len(means):
            raise ValueError("its shapes do not fit together")
        return Distance(center, whitening, means)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{problem} ({one_line(error, 200)}); {step}") from None


def plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model that computes in its own number format, without the autocast of accelerate."""
    copied = copy.deepcopy(model)
    copied.__dict__.pop("forward", None)
    return copied.eval()


def rejecting(model: PreTrainedModel, distance: Distance, head: str) -> PreTrainedModel:
    """Return a plain copy of a model that also returns the distance of each image.

    head: the name of its module. Threads may use the copy at the same time.
    Raises: UserError if the distance is for features of another size.
    """
    copied = plain_copy(model)
    try:
        layer = copied.get_submodule(head)
    except AttributeError:
        raise UserError(
            f"the model has no module {head!r}, which its config.json names for rejection; restore it"
        ) from None
    width = getattr(layer, "in_features", None)
    if width != len(distance.center):
        raise UserError(
            f"{REJECT} is for {len(distance.center)} features, but the model has {width}; restore both files"
        )
    copied.add_module("distance", copy.deepcopy(distance).to(next(model.parameters()).device))
    seen = threading.local()

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.features = inputs[0]

    def measure(
        whole: nn.Module, _: tuple[Tensor, ...], output: ImageClassifierOutput
    ) -> RejectableOutput:
        return RejectableOutput(logits=output.logits, distances=whole.distance(seen.features))

    layer.register_forward_pre_hook(note)
    copied.register_forward_hook(measure)
    return copied

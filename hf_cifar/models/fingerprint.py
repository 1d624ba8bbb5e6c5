"""The identity of a model: a hash of everything that determines its answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_cifar.models.ensemble import EnsembleForImageClassification
from hf_cifar.models.exported import ExportedClassifier

CONFIG_KEYS = ("id2label", "problem_type", "thresholds", "value_range")
ENSEMBLE_KEYS = ("scales", "shifts", "views", "logits_divisor")


def model_hash(model: PreTrainedModel, preprocessing: dict[str, Any]) -> str:
    """Return the SHA-256 of a model's weights, labels and thresholds, and of its preprocessing.

    preprocessing: plain values. The same for a copy of the model, wherever it lies.
    """
    found = {name: getattr(model.config, name, None) for name in CONFIG_KEYS}
    if reject := getattr(model.config, "reject", None):
        found["reject"] = reject
    if isinstance(model, EnsembleForImageClassification):
        found |= {name: getattr(model.config, name) for name in ENSEMBLE_KEYS}
    found |= {"class": type(model).__name__, "preprocessing": preprocessing}
    digest = hashlib.sha256(json.dumps(found, sort_keys=True, default=str).encode())
    if isinstance(model, ExportedClassifier):
        digest.update(model.content)
    add_weights(digest, model.state_dict())
    return digest.hexdigest()


def add_weights(digest: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Add the names, types, shapes and bytes of weights to a hash of `hashlib`."""
    for name, value in sorted(weights.items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())

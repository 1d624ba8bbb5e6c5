"""Single-label or multi-label: how a model's config records it."""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedModel

from hf_cifar.errors import UserError

MULTI_LABEL = "multi_label_classification"  # makes `pipeline` apply a sigmoid to each logit


def is_multi_label(model: PreTrainedModel) -> bool:
    """True if the model may assign multiple labels to an image, or none."""
    return model.config.problem_type == MULTI_LABEL


def set_problem(model: PreTrainedModel, multi_label: bool) -> None:
    """Set the problem type in the model's config, and drop the thresholds of an earlier training."""
    if multi_label or is_multi_label(model):
        model.config.problem_type = MULTI_LABEL if multi_label else None
        model.config.thresholds = None


def thresholds_of(model: PreTrainedModel) -> np.ndarray | None:
    """Score thresholds [K] of a multi-label model, from its config or else 0.5; None for a single-label one.

    Raises: UserError unless there is one threshold per label.
    """
    if not is_multi_label(model):
        return None
    thresholds = model.config.to_dict().get("thresholds") or [0.5] * model.config.num_labels
    if len(thresholds) != model.config.num_labels:
        raise UserError(
            f"the model's config.json has {len(thresholds)} thresholds for {model.config.num_labels} "
            "labels; fix or remove them"
        )
    return np.asarray(thresholds, dtype=np.float64)

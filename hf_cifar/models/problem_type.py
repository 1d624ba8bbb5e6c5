"""One label an image, or several: what a model's config says of it."""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedModel

from hf_cifar.errors import UserError

MULTI_LABEL = "multi_label_classification"  # by which `pipeline` takes each class's sigmoid


def is_multi_label(model: PreTrainedModel) -> bool:
    """Whether the model may give an image several labels, or none."""
    return model.config.problem_type == MULTI_LABEL


def set_problem(model: PreTrainedModel, multi_label: bool) -> None:
    """Say in the model's config what it is trained for; thresholds of a former training go."""
    if multi_label or is_multi_label(model):
        model.config.problem_type = MULTI_LABEL if multi_label else None
        model.config.thresholds = None


def thresholds_of(model: PreTrainedModel) -> np.ndarray | None:
    """Scores [K] from which on a multi-label model gives each class: as its config has them, or 0.5.

    None of a model that gives one label. Raises: UserError for as many thresholds as there are no labels.
    """
    if not is_multi_label(model):
        return None
    thresholds = model.config.to_dict().get("thresholds") or [0.5] * model.config.num_labels
    if len(thresholds) != model.config.num_labels:
        raise UserError(
            f"the model's config.json holds {len(thresholds)} thresholds for {model.config.num_labels} "
            "labels; mend or remove them"
        )
    return np.asarray(thresholds, dtype=np.float64)

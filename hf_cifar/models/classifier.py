"""A classifier: a model, its image processor and its labels."""

from __future__ import annotations

from typing import NamedTuple

from transformers import BaseImageProcessor, PreTrainedModel


class Classifier(NamedTuple):
    """A model and its image processor."""

    model: PreTrainedModel
    image_processor: BaseImageProcessor


def label2id(id2label: dict[int, str]) -> dict[str, int]:
    """Invert `id2label`, for a model's config, which stores both."""
    return {label: i for i, label in id2label.items()}


def class_names(model: PreTrainedModel) -> list[str]:
    """Return the names of a model's classes, in the order of its logits."""
    return [model.config.id2label[i] for i in range(model.config.num_labels)]


def describe(model: PreTrainedModel) -> str:
    """Name a model's architecture in a message."""
    if model.config.model_type == "timm_wrapper":
        return f"timm's {model.config.architecture}"
    if model.config.model_type == "torch_module":
        return model.config.module_class
    return type(model).__name__

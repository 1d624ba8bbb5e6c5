"""A classifier: a model, its image processor, its labels."""

from __future__ import annotations

from typing import NamedTuple

from transformers import BaseImageProcessor, PreTrainedModel


class Classifier(NamedTuple):
    """A model and the image processor that belongs to it."""

    model: PreTrainedModel
    image_processor: BaseImageProcessor


def label2id(id2label: dict[int, str]) -> dict[str, int]:
    """The labels with their ids, as a model's config holds them besides `id2label`."""
    return {label: i for i, label in id2label.items()}

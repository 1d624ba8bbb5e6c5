"""The range of values of images of more than 8 bits, as a model's config records it."""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedModel

from hf_cifar.config.data import ValueRange
from hf_cifar.config.model import is_exported
from hf_cifar.config.objects import InMemory
from hf_cifar.errors import UserError
from hf_cifar.models.exported import exported_config
from hf_cifar.models.files import model_folder
from hf_cifar.models.objects import model_and_processor


def set_value_range(model: PreTrainedModel, value_range: ValueRange | None) -> None:
    """Record the range of the training images in the model's config, in place of an earlier training's."""
    if value_range is not None:
        model.config.value_range = [value_range.low, value_range.high]
    elif "value_range" in model.config.to_dict():
        model.config.value_range = None


def value_range_of(model: PreTrainedModel) -> ValueRange | None:
    """The range by which a model's images are scaled; None if it was trained on images of 8 bits.

    Raises: UserError for a damaged one.
    """
    return _range_in(model.config.to_dict())


def saved_value_range(
    name: str, revision: str | None = None, *, trust_remote_code: bool = False
) -> ValueRange | None:
    """The same for a saved model, without loading its weights, or for one in memory."""
    if isinstance(name, InMemory):
        model, _ = model_and_processor(name.value)
        return value_range_of(model) if isinstance(model, PreTrainedModel) else None
    if is_exported(name):
        return _range_in(exported_config(name).to_dict())
    path = model_folder(name, revision, trust_remote_code) / "config.json"
    try:
        return _range_in(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError):
        return None  # loading the model says what is wrong


def _range_in(config: dict[str, Any]) -> ValueRange | None:
    found = config.get("value_range")
    if found is None:
        return None
    try:
        low, high = map(float, found)
        return ValueRange(low, high)
    except (TypeError, ValueError):
        raise UserError(
            f"the model's config.json has the value_range {found!r}; fix it: two numbers, the lower one first"
        ) from None

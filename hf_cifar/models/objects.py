"""Models in memory: what they are, and a folder from which they load like a saved model."""

from __future__ import annotations

import copy
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoImageProcessor,
    BaseImageProcessor,
    PreTrainedModel,
)

from hf_cifar.config.model import ModelConfig
from hf_cifar.errors import UserError
from hf_cifar.hub.reach import looks_like_path
from hf_cifar.models.classifier import Classifier, label2id
from hf_cifar.models.files import PROCESSOR_FILES, fetch_if_present
from hf_cifar.models.processor import plain_processor

logger = logging.getLogger(__name__)
PROCESSOR = "(model, image_processor), or the processing_class of a Trainer"  # where one is missing


def model_and_processor(value: Any) -> tuple[nn.Module, BaseImageProcessor | None]:
    """Return a model given alone, or as (model, image_processor). Raises: UserError for anything else."""
    model, processor = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
    if not isinstance(model, nn.Module):
        raise UserError(
            f"a {type(model).__name__} is not a model; pass a name, a transformers or timm model, or a "
            "torch.nn.Module, alone or as (model, image_processor)"
        )
    return model, processor


def finished_object(value: Any) -> Classifier:
    """Return a copy of a fine-tuned model in memory. Raises: UserError without labels or image processor."""
    model, processor = model_and_processor(value)
    if not isinstance(model, PreTrainedModel) or processor is None:
        raise UserError(
            f"a {type(model).__name__} alone has no labels or no image processor; pass (model, "
            "image_processor) with a transformers model, as finetune_classifier returns"
        )
    return Classifier(copy.deepcopy(model).cpu(), processor)


def is_timm(model: nn.Module) -> bool:
    """Return True for a model made by timm.create_model."""
    return type(model).__module__.startswith("timm.") and hasattr(model, "pretrained_cfg")


def is_known(model: PreTrainedModel) -> bool:
    """Return True if transformers can build the model's classifier from its config."""
    return type(model.config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING


def save_object(
    model: PreTrainedModel,
    processor: BaseImageProcessor | None,
    config: ModelConfig,
    id2label: dict[int, str],
    folder: Path,
) -> None:
    """Save a model with its image processor as a checkpoint.

    The head is kept, with the data's labels, if it has as many classes and no names of its own.
    """
    model.save_pretrained(folder)
    saved = copy.deepcopy(model.config)
    generic = {i: f"LABEL_{i}" for i in range(len(id2label))}
    if saved.id2label == generic and generic != id2label:
        logger.info(
            "%s has %d labels without names: its head is kept", type(model).__name__, len(generic)
        )
        saved.id2label, saved.label2id = id2label, label2id(id2label)
    saved.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    elif saved.model_type != "timm_wrapper":
        _copy_processor(model, config, folder)


def processor_of(model: PreTrainedModel) -> BaseImageProcessor:
    """Return the image processor of the checkpoint that a model was loaded from, or else a plain one.

    Raises: UserError for a model that has none, and does not say the size of its input.
    """
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        if model.config.model_type != "timm_wrapper":  # whose config is its processor's too
            _copy_processor(model, ModelConfig(), Path(folder))
        return AutoImageProcessor.from_pretrained(folder)


def _copy_processor(model: PreTrainedModel, config: ModelConfig, folder: Path) -> None:
    """Copy the image processor of the checkpoint that a model was loaded from, or else save a plain one."""
    name = model.name_or_path
    for file in PROCESSOR_FILES if name else ():
        path = Path(name) / file if looks_like_path(name) else _fetched(name, file)
        if path is not None and path.is_file():
            shutil.copyfile(path, folder / file)
    if any((folder / file).is_file() for file in PROCESSOR_FILES):
        return
    size = config.image_size or getattr(model.config, "image_size", None)
    if not isinstance(size, int):
        raise UserError(
            f"the {type(model).__name__} does not say the size of its input; pass {PROCESSOR}, or image_size"
        )
    plain_processor(size).save_pretrained(folder)
    logger.warning(
        "%s has no image processor: pixels are scaled to 0..1 and not normalised; pass %s for another scale",
        type(model).__name__,
        PROCESSOR,
    )


def _fetched(name: str, file: str) -> Path | None:
    try:
        return fetch_if_present(name, file, "main")
    except (OSError, ValueError):  # base classes of the client's errors and of ours
        return None

"""Saving of the model and its image processor in transformers' own format."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Trainer

from hf_cifar.models.lora import ADAPTER_FOLDER

UNPREFIXED = {"timm_wrapper": "timm_model.", "torch_module": "network."}


def saved_weights(model: PreTrainedModel, weights: dict[str, Any]) -> dict[str, Any]:
    """Return weights by the names that they have in a file: timm's own, and those of a torch.nn.Module."""
    prefix = UNPREFIXED.get(model.config.model_type, "")
    return {name.removeprefix(prefix): value for name, value in weights.items()}


def save_classifier(trainer: Trainer, folder: Path, weights: dict[str, Any] | None = None) -> None:
    """Save model and image processor as plain transformers files, without any pickle.

    weights: default: gathered from the model, in all processes.

    A timm model's weights keep timm's names, so both transformers and timm load the folder; those of a
    torch.nn.Module keep its own, for load_state_dict. After training with LoRA, the adapter is saved too.
    """
    if weights is None:
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # gathered if sharded
    # torch.compile adds a prefix to every name.
    weights = {name.removeprefix("_orig_mod."): value for name, value in weights.items()}
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model)
        saved = saved_weights(model, weights)
        folder.mkdir(parents=True, exist_ok=True)
        # Written to a temporary folder first, so that no reader sees part of a model.
        with tempfile.TemporaryDirectory(prefix=".model-", dir=folder) as aside:
            model.save_pretrained(aside, state_dict=saved)
            trainer.processing_class.save_pretrained(aside)
            if trainer.adapter is not None:
                trainer.adapter.save(Path(aside, ADAPTER_FOLDER), weights)
            files = [path for path in Path(aside).rglob("*") if path.is_file()]
            for path in files:
                # safetensors makes its files readable only by their owner.
                shutil.copymode(Path(aside, "config.json"), path)
            for path in files:
                target = folder / path.relative_to(aside)
                target.parent.mkdir(exist_ok=True)
                os.replace(path, target)

"""LoRA: adapters in a frozen backbone, merged into its weights after training.

An adapter adds B A x to the output of a layer; A has `rank` rows. Only the adapters and the head train.
BatchNorms keep their statistics, so that base, adapter and head together give the trained model.

Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.layers import Conv2dSame
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_cifar.errors import UserError
from hf_cifar.extras import require
from hf_cifar.models.classifier import Classifier
from hf_cifar.models.heads import head_parameter_names
from hf_cifar.text import listed
from hf_cifar.transforms.preprocessing import Preprocessing

logger = logging.getLogger(__name__)
ADAPTER_FOLDER = "adapter"  # in the folder of a run
# B A is scaled by ALPHA / rank, so that the best learning rate hardly depends on the rank. 8 is the default
# of peft.
ALPHA = 8
# Query and value projections, as in the paper; timm has them in one layer with the keys.
ATTENTION = {"q_proj", "v_proj", "query", "value", "q", "v", "qkv", "kv"}


@dataclass(frozen=True)
class Adapter:
    """A merged adapter: peft's config, and its tensors by peft's names."""

    config: Any
    tensors: dict[str, Tensor]

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write the adapter for `PeftModel.from_pretrained`, with the head from a model's `weights`."""
        folder.mkdir()
        self.config.save_pretrained(str(folder))
        heads = tuple(f"{name}." for name in self.config.modules_to_save)
        head = {name: value for name, value in weights.items() if name.startswith(heads)}
        tensors = {
            f"base_model.model.{name}": value.detach().cpu().contiguous()
            for name, value in (self.tensors | head).items()
        }
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def add_adapters(classifier: Classifier, rank: int, base: str, revision: str | None) -> None:
    """Add adapters to a model, and freeze everything else but its head.

    base, revision: of the pretrained model, saved for loading the adapter.
    Raises: UserError for a model without layers that LoRA can adapt.
    """
    peft = require("peft", extra="lora")
    model = classifier.model
    head = head_parameter_names(model)
    targets = target_layers(classifier)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=ALPHA,
        target_modules=targets,
        base_model_name_or_path=base,
        revision=revision,
        inference_mode=False,
        auto_mapping={
            "base_model_class": type(model).__name__,
            "parent_library": type(model).__module__,
        },
    )
    peft.inject_adapter_in_model(config, model)
    # Set afterwards, since peft would wrap these layers.
    config.modules_to_save = sorted({name.rpartition(".")[0] for name in head})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in head or is_adapter(name))
    adapters = sum(p.numel() for name, p in model.named_parameters() if is_adapter(name))
    kinds = Counter(_kind(name) for name in targets)
    logger.info(
        "LoRA: adapters of rank %d in %d layers, with %s parameters: %s",
        rank,
        len(targets),
        f"{adapters:,}",
        listed([f"{count} x {kind}" for kind, count in kinds.items()], 6),
    )


def target_layers(classifier: Classifier) -> list[str]:
    """List the layers that get adapters: the attention's query and value projections; without attention, all
    linear layers and convolutions before the head.

    Skips layers whose weights are used without calling the layer (in timm's BEiT), where an adapter would
    have no effect, and layers into which it cannot be merged, see `_can_adapt`.
    Raises: UserError if there are none.
    """
    model = classifier.model
    if model.config.model_type == "torch_module":
        raise UserError(
            f"--lora_rank is for transformers and timm models, and a {model.config.module_class} is neither; "
            "leave it out"
        )
    head = head_parameter_names(model)
    called = _called_layers(classifier)
    layers = {
        name: module
        for name, module in model.named_modules()
        if name in called and _can_adapt(module) and f"{name}.weight" not in head
    }
    attention = [
        name
        for name, module in layers.items()
        if isinstance(module, nn.Linear) and _kind(name) in ATTENTION
    ]
    if not layers:
        raise UserError(
            f"--lora_rank: {type(model).__name__} has no layers that LoRA can adapt; leave it out, or pass "
            "--freeze backbone"
        )
    return attention or list(layers)


def _called_layers(classifier: Classifier) -> set[str]:
    """Run an image through the model, and return the names of the modules that were called."""
    model, called = classifier.model, set[str]()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, module in model.named_modules()
    ]
    was_training = model.training
    model.eval()
    size = Preprocessing.from_image_processor(classifier.image_processor).size
    with torch.inference_mode():
        model(pixel_values=torch.zeros(1, 3, *size))
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    return called


def _can_adapt(layer: nn.Module) -> bool:
    """Return True for a layer into which peft can merge an adapter without changing the output. peft ignores
    the dilation of a convolution, and what a subclass does with the weights."""
    if type(layer) is nn.Linear:
        return True
    return (
        isinstance(layer, nn.Conv2d)
        and type(layer) in (nn.Conv2d, Conv2dSame)
        and layer.groups == 1
        and layer.dilation == (1, 1)
        and layer.padding_mode == "zeros"
    )


def _kind(name: str) -> str:
    """Return the last component of a layer's name that is not a number."""
    return next(part for part in reversed(name.split(".")) if not part.isdigit())


def is_adapter(parameter_name: str) -> bool:
    """Return True for the parameter name of an adapter."""
    return ".lora_" in parameter_name


def merge_adapters(model: PreTrainedModel) -> Adapter | None:
    """Merge the adapters of a model into its weights, and remove them, which leaves a plain model.

    Returns None for a model without adapters.
    """
    if not any(is_adapter(name) for name, _ in model.named_parameters()):
        return None
    peft = require("peft", extra="lora")
    config = model.peft_config["default"]
    config.target_modules = sorted(config.target_modules)  # a set, whose order differs between runs
    config.inference_mode = True
    # Otherwise, peft would look up the embeddings of a language model on the Hub.
    tensors = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    adapter = Adapter(config, {name: value.detach().clone() for name, value in tensors.items()})
    for name, layer in list(model.named_modules()):
        if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
            layer.merge()
            model.set_submodule(name, layer.get_base_layer())
    del model.peft_config
    return adapter

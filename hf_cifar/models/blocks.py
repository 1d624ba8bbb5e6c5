"""Blocks of a backbone: their order and depth, and which parameters train."""

from __future__ import annotations

import bisect
import re

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel

from hf_cifar.errors import UserError
from hf_cifar.models.heads import head_parameter_names


def backbone_blocks(model: PreTrainedModel) -> list[str]:
    """List the prefixes of the backbone's stages or blocks, from input to output.

    Raises: UserError for an architecture without any.
    """
    if model.config.model_type == "timm_wrapper":
        return _timm_blocks(model)
    backbone = getattr(model, model.base_model_prefix)
    # The outermost list of two or more modules with weights: a ViT's layers, a ResNet's stages.
    lists = [
        (name.count("."), name, _children_with_weights(module))
        for name, module in backbone.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
    ]
    lists = [entry for entry in lists if len(entry[2]) > 1]
    if not lists:
        raise _no_blocks(type(model).__name__)
    _, name, children = min(lists, key=lambda entry: entry[0])
    path = ".".join(part for part in (model.base_model_prefix, name) if part)
    return [f"{path}.{child}." for child in children]


def _children_with_weights(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_children() if len(list(child.parameters()))]


def _timm_blocks(model: PreTrainedModel) -> list[str]:
    """List the blocks by timm's own `group_matcher`: the first matching prefix for each block number.

    DenseNet's `denseblock1` and `transition1` are one stage.
    """
    timm_model = model.timm_model
    if not hasattr(timm_model, "group_matcher"):
        raise _no_blocks(f"timm's {model.config.architecture}")
    patterns = timm_model.group_matcher(coarse=True).get("blocks", [])
    patterns = [patterns] if isinstance(patterns, str) else [p[0] for p in patterns]
    blocks: dict[tuple, str] = {}
    for name, _ in timm_model.named_parameters():
        for pattern in patterns:
            match = re.match(pattern, name)
            if match and any(group and group.isdigit() for group in match.groups()):
                prefix = f"timm_model.{match.group(0).rstrip('.')}."
                blocks.setdefault((pattern, *match.groups()), prefix)
    if not blocks:
        raise _no_blocks(f"timm's {model.config.architecture}")
    return list(blocks.values())


def _no_blocks(what: str) -> UserError:
    return UserError(
        f"{what} has no stages or blocks; use --freeze none or backbone, and leave out --layer_decay and "
        "--unfreeze_epochs"
    )


def block_depths(model: PreTrainedModel) -> dict[str, int]:
    """Return the distance of each parameter from the output, in blocks.

    0 for the head and all other layers after the blocks, 1 for the last block, one more for each earlier
    block, and the highest for the layers before the blocks.

    Raises: UserError for an architecture without blocks.
    """
    blocks, head = backbone_blocks(model), head_parameter_names(model)
    names = [name for name, _ in model.named_parameters()]
    starts = [next(i for i, n in enumerate(names) if n.startswith(block)) for block in blocks]
    end = 1 + max(i for i, name in enumerate(names) if name.startswith(blocks[-1]))
    bounds = [*starts, end]  # layers between two blocks belong to the first of them
    return {
        name: 0 if name in head else len(bounds) - bisect.bisect_right(bounds, i)
        for i, name in enumerate(names)
    }


def freeze(model: PreTrainedModel, what: str) -> None:
    """Freeze "none" of the parameters, the whole "backbone", or all of it except the last N blocks.

    Layers after the blocks (a final norm, a pooler) train with them.
    Raises: UserError if N exceeds the number of blocks.
    """
    model.requires_grad_(True)
    if what == "none":
        return
    trainable = head_parameter_names(model)
    if what != "backbone" and int(what) > 0:
        blocks = backbone_blocks(model)
        if int(what) > len(blocks):
            raise UserError(
                f"--freeze {what}: {type(model).__name__} has {len(blocks)} stages or blocks"
            )
        depths = block_depths(model)
        trainable |= {name for name, depth in depths.items() if depth <= int(what)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """List the BatchNorms of a model."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def is_frozen(norm: _BatchNorm) -> bool:
    """Return True if no parameter of a norm trains: it keeps the checkpoint's statistics, in eval mode."""
    parameters = list(norm.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)


def has_statistics(model: nn.Module) -> bool:
    """Return True if a model has BatchNorms, and their running means are not those of a new model, zeros."""
    means = [norm.running_mean for norm in batch_norms(model) if norm.running_mean is not None]
    return any(bool(mean.any()) for mean in means)


def describe_trainable(model: nn.Module) -> str:
    """Describe in one line how many parameters train."""
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{trainable:,} of {total:,} parameters are trainable ({trainable / max(1, total):.1%})"

"""Head, backbone and blocks of a classifier: which parameters train, and by which kernels."""

from __future__ import annotations

import bisect
import functools
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel

from hf_cifar.errors import UserError


def head_parameter_names(model: PreTrainedModel) -> set[str]:
    """Names of the classification head's parameters.

    Raises: UserError for a model whose head cannot be told from its backbone.
    """
    if model.config.model_type == "timm_wrapper":
        classifier = model.timm_model.get_classifier()
        heads = classifier if isinstance(classifier, (tuple, list)) else (classifier,)
        wanted = {id(p) for head in heads for p in head.parameters()}
        names = {name for name, p in model.named_parameters() if id(p) in wanted}
    else:
        prefix = f"{model.base_model_prefix}."
        names = {name for name, _ in model.named_parameters() if not name.startswith(prefix)}
    if not names:
        raise UserError(
            f"{type(model).__name__} has no classification head that can be told from its backbone"
        )
    return names


def linear_head(model: PreTrainedModel) -> nn.Linear | None:
    """The head, if it is one linear layer: all that trains behind a frozen backbone. Else None."""
    linear = _linear_layers_of_head(model)
    if len(linear) != 1 or len(head_parameter_names(model)) != len(list(linear[0].parameters())):
        return None
    return linear[0]


def output_layers(model: PreTrainedModel) -> list[nn.Linear]:
    """The linear layers that give the logits: one, or two of a model that averages two heads; none if
    the logits come from something else."""
    layers = _linear_layers_of_head(model)
    return [layer for layer in layers if layer.out_features == model.config.num_labels]


def _linear_layers_of_head(model: PreTrainedModel) -> list[nn.Linear]:
    names = head_parameter_names(model)
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" in names
    ]


def divide_logits(model: PreTrainedModel, divisor: float) -> bool:
    """Fold a division of the logits into the layers that give them; False if that cannot be done."""
    layers = output_layers(model)
    with torch.no_grad():
        for parameter in (p for layer in layers for p in layer.parameters()):
            parameter.div_(divisor)
    return bool(layers)


def backbone_blocks(model: PreTrainedModel) -> list[str]:
    """Prefixes of the backbone's stages or blocks, from input to output.

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
    """Blocks by timm's own `group_matcher`: the first prefix of each number that its `blocks` match.

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
        f"{what} has no stages or blocks; use --freeze none or backbone, and no --layer_decay"
    )


def block_depths(model: PreTrainedModel) -> dict[str, int]:
    """How far each parameter is from the output: 0 for the head and what else stands behind the blocks,
    1 for the last block, one more for each block before, and the highest for what stands before all.

    Raises: UserError for an architecture without blocks.
    """
    blocks, head = backbone_blocks(model), head_parameter_names(model)
    names = [name for name, _ in model.named_parameters()]
    starts = [next(i for i, n in enumerate(names) if n.startswith(block)) for block in blocks]
    end = 1 + max(i for i, name in enumerate(names) if name.startswith(blocks[-1]))
    bounds = [*starts, end]  # what stands between two blocks belongs to the former
    return {
        name: 0 if name in head else len(bounds) - bisect.bisect_right(bounds, i)
        for i, name in enumerate(names)
    }


def freeze(model: PreTrainedModel, what: str) -> None:
    """Set which parameters train: "none" frozen, all of the "backbone", or all but its last N blocks.

    What stands behind the blocks (a final norm, a pooler) trains with them.
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


def frozen_norms(model: nn.Module) -> list[_BatchNorm]:
    """BatchNorms none of whose parameters train: in eval mode, their statistics stay the checkpoint's."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        and (parameters := list(module.parameters()))
        and not any(p.requires_grad for p in parameters)
    ]


def has_fused_attention(model: PreTrainedModel) -> bool:
    """Whether attention is computed by one kernel, `F.scaled_dot_product_attention`."""
    if model.config.model_type == "timm_wrapper":
        return any(getattr(module, "fused_attn", False) for module in model.modules())
    return model._supports_sdpa and model.config._attn_implementation == "sdpa"


def fuse_attention(model: PreTrainedModel, fused: bool) -> None:
    """Compute attention as the model came, or where that is by one kernel, by the products of matrices and
    the softmax that it stands for. Nothing of this is saved with the model."""
    if model.config.model_type != "timm_wrapper" and has_fused_attention(model) != fused:
        _replace_kernel(
            model, fused, lambda: model.set_attn_implementation("sdpa" if fused else "eager")
        )
    for module in model.modules():
        if getattr(module, "fused_attn", fused) != fused:
            _replace_kernel(module, fused, functools.partial(setattr, module, "fused_attn", fused))


def _replace_kernel(module: nn.Module, fused: bool, replace: Callable[[], None]) -> None:
    """Replace a module's kernel; put it back only where it was replaced: some of timm's modules come without,
    because theirs is on trial."""
    if not fused:
        module.__dict__["came_fused"] = True
        replace()
    elif module.__dict__.pop("came_fused", False):
        replace()


def spare_depthwise_gradients(model: nn.Module) -> None:
    """Under bfloat16 on a CPU, train depthwise convolutions in float32 where gradients in bfloat16 have no
    kernel of their own: with a stride, 10 to 50 times slower than float32, and with filters above 3 x 3.
    """
    for module in model.modules():
        depthwise = isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels
        if depthwise and (max(module.stride) > 1 or max(module.kernel_size) > 3):
            module.forward = functools.partial(_train_in_float32, module)


def treat_depthwise_alike(model: nn.Module) -> None:
    """Undo `spare_depthwise_gradients`."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.__dict__.pop("forward", None)


def as_it_came(model: PreTrainedModel) -> None:
    """Undo `fuse_attention` and `spare_depthwise_gradients`: what is handed out is the plain model."""
    fuse_attention(model, True)
    treat_depthwise_alike(model)


def _train_in_float32(layer: nn.Conv2d, images: Tensor) -> Tensor:
    forward = functools.partial(type(layer).forward, layer)
    needed = torch.is_grad_enabled() and (images.requires_grad or layer.weight.requires_grad)
    if not (needed and torch.is_autocast_enabled("cpu")):
        return forward(images)
    dtype = torch.get_autocast_dtype("cpu")
    with torch.autocast("cpu", enabled=False):
        return forward(images.float()).to(dtype)


def describe_trainable(model: nn.Module) -> str:
    """One line: how many parameters train."""
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{trainable:,} of {total:,} parameters train ({trainable / total:.1%})"

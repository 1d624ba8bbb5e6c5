"""Kernels of a model: attention, and depthwise convolutions on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def has_fused_attention(model: PreTrainedModel) -> bool:
    """Return True if attention is one kernel, `F.scaled_dot_product_attention`."""
    if model.config.model_type == "timm_wrapper":
        return any(getattr(module, "fused_attn", False) for module in model.modules())
    return model._supports_sdpa and model.config._attn_implementation == "sdpa"


def fuse_attention(model: PreTrainedModel, fused: bool) -> None:
    """Switch attention between the model's own kernel and plain matrix products with a softmax.

    fused: use the original kernel. Layers that were eager from the start stay eager. Nothing of this is saved
    with the model.
    """
    if model.config.model_type != "timm_wrapper" and has_fused_attention(model) != fused:
        _switch_kernel(
            model, fused, lambda: model.set_attn_implementation("sdpa" if fused else "eager")
        )
    for module in model.modules():
        if getattr(module, "fused_attn", fused) != fused:
            _switch_kernel(module, fused, functools.partial(setattr, module, "fused_attn", fused))


def _switch_kernel(module: nn.Module, fused: bool, switch: Callable[[], None]) -> None:
    """Switch a module's kernel off, or on again if it was on originally: timm ships some modules with fused
    attention off, as experimental."""
    if not fused:
        module.__dict__["was_fused"] = True
        switch()
    elif module.__dict__.pop("was_fused", False):
        switch()


def use_float32_depthwise(model: nn.Module) -> None:
    """Train slow depthwise convolutions in float32 under bfloat16 on a CPU.

    Their bfloat16 gradients have no kernel of their own and take 10 to 50 times as long: those with a stride,
    and those with filters above 3 x 3.
    """
    for module in model.modules():
        depthwise = isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels
        if depthwise and (max(module.stride) > 1 or max(module.kernel_size) > 3):
            module.forward = functools.partial(_train_in_float32, module)


def restore_kernels(model: PreTrainedModel) -> None:
    """Undo `fuse_attention` and `use_float32_depthwise`."""
    fuse_attention(model, True)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.__dict__.pop("forward", None)


def _train_in_float32(layer: nn.Conv2d, images: Tensor) -> Tensor:
    forward = functools.partial(type(layer).forward, layer)
    needed = torch.is_grad_enabled() and (images.requires_grad or layer.weight.requires_grad)
    if not (needed and torch.is_autocast_enabled("cpu")):
        return forward(images)
    dtype = torch.get_autocast_dtype("cpu")
    with torch.autocast("cpu", enabled=False):
        return forward(images.float()).to(dtype)

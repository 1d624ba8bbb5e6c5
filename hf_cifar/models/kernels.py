"""The kernels that a model computes with: attention, and depthwise convolutions on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


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

"""Fold batch norms into the preceding convolutions, for faster inference with the same results."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers import PreTrainedModel

# Largest change of the logits, relative to the largest logit, that counts as rounding.
TOLERANCE = 1e-3


def fold_norms(model: PreTrainedModel, pixel_values: Tensor) -> PreTrainedModel:
    """Fold each batch norm that follows a convolution into it, for inference.

    pixel_values [N, C, h, w]: an example, on the model's device; if folding changes its logits by more than
    rounding, it is undone. Returns a copy in eval mode, or the model itself if nothing was folded.
    """
    model.eval()
    pairs, logits = _pairs(model, pixel_values)
    if not pairs:
        return model
    folded = copy.deepcopy(model)
    for convolution_name, norm_name in pairs:
        convolution, norm = (folded.get_submodule(n) for n in (convolution_name, norm_name))
        folded.set_submodule(convolution_name, fuse_conv_bn_eval(convolution, norm))
        # timm's norms end with an activation.
        rest = [getattr(norm, name) for name in ("drop", "act") if hasattr(norm, name)]
        folded.set_submodule(norm_name, nn.Sequential(*rest) if rest else nn.Identity())
    with torch.inference_mode():
        found = folded(pixel_values=pixel_values).logits
    same = (found - logits).abs().max() <= TOLERANCE * logits.abs().max()
    return folded if same else model


def _pairs(model: PreTrainedModel, pixel_values: Tensor) -> tuple[list[tuple[str, str]], Tensor]:
    """Names of convolutions and the norms that directly follow them, and the logits."""
    made: dict[int, tuple[str, Tensor]] = {}  # keeps the tensors alive, so that ids stay unique
    pairs: list[tuple[str, str]] = []
    calls: list[str] = []

    def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append(name)
        if isinstance(module, nn.Conv2d):
            made[id(output)] = name, output
        elif id(inputs[0]) in made and module.track_running_stats:
            pairs.append((made.pop(id(inputs[0]))[0], name))

    hooks = [
        module.register_forward_hook(lambda *call, name=name: note(name, *call))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d))
    ]
    try:
        with torch.inference_mode():
            logits = model(pixel_values=pixel_values).logits
    finally:
        for hook in hooks:
            hook.remove()
    once = {name for name in calls if calls.count(name) == 1}
    return [pair for pair in pairs if once.issuperset(pair)], logits

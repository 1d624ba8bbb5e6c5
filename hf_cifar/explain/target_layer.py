"""Find the layer whose feature maps explain a prediction best: the last one with spatial positions.

Nothing is looked up by a model's name. The network runs once on an image; the shapes of the outputs say which
of them are maps, and their gradients which of them reach the logits.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_cifar.errors import UserError
from hf_cifar.models.classifier import describe

MIN_SIDE = 2  # a map of one position says nothing
MAX_PREFIX = 16  # class and register tokens before the patches


@dataclass(frozen=True)
class Layout:
    """How an output stores the positions of an image.

    order: channels_first [N, D, h, w], channels_last [N, h, w, D], or tokens [N, prefix + h * w, D]. grid:
    (h, w). prefix: class and register tokens, which have no position.
    """

    order: Literal["channels_first", "channels_last", "tokens"]
    grid: tuple[int, int]
    prefix: int = 0

    def maps(self, output: Tensor) -> Tensor:
        """Return an output as feature maps [N, D, h, w]."""
        if self.order == "channels_first":
            return output
        if self.order == "channels_last":
            return output.permute(0, 3, 1, 2)
        return output[:, self.prefix :].transpose(1, 2).unflatten(2, self.grid)


class TargetLayer(NamedTuple):
    """A layer by its name in the model, and the layout of its output."""

    name: str
    layout: Layout


class Call(NamedTuple):
    """A call of a layer that returned feature maps. output: with its graph."""

    name: str
    layer: nn.Module
    layout: Layout
    output: Tensor


def find_target_layer(model: PreTrainedModel, pixel_values: Tensor) -> TargetLayer:
    """Return the target layer of Grad-CAM. pixel_values: [1, 3, H, W].

    It is the last layer with a map that affects the logits: of a convolutional network the last
    stage, or what follows it before the pooling. Of a transformer it is the last norm inside a block: the
    first one if only the class token is read at the end, because later norms of the patches then have no
    gradient; the second one if the patches are averaged, as in Swin.
    Raises: UserError if there is none.
    """
    calls, logits = trace(model, pixel_values)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    score = (logits * weights.to(logits.device)).sum()
    outputs = [call.output for call in calls]
    gradients = torch.autograd.grad(score, outputs, allow_unused=True) if calls else ()
    reached = [
        call
        for call, gradient in zip(calls, gradients, strict=True)
        if gradient is not None and bool(call.layout.maps(gradient).any())
    ]
    if reached and reached[-1].layout.order != "channels_first":
        reached = [call for call in reached if _is_norm_of_block(call)] or reached
    if not reached:
        raise UserError(
            f"{describe(model)} has no layer with feature maps of at least {MIN_SIDE} x {MIN_SIDE} "
            "positions; use integrated_gradients, occlusion, lime or shap"
        )
    return TargetLayer(reached[-1].name, reached[-1].layout)


def trace(model: PreTrainedModel, pixel_values: Tensor) -> tuple[list[Call], Tensor]:
    """Run the model, and return its calls with feature maps, in order of their ends, and the logits.

    Layers that are called more than once are left out.
    """
    calls: list[Call] = []
    counts: Counter[str] = Counter()
    grid = (0, 0)

    def note(name: str, layer: nn.Module, output: Tensor) -> None:
        nonlocal grid
        counts[name] += 1
        if not isinstance(output, Tensor):
            return
        if isinstance(layer, nn.Conv2d) and min(output.shape[-2:]) >= MIN_SIDE:
            grid = (output.shape[-2], output.shape[-1])
        if layout := _layout(output.shape, grid):
            calls.append(Call(name, layer, layout, output))

    hooks = [
        layer.register_forward_hook(lambda *call, name=name: note(name, call[0], call[2]))
        for name, layer in model.named_modules()
        if name
    ]
    try:
        with torch.enable_grad():
            logits = model(pixel_values=pixel_values.detach().requires_grad_()).logits
    finally:
        for hook in hooks:
            hook.remove()
    return [call for call in calls if counts[call.name] == 1], logits


def _layout(shape: torch.Size, grid: tuple[int, int]) -> Layout | None:
    """Return the layout of an output, if it is one of maps. grid: of the last convolution.

    Pooling and merging of patches halve the grid.
    """
    while min(grid) >= MIN_SIDE:
        places = grid[0] * grid[1]
        if len(shape) == 4 and shape[2:] == grid:
            return Layout("channels_first", grid)
        if len(shape) == 4 and shape[1:3] == grid:
            return Layout("channels_last", grid)
        if len(shape) == 3 and 0 <= shape[1] - places <= MAX_PREFIX:
            return Layout("tokens", grid, shape[1] - places)
        grid = ((grid[0] + 1) // 2, (grid[1] + 1) // 2) if grid != (2, 2) else (1, 1)
    return None


def _is_norm_of_block(call: Call) -> bool:
    """Return True for a norm inside a numbered block, not the final one."""
    numbered = any(part.isdigit() for part in call.name.split("."))
    return numbered and "norm" in type(call.layer).__name__.lower()

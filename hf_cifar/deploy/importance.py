"""How much the loss changes without a channel, by its first-order Taylor expansion.

Setting a channel to zero changes the loss of an image by about the sum over its places of activation x
gradient. The importance of a channel is the mean square of this over images, so that the signs of images do
not cancel, as they would in a converged network. It has one unit in all
layers, so their channels can be compared.

Source: Molchanov et al., Importance Estimation for Neural Network Pruning, 2019.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_cifar.extras import require

LAYERS = (nn.Conv2d, nn.Linear)  # layers that have channels
Importances = dict[str, Tensor]  # of the inputs of each layer, [channels], by the layer's name


def measure_importances(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Importances:
    """Measure the importance of the input channels of each layer.

    batches: pixel_values [N, 3, h, w] and labels [N], or float [N, K] of multiple labels, of training images.
    """
    found: Importances = {}
    count = 0

    def note(name: str, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor) and inputs[0].requires_grad:
            activation = inputs[0].detach()
            axis = 1 if isinstance(layer, nn.Conv2d) else activation.ndim - 1

            def add(gradient: Tensor) -> None:
                places = [each for each in range(1, activation.ndim) if each != axis]
                change = (activation * gradient).sum(places) if places else activation * gradient
                found[name] = found.get(name, 0) + change.square().sum(dim=0)

            inputs[0].register_hook(add)

    hooks = [
        layer.register_forward_pre_hook(lambda layer, inputs, name=name: note(name, layer, inputs))
        for name, layer in model.named_modules()
        if isinstance(layer, LAYERS)
    ]
    model.eval()
    try:
        with torch.enable_grad():
            for pixel_values, labels in batches:
                # The gradient reaches every activation, also of frozen layers, by way of the input.
                logits = model(pixel_values=pixel_values.requires_grad_()).logits
                if labels.ndim == 2:
                    loss = functional.binary_cross_entropy_with_logits(
                        logits, labels, reduction="sum"
                    )
                else:
                    loss = functional.cross_entropy(logits, labels, reduction="sum")
                loss.backward()
                count += len(labels)
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad()
    return {name: total / count for name, total in found.items()}


class GroupImportance:
    """The importance of the channels of a group of layers, as torch-pruning asks for it: the sum over the
    layers that take them as input."""

    def __init__(self, network: nn.Module, importances: Importances) -> None:
        self.by_layer = {network.get_submodule(name): each for name, each in importances.items()}

    def __call__(self, group: Any) -> Tensor | None:
        """Return the importance of each channel [C], or None for a group that no layer takes as input, which
        is then not pruned."""
        function = require("torch_pruning", extra="deploy").pruner.function
        inputs = (function.prune_conv_in_channels, function.prune_linear_in_channels)
        total, known = torch.zeros(len(group[0].idxs)), False
        for member in group:
            each = self.by_layer.get(member.dep.target.module)
            if each is not None and member.dep.handler in inputs:
                total.index_add_(0, torch.tensor(member.root_idxs), each[torch.tensor(member.idxs)])
                known = True
        return total if known else None

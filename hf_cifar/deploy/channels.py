"""Structured pruning: remove whole channels, so that a network is smaller and faster on any device.

Where a config can describe the result, the same share of each layer's channels is removed, and
`from_pretrained` loads it. In other networks, the channels of all layers are ranked together. Layers on a
residual connection are left out: many layers share their channels, and removing them costs the most.

Source: Fang et al., DepGraph: Towards Any Structural Pruning, 2023 (torch-pruning).
"""

from __future__ import annotations

import copy
import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PreTrainedModel

from hf_cifar.deploy.importance import LAYERS, GroupImportance, Importances
from hf_cifar.errors import UserError
from hf_cifar.extras import require
from hf_cifar.models.classifier import describe
from hf_cifar.models.heads import head_parameter_names
from hf_cifar.text import one_line

STEPS = 64  # ratios of a network without a config are multiples of 1 / STEPS
MAX_RATIO = 0.9  # of a layer
# Kernels work on blocks of 8 or 16 channels: with other numbers, a network of half the size was slower than
# the whole one. Networks with narrow layers have smaller blocks.
BLOCKS = (16, 8, 4, 2, 1)
MIN_BLOCKS = 8  # of a layer


class Logits(nn.Module):
    """A model that returns its logits alone, which torch-pruning and exporters can trace."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).logits


@dataclass(frozen=True)
class Layout:
    """How a network is pruned. pruned: the layers whose output channels may be removed. changes: the changes
    to its config that describe the result, or None if no config can."""

    pruned: list[nn.Module]
    changes: Callable[[], dict[str, Any]] | None = None


def layout_of(model: PreTrainedModel) -> Layout:
    """Return the layout for a model's family: by default, all layers but the head, and no config."""
    kind = model.config.model_type
    if kind == "timm_wrapper":
        kind = f"timm_{type(model.timm_model).__name__}"
    return LAYOUTS.get(kind, _any_network)(model)


def _any_network(model: PreTrainedModel) -> Layout:
    head = {name.rpartition(".")[0] for name in head_parameter_names(model)}
    return Layout(
        [m for name, m in model.named_modules() if isinstance(m, LAYERS) and name not in head]
    )


def _with_config(changes: Callable[[PreTrainedModel], dict[str, Any]]) -> Callable[..., Layout]:
    """Return the layout of a family whose config has the widths of its stages."""

    def layout(model: PreTrainedModel) -> Layout:
        return Layout(_any_network(model).pruned, lambda: changes(model))

    return layout


def _resnet_widths(model: PreTrainedModel) -> dict[str, Any]:
    stages = [stage.layers[-1].layer[-1] for stage in model.resnet.encoder.stages]
    return {
        "embedding_size": model.resnet.embedder.embedder.convolution.out_channels,
        "hidden_sizes": [stage.convolution.out_channels for stage in stages],
    }


def _convnext_widths(model: PreTrainedModel) -> dict[str, Any]:
    stages = model.base_model.encoder.stages
    return {"hidden_sizes": [stage.layers[-1].pwconv2.out_features for stage in stages]}


def _timm_resnet(model: PreTrainedModel) -> Layout:
    """timm's ResNets have a stem of 64 channels, so the first stage keeps its width."""
    network = model.timm_model
    stages = [getattr(network, f"layer{number}") for number in range(1, 5)]
    return Layout(
        [m for stage in stages[1:] for m in stage.modules() if isinstance(m, nn.Conv2d)],
        lambda: _timm_args(model, channels=[stage[0].conv1.out_channels for stage in stages]),
    )


def _timm_vit(model: PreTrainedModel) -> Layout:
    layers = _first_of_mlps(model)
    # timm computes the width as int(width of a token * mlp_ratio); half a channel more survives rounding.
    return Layout(
        layers,
        lambda: _timm_args(model, mlp_ratio=(layers[0].out_features + 0.5) / layers[0].in_features),
    )


def _first_of_mlps(model: PreTrainedModel) -> list[nn.Module]:
    return [
        m
        for name, m in model.named_modules()
        if name.endswith(("mlp.fc1", "intermediate.dense")) and isinstance(m, nn.Linear)
    ]


def _transformers_vit(model: PreTrainedModel) -> Layout:
    layers = _first_of_mlps(model)
    return Layout(layers, lambda: {"intermediate_size": layers[0].out_features})


def _timm_args(model: PreTrainedModel, **changes: Any) -> dict[str, Any]:
    return {"model_args": {**(model.config.model_args or {}), **changes}}


# By `model_type`, or by the class of a timm model. Transformers lose channels of their MLPs only: attention
# has a fixed number of heads, and torch-pruning breaks timm's.
LAYOUTS: dict[str, Callable[[PreTrainedModel], Layout]] = {
    "resnet": _with_config(_resnet_widths),
    "convnext": _with_config(_convnext_widths),
    "convnextv2": _with_config(_convnext_widths),
    "timm_ResNet": _timm_resnet,
    "timm_VisionTransformer": _timm_vit,
    "vit": _transformers_vit,
    "deit": _transformers_vit,
}


def ratios_of(model: PreTrainedModel) -> list[float]:
    """Return the ratios of channels that may be removed, ascending.

    If a config describes the result, each leaves whole blocks of channels in every layer.
    """
    layout = layout_of(model)
    steps = STEPS
    if layout.changes is not None:
        common = math.gcd(*(_width(layer) for layer in layout.pruned))
        steps = common // math.gcd(common, _block(common))
    return [step / steps for step in range(1, steps)]


def _block(width: float) -> int:
    """Return the number of channels that are removed together from a layer of this width."""
    return next((block for block in BLOCKS if block * MIN_BLOCKS <= width), 1)


def _width(layer: nn.Module) -> int:
    return layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features


def pruned_copy(
    model: PreTrainedModel, ratio: float, size: tuple[int, int], importances: Importances
) -> PreTrainedModel | nn.Module:
    """Return a copy of a model without a share `ratio` of its channels, the least important ones.

    size: of the input, (height, width). It is a transformers model if a config describes it, else a network
    that returns logits.
    Raises: UserError for a network that cannot be traced.
    """
    network = Logits(copy.deepcopy(model).cpu().eval().requires_grad_(True))
    if hasattr(network.model, "set_attn_implementation"):
        network.model.set_attn_implementation("eager")  # whose layers can be traced
    layout, example = layout_of(network.model), torch.zeros(1, 3, *size)
    importance = GroupImportance(network.model, importances)
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            # torch-pruning warns of parameters outside layers, such as a ViT's CLS token, and prunes them
            # with their neighbours.
            warnings.filterwarnings("ignore", message="Unwrapped parameters", category=UserWarning)
            shares = dict.fromkeys(layout.pruned, ratio)
            if layout.changes is None:
                shares = _shares(network, layout.pruned, example, importance, ratio)
            _remove(network, shares, example, importance)
            network(example)
    except Exception as error:  # torch-pruning raises many kinds
        raise UserError(
            f"{describe(model)} cannot be pruned: {one_line(error, 200)}; run hf-cifar quantize instead"
        ) from error
    if layout.changes is None:
        return network
    return _described(network.model, layout.changes(), model.config._attn_implementation)


def _shares(
    network: nn.Module,
    layers: Sequence[nn.Module],
    example: Tensor,
    importance: GroupImportance,
    ratio: float,
) -> dict[nn.Module, float]:
    """Return the share of channels to remove from each layer, 0..1, so that about `ratio` of all are removed,
    the least important ones. Layers on a residual connection, where outputs are added, are left out."""
    pruning = require("torch_pruning", extra="deploy")
    graph = pruning.DependencyGraph().build_dependency(network, example)
    kept = [m for m in network.modules() if isinstance(m, LAYERS) and m not in layers]
    # The importance of each channel [C], and the layers that have these channels as outputs.
    groups: list[tuple[Tensor, list[nn.Module]]] = []
    for group in graph.get_all_groups(ignored_layers=kept, root_module_types=list(LAYERS)):
        members = [member.dep for member in group]
        found = importance(group)
        is_residual = any("AddBackward" in str(each.target.name) for each in members)
        if found is not None and not is_residual:
            outputs = [each for each in members if graph.is_out_channel_pruning_fn(each.handler)]
            modules = [each.target.module for each in outputs]
            groups.append((found, [module for module in modules if isinstance(module, LAYERS)]))
    if not groups:
        return {}
    limit = torch.cat([found for found, _ in groups]).quantile(ratio)
    block = _block(statistics.median(len(found) for found, _ in groups))
    shares: dict[nn.Module, float] = {}
    for found, together in groups:
        least = max(int((found > limit).sum()), (1 - MAX_RATIO) * len(found), 1)
        left = min(len(found), math.ceil(least / block) * block)
        shares |= dict.fromkeys(together, 1 - left / len(found))
    return shares


def _remove(
    network: nn.Module,
    shares: dict[nn.Module, float],
    example: Tensor,
    importance: GroupImportance,
) -> None:
    """Remove a share of the channels of each layer, 0..1, the least important ones."""
    pruning = require("torch_pruning", extra="deploy")
    # Slightly less, so that rounding does not remove one channel too many.
    by_layer = {layer: share - 1e-6 for layer, share in shares.items() if share}
    kept = [m for m in network.modules() if isinstance(m, LAYERS) and m not in by_layer]
    pruning.pruner.MetaPruner(
        network, example, importance=importance, pruning_ratio_dict=by_layer, ignored_layers=kept,
        root_module_types=list(LAYERS),
    ).step()  # fmt: skip


def _described(
    pruned: PreTrainedModel, changes: dict[str, Any], attention: str | None
) -> PreTrainedModel | nn.Module:
    """Build the model that a changed config describes, with the pruned weights and this implementation of
    attention; or return the network as it is."""
    config = copy.deepcopy(pruned.config)
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForImageClassification.from_config(config)
    try:
        model.load_state_dict(pruned.state_dict())
    except RuntimeError:  # a variant of the family whose widths the config does not say
        return Logits(pruned)
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(attention)
    return model.eval()


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in model.parameters())


def closest_ratio(ratios: Iterable[float], fits: Callable[[float], bool]) -> float | None:
    """Return the smallest ratio that fits, by bisection; None if the largest does not. A larger ratio than
    one that fits must fit too."""
    ratios = list(ratios)
    if not ratios or not fits(ratios[-1]):
        return None
    low, high = 0, len(ratios) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(ratios[middle]) else (middle + 1, high)
    return ratios[low]

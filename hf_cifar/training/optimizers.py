"""Which weights decay, and learning rates that suit the model."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

# Position embeddings and class tokens have two or more axes, but are no weights of a layer.
NO_DECAY = re.compile(
    r"(^|\.)(bias|pos_embed\w*|position_embeddings?|cls_token|dist_token|reg_token|mask_token|"
    r"distillation_token|register_tokens|relative_position\w*)(\.|$)"
)
REFERENCE_BATCH = 64


class Rates(NamedTuple):
    """Peak learning rate at `REFERENCE_BATCH` images a step, and the norm to which gradients are clipped (0:
    not at all)."""

    learning_rate: float
    max_grad_norm: float = 1.0


HEAD, ATTENTION, CONVOLUTION, SCRATCH = Rates(2e-3), Rates(7e-5), Rates(1e-3), Rates(1e-3)
# Their gradients have norms of 1 to 6: clipped to 1, nearly every step weighs the same in Adam's moments, and
# the rate is in effect far higher. Without, the loss at step 250 of 938 was 1.34 in place of 1.50.
DEPTHWISE = Rates(5.66e-3, max_grad_norm=0.0)


def decay_parameter_names(model: nn.Module) -> list[str]:
    """Weight matrices and kernels: all that weight decay should reach.

    Not biases, norms (one axis), position embeddings or tokens, nor what the model itself exempts
    (timm's `no_weight_decay`).
    """
    exempt: set[str] = set()
    for prefix, module in model.named_modules():
        declared = getattr(module, "no_weight_decay", None)
        if callable(declared):
            exempt |= {f"{prefix}.{name}" if prefix else name for name in declared()}
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and not NO_DECAY.search(name) and name not in exempt
    ]


def default_rates(model: nn.Module, batch_size: int, *, scratch: bool = False) -> Rates:
    """Peak learning rate for AdamW, and clipping, by family; batch_size: images a step in all.

    The rates of a head alone, of pretrained networks with depthwise convolutions (EfficientNet,
    MobileNet), of others with BatchNorm, of pretrained transformers, and of random weights; scaled by the
    square root of the batch.

    Source: Malladi et al., On the SDEs and Scaling Rules for Adaptive Gradient Algorithms, 2022.
    """
    rates = _family_rates(model, scratch)
    scaled = rates.learning_rate * math.sqrt(batch_size / REFERENCE_BATCH)
    return rates._replace(learning_rate=float(f"{scaled:.3g}"))


def _family_rates(model: nn.Module, scratch: bool) -> Rates:
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    if trainable < 0.05 * sum(p.numel() for p in parameters):
        return HEAD
    if scratch:
        return SCRATCH
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return ATTENTION
    if any(isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 3 for m in model.modules()):
        return DEPTHWISE
    return CONVOLUTION


def decay_learning_rates(
    optimizer: Optimizer, depths: dict[nn.Parameter, int], layer_decay: float
) -> None:
    """Give a parameter of depth d the learning rate of its group times layer_decay to the power d.

    Source: Clark et al., ELECTRA, 2020, appendix A; Bao et al., BEiT, 2021, for images.
    """
    groups = []
    for group in optimizer.param_groups:
        by_depth: dict[int, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_depth.setdefault(depths[parameter], []).append(parameter)
        for depth, parameters in sorted(by_depth.items()):
            rate = group["lr"] * layer_decay**depth
            groups.append({**group, "params": parameters, "lr": rate})
    optimizer.param_groups[:] = groups

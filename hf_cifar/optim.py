"""Which weights decay, and a learning rate that suits the model."""

from __future__ import annotations

import math
import re

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

# Position embeddings and class tokens have two or more axes, but are no weights of a layer.
NO_DECAY = re.compile(
    r"(^|\.)(bias|pos_embed\w*|position_embeddings?|cls_token|dist_token|reg_token|mask_token|"
    r"distillation_token|register_tokens|relative_position\w*)(\.|$)"
)
REFERENCE_BATCH = 64
HEAD_RATE, DEPTHWISE_RATE, CONVOLUTION_RATE, ATTENTION_RATE = 2e-3, 3e-3, 1e-3, 7e-5


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


def default_learning_rate(model: nn.Module, batch_size: int, *, scratch: bool = False) -> float:
    """Peak learning rate for AdamW, by model family; batch_size is the images per step on all processes.

    2e-3 for a head alone, 3e-3 for depthwise convolutions (EfficientNet, MobileNet), 1e-3 for other
    networks with BatchNorm and for random weights, 7e-5 for pretrained transformers, each at 64 images a
    step and scaled by the square root of the batch.

    Source: Malladi et al., On the SDEs and Scaling Rules for Adaptive Gradient Algorithms, 2022.
    """
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    if trainable < 0.05 * sum(p.numel() for p in parameters):
        rate = HEAD_RATE
    elif not any(isinstance(module, _BatchNorm) for module in model.modules()):
        rate = CONVOLUTION_RATE if scratch else ATTENTION_RATE
    elif any(isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 3 for m in model.modules()):
        rate = DEPTHWISE_RATE
    else:
        rate = CONVOLUTION_RATE
    return float(f"{rate * math.sqrt(batch_size / REFERENCE_BATCH):.3g}")

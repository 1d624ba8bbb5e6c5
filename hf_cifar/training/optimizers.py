"""Optimisers: parameter groups, the optimiser by name, and default learning rates by model family."""

from __future__ import annotations

import ast
import functools
import inspect
import math
import re
from collections.abc import Callable, Collection
from typing import Any, get_args

import torch
from accelerate.utils import extract_model_from_parallel
from timm.optim import get_optimizer_class, get_optimizer_info
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_cifar.config import training as config
from hf_cifar.errors import UserError
from hf_cifar.models.blocks import block_depths
from hf_cifar.models.heads import head_parameter_names
from hf_cifar.models.lora import is_adapter

# Position embeddings and class tokens have two or more axes, but are not weights of a layer.
NO_DECAY = re.compile(
    r"(^|\.)(bias|pos_embed\w*|position_embeddings?|cls_token|dist_token|reg_token|mask_token|"
    r"distillation_token|register_tokens|relative_position\w*)(\.|$)"
)
REFERENCE_BATCH = 64


def build_optimizer(
    model: nn.Module,
    args: TrainingArguments,
    layer_decay: float = 1.0,
    l1_decay: float = 0.0,
    backbone_learning_rate: float | None = None,
) -> Optimizer:
    """Return the optimiser that `args` name, a key of `OPTIMIZERS`.

    Weight decay and L1 decay apply to weight matrices and kernels only; a layer decay other than 1 lowers
    the learning rate block by block towards the input. backbone_learning_rate: peak learning rate of
    everything but the head; default: that of `args`.
    """
    build, options = optimizer_class(args, model)
    groups: Any = parameter_groups(model, args.weight_decay)
    # GaLore, Apollo and LOMO make their own groups.
    for name in ("params", "model", "optimizer_dict"):
        groups = options.pop(name, groups)
    optimizer = build(groups, **options)
    classifier = extract_model_from_parallel(model, keep_torch_compile=False)
    if backbone_learning_rate is not None:
        names = head_parameter_names(classifier)
        head = {p for name, p in classifier.named_parameters() if name in names}
        set_backbone_rate(optimizer, head, backbone_learning_rate)
    if layer_decay != 1:
        depths = block_depths(classifier)
        by_parameter = {p: depths[name] for name, p in classifier.named_parameters()}
        decay_learning_rates(optimizer, by_parameter, layer_decay)
    if l1_decay:
        weights = set(parameter_groups(model, 0.0)[0]["params"])
        optimizer.register_step_post_hook(
            functools.partial(shrink, weights=weights, decay=l1_decay)
        )
    return optimizer


@torch.no_grad()
def shrink(optimizer: Optimizer, *_: Any, weights: Collection[nn.Parameter], decay: float) -> None:
    """Move the trainable `weights` of an optimiser towards 0, at most by `decay` times their learning rate.

    This is the proximal operator of an L1 penalty. Like AdamW's weight decay, and unlike a term of the loss,
    it does not pass through the optimiser's moments; and weights become exactly 0.

    Source: Parikh and Boyd, Proximal Algorithms, 2014, section 6.5.2.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter in weights and parameter.requires_grad:
                torch.nn.functional.softshrink(parameter, float(group["lr"]) * decay, out=parameter)


def optimizer_class(
    args: TrainingArguments, model: nn.Module
) -> tuple[type[Optimizer], dict[str, Any]]:
    """Return the class of the optimiser that `args` name, and its options with the learning rate.

    Raises: ImportError, RuntimeError or ValueError if its package is missing or its options are wrong.
    """
    return OPTIMIZERS[optimizer_name(args)](args, model)


def optimizer_name(args: TrainingArguments) -> str:
    """Return the name given by `--optim`."""
    return getattr(args.optim, "value", args.optim)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups of the trainable parameters: with weight decay and without."""
    decaying = set(decay_parameter_names(model))
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in trainable if name in decaying], "weight_decay": weight_decay},
        {"params": [p for name, p in trainable if name not in decaying], "weight_decay": 0.0},
    ]


def decay_parameter_names(model: nn.Module) -> list[str]:
    """List the weight matrices and kernels, to which weight decay applies.

    Biases, norms (one axis), position embeddings and tokens are left out, and so are the parameters that the
    model itself exempts (timm's `no_weight_decay`).
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


def default_rate(
    model: nn.Module,
    batch_size: int,
    *,
    optim: str = "adamw_torch",
    optim_args: str | None = None,
    scratch: bool = False,
) -> float | None:
    """Return the default peak learning rate of an optimiser for the family of a model, or None if unknown.

    batch_size: images per step, over all processes. scratch: the weights are random. The rate scales
    linearly with the batch for SGD, and with its square root for all others; for SGD with momentum m it is
    multiplied by 1 - m, because each gradient counts 1 / (1 - m) times.

    Source: Malladi et al., On the SDEs and Scaling Rules for Adaptive Gradient Algorithms, 2022;
    Goyal et al., Accurate, Large Minibatch SGD, 2017.
    """
    optimizer = OPTIMIZER_FAMILIES.get(optim)
    rate = RATES.get(optimizer, {}).get(model_family(model, scratch))
    if rate is None:
        return None
    relative = batch_size / REFERENCE_BATCH
    factor = math.sqrt(relative)
    if optimizer == "sgd":
        factor = relative * (1 - momentum_of(optim, optim_args))
    return float(f"{rate * factor:.3g}")


def default_weight_decay(optim: str) -> float:
    """Return the default weight decay of an optimiser.

    AdamW and its variants subtract decay x learning rate x weight from each weight. Adam, RMSprop and AdaGrad
    add decay x weight to the gradient instead, and then divide by the gradient's magnitude: 0.05 would
    outweigh the loss. Without momentum, SGD's learning rates are 200 times AdamW's; its decay is a hundredth.
    """
    return 5e-4 if optim in COUPLED_DECAY else 0.05


def momentum_of(optim: str, optim_args: str | None) -> float:
    """Return the momentum of SGD, from its name or arguments. Raises: UserError if not in [0, 1)."""
    found = re.search(r"\bmomentum\s*=\s*([^,]*)", optim_args or "")
    try:
        momentum = float(found[1]) if found else 0.0 if optim == "sgd" else 0.9
    except ValueError:
        momentum = -1.0
    if not 0 <= momentum < 1:
        raise UserError(f"--optim_args {optim_args}: momentum must be a number from 0 to below 1")
    return momentum


def model_family(model: nn.Module, scratch: bool = False) -> str:
    """Return the model family for the default rates, a key of `RATES["adamw"]`."""
    if any(is_adapter(name) for name, _ in model.named_parameters()):
        return "lora"
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    if trainable < 0.05 * sum(p.numel() for p in parameters):
        return "head"
    if scratch:
        return "scratch"
    has_norms = any(isinstance(module, _BatchNorm) for module in model.modules())
    return "convolution" if has_norms else "attention"


def set_backbone_rate(
    optimizer: Optimizer, head: Collection[nn.Parameter], learning_rate: float
) -> None:
    """Set the learning rate of all parameters but the `head`'s, whose groups come first: the Trainer logs the
    learning rate of the first group."""
    groups: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for group in optimizer.param_groups:
        for in_head, rate in ((True, group["lr"]), (False, learning_rate)):
            parameters = [p for p in group["params"] if (p in head) is in_head]
            if parameters:
                groups[not in_head].append({**group, "params": parameters, "lr": rate})
    optimizer.param_groups[:] = [*groups[0], *groups[1]]


def decay_learning_rates(
    optimizer: Optimizer, depths: dict[nn.Parameter, int], layer_decay: float
) -> None:
    """Set the rate of a parameter of depth d to that of its group times layer_decay to the power d.

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


def trainer_optimizer(
    args: TrainingArguments, model: nn.Module
) -> tuple[type[Optimizer], dict[str, Any]]:
    """Return an optimiser of transformers and its options.

    Raises: ValueError for an argument that one of torch does not take; the Trainer would ignore it.
    """
    build, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    unknown = parse_arguments(args.optim_args).keys() - options.keys()
    if unknown and optimizer_name(args) in OF_TORCH:
        raise ValueError(f"it does not take {', '.join(sorted(unknown))}")
    return build, options


def timm_optimizer(
    args: TrainingArguments, model: nn.Module
) -> tuple[type[Optimizer], dict[str, Any]]:
    """Return an optimiser of timm and its options.

    `--adam_beta1` and its kin apply if they are not the Trainer's defaults: timm has its own for each.
    """
    name = optimizer_name(args)
    build, info = get_optimizer_class(name), get_optimizer_info(name)
    options: dict[str, Any] = {"lr": args.learning_rate}
    accepted = inspect.signature(build).parameters
    if "momentum" in accepted and not accepted["momentum"].default:
        options["momentum"] = 0.9
    betas = (args.adam_beta1, args.adam_beta2)
    if betas != (0.9, 0.999):
        if info.num_betas != 2 or not info.has_betas:
            raise ValueError("it does not have two betas; leave out --adam_beta1 and --adam_beta2")
        options["betas"] = betas
    if args.adam_epsilon != 1e-8:
        options["eps"] = args.adam_epsilon
    options |= parse_arguments(args.optim_args)
    if unknown := options.keys() - accepted.keys():
        raise ValueError(f"it does not take {', '.join(sorted(unknown))}")
    return build, options


def parse_arguments(text: str | None) -> dict[str, Any]:
    """Parse `momentum=0.9,betas=(0.9,0.95)`. Raises: ValueError."""
    found = {}
    for part in re.split(r",(?![^(]*\))", (text or "").replace(" ", "")):
        if not part:
            continue
        name, is_given, value = part.partition("=")
        if not is_given:
            raise ValueError(f"{part} is not NAME=VALUE")
        try:
            found[name] = ast.literal_eval(value.title() if value in ("true", "false") else value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


# Optimisers of torch, whose arguments the Trainer picks by name.
OF_TORCH = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
# Functions of the arguments and the model, with the result of `optimizer_class`.
OPTIMIZERS: dict[str, Callable[..., tuple[type[Optimizer], dict[str, Any]]]] = {
    name: trainer_optimizer if name in tuple(OptimizerNames) else timm_optimizer
    for name in get_args(config.Optimizer)
}
# Optimisers by their update rule. Others have no known rate.
OPTIMIZER_FAMILIES = {
    **dict.fromkeys(
        (
            "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused",
            "adamw_anyprecision", "adamw_torch_4bit", "adamw_torch_8bit", "adamw_bnb_8bit", "adamw_8bit",
            "paged_adamw_32bit", "paged_adamw_8bit", "adamw",
        ),
        "adamw",
    ),
    **dict.fromkeys(("sgd", "momentum", "nesterov"), "sgd"),
    **dict.fromkeys(("lion", "lion_32bit", "lion_8bit"), "lion"),
    **dict.fromkeys(("muon", "nmuon"), "muon"),
    "adam": "adam",
    "rmsprop": "rmsprop",
    "adagrad": "adagrad",
}  # fmt: skip
# Optimisers that add weight decay to the gradient, and those with learning rates like SGD's.
COUPLED_DECAY = frozenset(
    (
        "sgd", "adagrad", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
        "schedule_free_sgd", "lomo", "adadelta", "adam", "adamax", "adopt", "kron", "lamb", "larc", "lars",
        "madgrad", "momentum", "nadam", "nesterov", "nesterovw", "nlarc", "nlars", "novograd", "radam",
        "rmsproptf", "sgdp", "sgdw",
    )
)  # fmt: skip
# Default learning rates for `REFERENCE_BATCH` images a step, by optimiser and model family;
# `python -m benchmarks.rates` measures them.
RATES: dict[str | None, dict[str, float]] = {
    "adamw": {
        "head": 1e-3,
        # Published: peft's example for image classification uses 5e-3 for 128 images per step, at our scaling
        # of the adapters; Schulman et al., LoRA Without Regret, 2025, use ten times the learning rate of full
        # fine-tuning, at four times our scaling. Measured: EfficientNet-Lite0 on 2,000 images, 2 epochs:
        # accuracy 0.788, 0.808 and 0.794 at 1e-3, 3e-3 and 8.5e-3.
        "lora": 3e-3,
        "attention": 7e-5,
        "convolution": 5e-4,
        "scratch": 2.5e-3,
    },
    "sgd": {"head": 0.4, "scratch": 0.2},  # without momentum
    "adam": {"head": 1e-3, "scratch": 2e-3},
    "rmsprop": {"head": 1e-3, "scratch": 1e-3},
    "adagrad": {"head": 0.01, "scratch": 0.01},
    "lion": {"head": 3e-4, "scratch": 1e-3},
    "muon": {"head": 2.5e-3, "scratch": 5e-3},
}

"""Dropout and stochastic depth: set and read the rates of models that have them."""

from __future__ import annotations

import logging

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_cifar.config.model import ModelConfig
from hf_cifar.errors import UserError

logger = logging.getLogger(__name__)
# Arguments of timm.create_model, by option.
TIMM_ARGUMENTS = {"dropout": "drop_rate", "drop_path": "drop_path_rate"}
# Fields of transformers' configs, by option; attention keeps its own dropout.
CONFIG_FIELDS = {
    "dropout": ("hidden_dropout_prob", "classifier_dropout_prob", "dropout_rate"),
    "drop_path": ("drop_path_rate", "drop_connect_rate"),
}


def requested_rates(config: ModelConfig) -> dict[str, float]:
    """Return the dropout and drop-path rates that the options set, by option."""
    rates = {"dropout": config.dropout, "drop_path": config.drop_path}
    return {name: rate for name, rate in rates.items() if rate is not None}


def set_dropout(target: PreTrainedConfig, config: ModelConfig) -> None:
    """Write the requested rates into the configuration from which a model is built.

    Raises: UserError for a model that has no such rate.
    """
    for name, rate in requested_rates(config).items():
        if target.model_type == "timm_wrapper":
            _require_timm_argument(target.architecture, name)
            target.model_args = {**(target.model_args or {}), TIMM_ARGUMENTS[name]: rate}
            continue
        found = {field: getattr(target, field, None) for field in CONFIG_FIELDS[name]}
        fields = [field for field, value in found.items() if isinstance(value, (int, float))]
        if not fields:
            raise _without(name, getattr(target, "module_class", "") or target.model_type)
        try:
            for field in fields:
                setattr(target, field, rate)
        except StrictDataclassError:  # LeViT's drop_path_rate is an integer
            raise _without(name, target.model_type) from None


def _require_timm_argument(architecture: str, name: str) -> None:
    try:
        _throwaway(architecture, **{TIMM_ARGUMENTS[name]: 0.0})
    except TypeError:
        raise _without(name, f"timm's {architecture}") from None


def check_dropout(model: PreTrainedModel, config: ModelConfig) -> None:
    """Raises: UserError if a model ignores a requested rate."""
    for name, rate in requested_rates(config).items():
        if rate and not _has_rate(model, name, rate):
            raise _without(name, type(model).__name__)


def drop_path_rates(model: nn.Module) -> list[float]:
    """List the drop probabilities of the layers with stochastic depth, from input to output."""
    return [
        module.drop_prob
        for module in model.modules()
        if type(module).__name__.endswith("DropPath") and module.drop_prob
    ]


def dropout_rates(model: nn.Module) -> list[float]:
    """List the rates of the dropout layers, and of timm's functional dropout before the head."""
    layers = [module.p for module in model.modules() if isinstance(module, nn.Dropout) and module.p]
    functional = [getattr(module, "drop_rate", None) for module in model.modules()]
    return layers + [rate for rate in functional if isinstance(rate, float) and rate]


def _has_rate(model: nn.Module, name: str, rate: float) -> bool:
    if name == "dropout":
        return rate in dropout_rates(model)
    # transformers' EfficientNet uses nn.Dropout for stochastic depth.
    connects = hasattr(getattr(model, "config", None), "drop_connect_rate")
    return bool(dropout_rates(model) if connects else drop_path_rates(model))


def rates_of_timm(model: nn.Module, plain: nn.Module) -> dict[str, float]:
    """Return the dropout and drop-path rates, by option, of a timm model where they differ from those of
    `plain`, which has the defaults.

    Logs a warning if they cannot be kept, because other arguments of timm have set them.
    """
    architecture = model.pretrained_cfg["architecture"]
    dropout, paths, rates = dropout_rates(model), drop_path_rates(model), {}
    if dropout != dropout_rates(plain):
        rates["dropout"] = max(dropout, default=0.0)
    if paths != drop_path_rates(plain):
        # In some architectures, the rate of the last layer is below drop_path_rate.
        whole = drop_path_rates(_throwaway(architecture, drop_path_rate=1.0))
        rates["drop_path"] = round(max(paths, default=0.0) / max(whole), 6)
    if not rates:
        return rates
    same = _throwaway(architecture, **{TIMM_ARGUMENTS[name]: rate for name, rate in rates.items()})
    if dropout == dropout_rates(same) and np.allclose(paths, drop_path_rates(same), atol=1e-5):
        return rates
    logger.warning(
        "%s has dropout that drop_rate and drop_path_rate do not describe; it is not kept",
        architecture,
    )
    return {}


def _throwaway(architecture: str, **rates: float) -> nn.Module:
    """Return a timm model without advancing the random generator, so that the new head stays the same."""
    import timm

    with torch.random.fork_rng(devices=[]):
        return timm.create_model(architecture, pretrained=False, **rates)


def _without(name: str, what: str) -> UserError:
    kind = {"dropout": "dropout", "drop_path": "stochastic depth"}[name]
    return UserError(f"--{name}: {what} has no {kind} to set; leave it out")

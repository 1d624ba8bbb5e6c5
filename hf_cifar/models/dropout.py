"""Dropout and stochastic depth: their rates, where a model has them."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_cifar.config.model import ModelConfig
from hf_cifar.errors import UserError

# Arguments of timm.create_model, by option.
TIMM_ARGUMENTS = {"dropout": "drop_rate", "drop_path": "drop_path_rate"}
# Fields of transformers' configs, by option; attention keeps its own dropout.
CONFIG_FIELDS = {
    "dropout": ("hidden_dropout_prob", "classifier_dropout_prob", "dropout_rate"),
    "drop_path": ("drop_path_rate", "drop_connect_rate"),
}


def requested_rates(config: ModelConfig) -> dict[str, float]:
    """Return the rates that the options set, by option."""
    rates = {"dropout": config.dropout, "drop_path": config.drop_path}
    return {name: rate for name, rate in rates.items() if rate is not None}


def set_dropout(target: PreTrainedConfig, config: ModelConfig) -> None:
    """Write the requested rates into the configuration from which a model is built.

    Raises: UserError for a model without them.
    """
    requested = requested_rates(config)
    if requested and target.model_type == "timm_wrapper":
        arguments = {TIMM_ARGUMENTS[name]: rate for name, rate in requested.items()}
        target.model_args = {**(target.model_args or {}), **arguments}
        _check_timm(target, requested)
        return
    for name, rate in requested.items():
        fields = [
            f for f in CONFIG_FIELDS[name] if isinstance(getattr(target, f, None), (int, float))
        ]
        if not fields:
            raise _without(name, getattr(target, "module_class", "") or target.model_type)
        for field in fields:
            setattr(target, field, rate)


def check_dropout(model: PreTrainedModel, config: ModelConfig) -> None:
    """Raises: UserError if a model ignores a requested rate."""
    for name, rate in requested_rates(config).items():
        if rate and not _has_rate(model, name, rate):
            raise _without(name, type(model).__name__)


def drop_path_rates(model: nn.Module) -> list[float]:
    """List the rates of the layers with stochastic depth, from input to output."""
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
    # transformers' EfficientNet drops layers by nn.Dropout.
    connects = hasattr(getattr(model, "config", None), "drop_connect_rate")
    return bool(dropout_rates(model) if connects else drop_path_rates(model))


def _check_timm(target: Any, requested: dict[str, float]) -> None:
    import timm

    options = {key: value for key, value in target.model_args.items() if key != "num_classes"}
    for name in requested:
        others = {TIMM_ARGUMENTS[each] for each in requested if each != name}
        given = {key: value for key, value in options.items() if key not in others}
        try:
            timm.create_model(target.architecture, pretrained=False, **given)
        except TypeError:
            raise _without(name, f"timm's {target.architecture}") from None


def _without(name: str, what: str) -> UserError:
    kind = {"dropout": "dropout", "drop_path": "stochastic depth"}[name]
    return UserError(f"--{name}: {what} has no {kind}; leave it out")

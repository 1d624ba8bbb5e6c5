"""The head of a classifier: find its parameters, initialise them, scale its logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_cifar.errors import UserError
from hf_cifar.models.ensemble import EnsembleForImageClassification
from hf_cifar.text import listed


def head_parameter_names(model: PreTrainedModel) -> set[str]:
    """Names of the classification head's parameters.

    Raises: UserError for a model whose head cannot be distinguished from its backbone.
    """
    if model.config.model_type == "timm_wrapper":
        classifier = model.timm_model.get_classifier()
        heads = classifier if isinstance(classifier, (tuple, list)) else (classifier,)
        wanted = {id(p) for head in heads for p in head.parameters()}
        names = {name for name, p in model.named_parameters() if id(p) in wanted}
    elif model.config.model_type == "torch_module":
        layers = [m for m in model.modules() if list(m.parameters(recurse=False))]
        wanted = {id(p) for layer in layers[-1:] for p in layer.parameters()}
        names = {name for name, p in model.named_parameters() if id(p) in wanted}
    else:
        prefix = f"{model.base_model_prefix}."
        names = {name for name, _ in model.named_parameters() if not name.startswith(prefix)}
    if not names:
        raise UserError(
            f"{type(model).__name__} has no classification head separate from its backbone; use another model"
        )
    return names


def linear_head(model: PreTrainedModel) -> nn.Linear | None:
    """The head if it is a single linear layer, the only one to train after a frozen backbone; else None."""
    if isinstance(model, EnsembleForImageClassification):
        return None
    linear = _linear_layers_of_head(model)
    if len(linear) != 1 or len(head_parameter_names(model)) != len(list(linear[0].parameters())):
        return None
    return linear[0]


def output_layers(model: PreTrainedModel) -> list[nn.Linear]:
    """The linear layers that compute the logits: one, two for a model that averages two heads, or none if
    other layers compute them."""
    layers = _linear_layers_of_head(model)
    return [layer for layer in layers if layer.out_features == model.config.num_labels]


def _linear_layers_of_head(model: PreTrainedModel) -> list[nn.Linear]:
    names = head_parameter_names(model)
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" in names
    ]


def divide_logits(model: PreTrainedModel, divisor: float) -> bool:
    """Divide the logits by scaling the layers that compute them; for an ensemble, by its config.

    Returns False if that is impossible.
    """
    if isinstance(model, EnsembleForImageClassification):
        model.config.logits_divisor *= divisor
        return True
    layers = output_layers(model)
    with torch.no_grad():
        for parameter in (p for layer in layers for p in layer.parameters()):
            parameter.div_(divisor)
    return bool(layers)


def require_bias(model: PreTrainedModel) -> None:
    """Raises: UserError for a head whose logits cannot be shifted by a bias."""
    layers = output_layers(model)
    if not layers or any(layer.bias is None for layer in layers):
        raise UserError(
            f"--class_balance post_hoc changes the biases of the head, and that of {type(model).__name__} "
            "has none; pass logit_adjustment"
        )


def shift_logits(model: PreTrainedModel, shift: Tensor) -> None:
    """Subtract a number for each class, [K], from the logits, by changing the biases of the head."""
    with torch.no_grad():
        for layer in output_layers(model):
            layer.bias.sub_(shift.to(layer.bias))


def reset_head(model: PreTrainedModel, head: set[str]) -> None:
    """Reinitialise a head of the right shape that was trained for other labels."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in head and parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name in head and name.endswith("bias"):
                nn.init.zeros_(parameter)


def zero_head(model: PreTrainedModel, new: set[str]) -> None:
    """Zero a new head on a frozen pretrained backbone, so that every logit is 0 at first.

    Random weights would only have to be unlearnt: with timm's head, the first logits of EfficientNet-Lite0
    have a standard deviation of 8, which makes the first steps of LoRA destroy its features.

    Source: Kolesnikov et al., Big Transfer, 2020.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    for layer in output_layers(model):
        for parameter in layer.parameters():
            if names[parameter] in new:
                nn.init.zeros_(parameter)


def grow_head(model: PreTrainedModel, id2label: dict[int, str]) -> None:
    """Give the head of a model the classes `id2label`; those that it already has, by name, keep their rows.

    The row of a new class has zero weights and the mean bias of the old ones until `probe_new_rows` fits it;
    `new_rows` of the model are the ids of these classes. Raises: UserError for a head of another kind than
    linear layers, or without any of the classes.
    """
    old, layers = model.config.id2label, output_layers(model)
    if not layers:
        raise UserError(
            f"the head of {type(model).__name__} is not a linear layer, and cannot be given more classes; "
            "use another model"
        )
    place = {name: i for i, name in old.items()}
    known = [i for i, name in id2label.items() if name in place]
    if not known:
        raise UserError(
            f"the model knows {listed(list(old.values()), 5)}, and the data have none of these classes; "
            "fine-tune it with hf-cifar finetune"
        )
    rows = [place[id2label[i]] for i in known]
    for name, layer in list(model.named_modules()):
        if not any(layer is each for each in layers):
            continue
        assert isinstance(layer, nn.Linear)
        grown = nn.Linear(layer.in_features, len(id2label), bias=layer.bias is not None)
        grown = grown.to(layer.weight).requires_grad_(layer.weight.requires_grad)
        with torch.no_grad():
            nn.init.zeros_(grown.weight)[known] = layer.weight[rows]
            if layer.bias is not None:
                grown.bias.fill_(layer.bias.mean())[known] = layer.bias[rows]
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, grown)
    model.config.id2label = id2label
    model.config.label2id = {name: i for i, name in id2label.items()}
    model.num_labels = len(id2label)
    if model.config.model_type == "timm_wrapper":
        model.timm_model.num_classes = len(id2label)
        model.config.label_names = list(id2label.values())  # which its to_dict would not renew
    model.new_rows = sorted(set(id2label) - set(known))


def set_head(model: PreTrainedModel, solution: Tensor) -> None:
    """Give a linear head the weights and biases [num_classes, D + 1] of a solution."""
    head = linear_head(model)
    assert head is not None
    with torch.no_grad():
        head.weight.copy_(solution[:, :-1])
        if head.bias is not None:
            head.bias.copy_(solution[:, -1])


def mark_new_head(model: PreTrainedModel, new: set[str]) -> None:
    """Remember the initial weights of a new head on a pretrained backbone, see `has_new_head`."""
    parameters = dict(model.named_parameters())
    names = head_parameter_names(model) & new
    model.initial_head = {name: parameters[name].detach().clone() for name in sorted(names)}


def has_new_head(model: PreTrainedModel) -> bool:
    """Return True if a pretrained model's head still has its initial weights."""
    initial, parameters = getattr(model, "initial_head", {}), dict(model.named_parameters())
    return bool(initial) and all(
        torch.equal(parameters[name].detach().cpu(), value) for name, value in initial.items()
    )

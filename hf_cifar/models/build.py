"""Build a pretrained classifier with a head for the data's labels, and its image processor."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_cifar.config.data import ValueRange
from hf_cifar.config.model import BUNDLED, SCRATCH, ModelConfig, is_exported
from hf_cifar.config.objects import InMemory
from hf_cifar.errors import UserError
from hf_cifar.hub.origin import origin_of_model
from hf_cifar.models.article import (
    ArticleCNNConfig,
    ArticleCNNForImageClassification,
    ArticleMLPConfig,
    ArticleMLPForImageClassification,
)
from hf_cifar.models.blocks import describe_trainable, freeze
from hf_cifar.models.classifier import Classifier, describe, label2id
from hf_cifar.models.dropout import check_dropout, set_dropout
from hf_cifar.models.exported import load_exported
from hf_cifar.models.files import count_weights, model_folder
from hf_cifar.models.guards import check_forward, check_labels, library_errors, limit_model_size
from hf_cifar.models.heads import (
    grow_head,
    head_parameter_names,
    mark_new_head,
    reset_head,
    zero_head,
)
from hf_cifar.models.lora import add_adapters
from hf_cifar.models.modules import wrap_module
from hf_cifar.models.names import check_model_name
from hf_cifar.models.objects import (
    finished_object,
    is_known,
    is_timm,
    model_and_processor,
    save_object,
)
from hf_cifar.models.problem_type import set_problem
from hf_cifar.models.processor import plain_processor, timm_processor, transformers_processor
from hf_cifar.models.rejection import forget_rejection
from hf_cifar.models.resizing import native_size, resize_transformers
from hf_cifar.models.timm_models import (
    build_bundled,
    build_timm,
    reset_timm_head,
    resize_timm,
    wrap_timm,
)
from hf_cifar.models.value_range import set_value_range
from hf_cifar.text import listed

logger = logging.getLogger(__name__)

ARTICLE_MODELS = {  # by models.names.ARTICLE_NAMES
    "article_cnn": (ArticleCNNConfig, ArticleCNNForImageClassification),
    "article_mlp": (ArticleMLPConfig, ArticleMLPForImageClassification),
}
ARTICLE_IMAGE_SIZE = 32


def build_model(
    config: ModelConfig,
    id2label: dict[int, str],
    *,
    multi_label: bool = False,
    value_range: ValueRange | None = None,
) -> Classifier:
    """Load or create the model, relabel its head to `id2label`, set its input size, and freeze layers.

    The head is new unless the checkpoint has exactly these labels. multi_label: an image may have multiple
    labels, or none. value_range: of training images of more than 8 bits.
    Raises: UserError for an unknown model, no network, or an unsupported image size.
    """
    name = config.model_name_or_path
    check_model_name(name, config.model_revision, trust_remote_code=config.trust_remote_code)
    with library_errors(name):
        if isinstance(name, InMemory):
            if config.grow_head:
                raise UserError("--grow_head needs a saved model; pass the folder of a run")
            classifier, new = _build_object(name.value, config, id2label)
        elif config.grow_head:
            classifier, new = _load_grown(config, id2label), set()
        elif name.startswith(SCRATCH):
            classifier, new = _build_scratch(name.removeprefix(SCRATCH), config, id2label)
        elif name.startswith(BUNDLED):
            classifier, new = build_bundled(config, id2label)
        else:
            classifier, new = _load_pretrained(config, id2label)
        model = classifier.model
        if new < set(model.state_dict()):
            if config.freeze == "backbone" or config.lora_rank:
                zero_head(model, new)
            mark_new_head(model, new)
        check_forward(classifier, name, "pass another --image_size")
    check_dropout(model, config)
    set_problem(model, multi_label)
    forget_rejection(model)
    set_value_range(model, value_range)
    freeze(model, config.freeze)
    if config.lora_rank:
        origin = origin_of_model(config)
        base = origin.hub_id or origin.name
        add_adapters(classifier, config.lora_rank, base, config.model_revision)
    _log_summary(describe(model) if isinstance(name, InMemory) else name, model, new)
    return classifier


def load_classifier(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Classifier:
    """Load a saved fine-tuned model, or an exported ONNX file, for evaluation and prediction; of a model in
    memory, make a copy.

    Raises: UserError for a missing or damaged model.
    """
    if is_exported(name):
        with library_errors(name):
            classifier = load_exported(name)
            check_labels(classifier.model)
            check_forward(classifier, name, "export its run again")
        return classifier
    check_model_name(name, revision, trust_remote_code=trust_remote_code)
    if isinstance(name, InMemory):
        return finished_object(name.value)
    with library_errors(name):
        folder = model_folder(name, revision, trust_remote_code)
        config = _read_config(folder, trust_remote_code)
        with limit_model_size(count_weights(folder)):
            model, loading = AutoModelForImageClassification.from_pretrained(
                folder,
                config=config,
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
            )
        if loading["missing_keys"]:
            raise ValueError(
                f"its weights lack {listed(sorted(loading['missing_keys']), 4)}; fine-tune it first"
            )
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
        classifier = Classifier(model, processor)
        check_labels(model)
        check_forward(classifier, name, "its config.json and its image processor disagree")
    return classifier


def _load_grown(config: ModelConfig, id2label: dict[int, str]) -> Classifier:
    """Load a fine-tuned model with its own classes, then give its head those of the data."""
    name, trust = config.model_name_or_path, config.trust_remote_code
    folder = model_folder(name, config.model_revision, trust)
    known = _read_config(folder, trust).id2label
    classifier, new = _load_pretrained(dataclasses.replace(config, grow_head=False), dict(known))
    if new:
        raise ValueError(f"its weights lack {listed(sorted(new), 4)}; fine-tune it first")
    grow_head(classifier.model, id2label)
    return classifier


def _read_config(folder: Path, trust_remote_code: bool, **labels: Any) -> PreTrainedConfig:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **labels)
    if config.model_type == "timm_wrapper" and config.model_args:
        # Stored there by timm.create_model(num_classes=...); transformers would pass it twice.
        config.model_args = {k: v for k, v in config.model_args.items() if k != "num_classes"}
    if config.model_type == "timm_wrapper" and "id2label" in labels:
        config.label_names = list(labels["id2label"].values())  # which its to_dict would not renew
    return config


def _load_pretrained(config: ModelConfig, id2label: dict[int, str]) -> tuple[Classifier, set[str]]:
    name = config.model_name_or_path
    folder = model_folder(name, config.model_revision, config.trust_remote_code)
    trust = config.trust_remote_code
    old_labels = dict(_read_config(folder, trust).id2label)
    labels = {"id2label": id2label, "label2id": label2id(id2label)}
    target = _read_config(folder, trust, num_labels=len(id2label), **labels)
    set_dropout(target, config)
    with limit_model_size(count_weights(folder)):
        model, loading = AutoModelForImageClassification.from_pretrained(
            folder,
            config=target,
            dtype=torch.float32,  # a float16 checkpoint would lose small updates in training
            ignore_mismatched_sizes=True,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=trust,
        )
    mismatched = {key[0] if isinstance(key, tuple) else key for key in loading["mismatched_keys"]}
    new = set(loading["missing_keys"]) | mismatched
    head = head_parameter_names(model)
    if mismatched - head:
        raise ValueError(
            "its config.json and its weights disagree on the size of "
            f"{listed(sorted(mismatched - head), 4)}"
        )
    if old_labels != id2label or head & new:
        if target.model_type == "timm_wrapper":
            reset_timm_head(model, head)
        elif not head <= new:
            reset_head(model, head)
        new |= head
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=trust)
    if target.model_type == "timm_wrapper":
        size = config.image_size or target.pretrained_cfg["input_size"][-1]
        resize_timm(model, size, config)
        return Classifier(model, timm_processor(model.config, size, config.resize_mode)), new
    size = config.image_size or native_size(target, processor)
    if config.image_size is not None:
        model = resize_transformers(model, size)
    return Classifier(model, transformers_processor(processor, size, config.resize_mode)), new


def _build_object(
    value: Any, config: ModelConfig, id2label: dict[int, str]
) -> tuple[Classifier, set[str]]:
    """Build the classifier of a model in memory, which stays as it is."""
    model, processor = model_and_processor(value)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    if frozen and config.freeze == "none":
        logger.warning(
            "%s parameters of the model were frozen and are trained now; pass freeze=... to keep some frozen",
            f"{frozen:,}",
        )
    if is_timm(model):
        return wrap_timm(model, config, id2label)
    if not isinstance(model, PreTrainedModel) or not is_known(model):
        return wrap_module(model, processor, config, id2label)
    with tempfile.TemporaryDirectory() as folder:
        save_object(model, processor, config, id2label, Path(folder))
        saved = dataclasses.replace(config, model_name_or_path=folder, model_revision=None)
        return _load_pretrained(saved, id2label)


def wrap_network(
    network: nn.Module,
    image_processor: BaseImageProcessor | None,
    id2label: dict[int, str],
    *,
    multi_label: bool = False,
) -> Classifier:
    """Make a classifier of a copy of a timm model, or of a torch.nn.Module that returns logits.

    Frozen parameters stay frozen. Raises: UserError if it does not fit the labels, or the size of its input
    is unknown.
    """
    if is_timm(network):
        classifier, new = wrap_timm(network, ModelConfig(), id2label)
        classifier = Classifier(classifier.model, image_processor or classifier.image_processor)
    else:
        classifier, new = wrap_module(network, image_processor, ModelConfig(), id2label)
    model = classifier.model
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    for name, parameter in model.named_parameters():
        if name not in new:
            parameter.requires_grad = name.partition(".")[2] not in frozen
    set_problem(model, multi_label)
    _log_summary(type(network).__name__, model, new)
    return classifier


def _build_scratch(
    name: str, config: ModelConfig, id2label: dict[int, str]
) -> tuple[Classifier, set[str]]:
    if name in ARTICLE_MODELS:
        size = config.image_size or ARTICLE_IMAGE_SIZE
        config_class, model_class = ARTICLE_MODELS[name]
        target = config_class(image_size=size, id2label=id2label, label2id=label2id(id2label))
        set_dropout(target, config)
        model = model_class(target)
        return Classifier(model, plain_processor(size, config.resize_mode)), set(model.state_dict())
    return build_timm(name, config, id2label, None)


def _log_summary(name: str, model: PreTrainedModel, new: set[str]) -> None:
    tensors = len(model.state_dict())
    if len(new) >= tensors:
        logger.info("%s: all %d tensors are newly initialised", name, tensors)
    elif not new:
        logger.info("%s: all %d tensors kept", name, tensors)
    else:
        logger.info(
            "%s: %d tensors kept, %d newly initialised (%s)",
            name,
            tensors - len(new),
            len(new),
            listed(sorted(new), 4),
        )
    logger.info("%s", describe_trainable(model))

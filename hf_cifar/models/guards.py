"""Guards against checkpoints that are damaged or unsound: their size, labels, output and errors."""

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

MAX_SIDE = 2048  # pixels of an image that a model sees, each way
# A model may have more numbers than its file: another head, tensors stored once and used twice.
MODEL_TO_FILE, MARGIN = 3, 2**24
MAX_MODULES = 2**16


@contextlib.contextmanager
def library_errors(name: str) -> Iterator[None]:
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
def no_larger_than(stored: int) -> Iterator[None]:
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


def check_labels(model: PreTrainedModel) -> None:
    """Raises: ValueError unless the labels are names of 0, 1, ..., as many as there are logits."""
    id2label = model.config.id2label
    if sorted(id2label) != list(range(len(id2label))) or not all(
        isinstance(label, str) for label in id2label.values()
    ):
        raise ValueError("id2label in its config.json must name 0, 1, 2, ...")


def check_forward(classifier: Classifier, name: str, advice: str) -> None:
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

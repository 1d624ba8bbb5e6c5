"""Adapt a transformers model to another image size."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel

from hf_cifar.errors import UserError
from hf_cifar.transforms.preprocessing import Preprocessing


def native_size(config: PreTrainedConfig, processor: BaseImageProcessor) -> int:
    """Side in pixels of the images that the checkpoint's processor produces."""
    view = Preprocessing.from_image_processor(processor)
    size = view.crop or view.resize
    if isinstance(size, int):
        return size
    if size is not None:
        return size[0]
    if isinstance(config.image_size, int):
        return config.image_size
    raise UserError("the checkpoint does not declare its image size; pass --image_size")


def resize_transformers(model: PreTrainedModel, size: int) -> PreTrainedModel:
    """Copy a transformers model for size x size images, with interpolated position embeddings."""
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
    """Interpolate position embeddings [1, prefix + a*a, D] to [1, prefix + b*b, D], bicubically.

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
    raise UserError(
        f"--image_size {size}: {name} of this model cannot be resized; leave out --image_size"
    )

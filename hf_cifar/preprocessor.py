"""Turn any image into the input of a model, in the same way however the model is run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedModel

from hf_cifar.config.data import MAX_IMAGE_PIXELS, ValueRange
from hf_cifar.data.images import decode_cell, decode_image
from hf_cifar.data.objects import image_cell
from hf_cifar.models.value_range import value_range_of
from hf_cifar.transforms.preprocessing import Preprocessing

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Preprocessor:
    """Decode, turn upright, scale to 8 bits, resize, crop and normalise.

    value_range: of images of more than 8 bits; None: the full range of their type. max_pixels: larger images
    are refused before they are decoded.
    """

    preprocessing: Preprocessing
    value_range: ValueRange | None = None
    max_pixels: int = MAX_IMAGE_PIXELS

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        image_processor: BaseImageProcessor,
        max_pixels: int = MAX_IMAGE_PIXELS,
    ) -> Preprocessor:
        """Read the preprocessing of a model, which its config and its image processor share.

        Raises: UserError for an image processor that cannot be reproduced, or a damaged range.
        """
        preprocessing = Preprocessing.from_image_processor(image_processor)
        return cls(preprocessing, value_range_of(model), max_pixels)

    def decode(self, image: Any) -> np.ndarray:
        """Decode a file, encoded bytes, a Pillow image, an array or a tensor to [H, W, 3] uint8.

        Arrays: [H, W], [H, W, 3] or [3, H, W], of uint8, of floats in 0..1 or 0..255, or grey of 16 bits.
        Raises: UserError for anything that is not a complete image of up to `max_pixels` pixels.
        """
        if isinstance(image, (bytes, str, os.PathLike, Image.Image)):
            return decode_image(image, self.max_pixels, self.value_range)
        if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,):
            return image
        return decode_cell(image_cell(image), self.max_pixels, self.value_range)

    def pixels(self, images: Sequence[Any], device: torch.device = CPU) -> Tensor:
        """Resize and crop images, decoded or not, to float [N, 3, h, w], whole numbers 0..255."""
        return self.preprocessing.view_each([self.decode(image) for image in images], device)

    def __call__(self, images: Sequence[Any], device: torch.device = CPU) -> Tensor:
        """Compute `pixel_values` [N, 3, h, w] from images, decoded or not."""
        return self.preprocessing.normalize(self.pixels(images, device))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        values = self.value_range
        return {
            "preprocessing": self.preprocessing.to_dict(),
            "value_range": None if values is None else [values.low, values.high],
            "max_pixels": self.max_pixels,
        }

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Preprocessor:
        """Restore what `to_dict` returned."""
        values = saved["value_range"]
        return cls(
            Preprocessing.from_dict(saved["preprocessing"]),
            None if values is None else ValueRange(*values),
            saved["max_pixels"],
        )

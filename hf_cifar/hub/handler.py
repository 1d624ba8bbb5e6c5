"""Answer requests to Hugging Face Inference Endpoints with the model in this folder, as `hf-cifar predict`.

`hf-cifar push --handler` uploads this file. It needs torch, transformers and Pillow, and timm for a timm
model, but not hf_cifar. https://huggingface.co/docs/inference-endpoints/engines/toolkit describes the
interface.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

MAX_PIXELS = 8192 * 8192
Image.init()
FORMATS = tuple(
    {"AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "TIFF", "WEBP"} & {*Image.OPEN}
)  # older versions of Pillow do not read AVIF
GREY_16_BIT = ("I;16", "I;16B")
ORIENTATION, PHOTOMETRIC = 0x0112, 0x0106  # tags of EXIF and TIFF
BLACK_IS_ZERO = 1
PNG_BITS = 24  # where the header of a PNG file has its bits per number
DEEP = "only grey images of 16 bits are read here, beside those of 8 bits; convert it to 8 bits"


class EndpointHandler:
    """Classifies images. path: the folder with the model's files.

    Raises: ValueError if weights are missing, as with another version of transformers.
    """

    def __init__(self, path: str = "") -> None:
        # Code that a network needs is in this repository, as this file is.
        self._image_processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=True)
        model, loaded = AutoModelForImageClassification.from_pretrained(
            path, trust_remote_code=True, output_loading_info=True
        )
        missing = {name for name, _ in model.named_parameters()} & set(loaded["missing_keys"])
        if missing:
            raise ValueError(
                f"this version of transformers finds no weights for {min(missing)}; install the one that "
                "config.json names"
            )
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = model.to(self._device).eval()
        self._config = model.config.to_dict()
        self._multi_label = self._config.get("problem_type") == "multi_label_classification"
        self._reject, self._features = self._config.get("reject"), torch.empty(0)
        if self._reject:
            self._distance = load_file(Path(path, "reject.safetensors"), self._device)
            head = model.get_submodule(self._reject["head"])
            head.register_forward_pre_hook(self._note)

    def _note(self, _: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        self._features = inputs[0]

    def _rejects(self, confidence: float) -> bool:
        """Return True if the last image is of none of the classes: the probability of the best is too low, or
        its feature too far from those of all classes (Mahalanobis distance)."""
        whitening, points = self._distance["whitening"], F.normalize(self._features.float(), dim=1)
        points = (points - self._distance["center"]) @ whitening
        distance = (points - self._distance["means"]).norm(dim=1).min().item()
        reject = self._reject
        return confidence < reject["min_confidence"] or not distance <= reject["max_distance"]

    def __call__(self, data: dict[str, Any]) -> dict[str, Any] | list[dict[str, Any]]:
        """Classify `inputs`: an image as a Pillow image, encoded bytes, or their base64 text; or a list.

        `parameters`: top_k, 5 by default. The answer for an image is {"label", "score", "top_k":
        [{"label", "score"}, ...]}; that of a multi-label model has "labels": [{"label", "score"}, ...], those
        that reach their thresholds, in place of "label" and "score". With the thresholds of --reject, an
        image of none of the classes has the label "unknown" and the score None.
        Raises: ValueError for an unreadable image or an unknown parameter.
        """
        parameters = dict(data.get("parameters") or {})
        top_k = parameters.pop("top_k", 5)
        if parameters:
            raise ValueError(f"unknown parameter {min(parameters)}; the only one is top_k")
        if not isinstance(top_k, int) or top_k < 1:
            raise ValueError(f"top_k is {top_k!r}; pass a whole number from 1")
        inputs = data.get("inputs")
        if isinstance(inputs, list):
            return [self._record(each, top_k) for each in inputs]
        return self._record(inputs, top_k)

    @torch.inference_mode()
    def _record(self, image: Any, top_k: int) -> dict[str, Any]:
        pixels = to_rgb(image, self._config.get("value_range"))
        batch = self._image_processor(pixels, return_tensors="pt")
        logits = self._model(pixel_values=batch["pixel_values"].to(self._device)).logits[0].double()
        scores = (logits.sigmoid() if self._multi_label else logits.softmax(0)).tolist()
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        found = [
            {"label": self._model.config.id2label[i], "score": round(scores[i], 6)} for i in order
        ]
        if self._reject and self._rejects(max(scores)):
            return {"label": self._reject["answer"], "score": None, "top_k": found[:top_k]}
        if not self._multi_label:
            return {**found[0], "top_k": found[:top_k]}
        thresholds = self._config.get("thresholds") or [0.5] * len(scores)
        reached = [each for i, each in zip(order, found, strict=True) if scores[i] >= thresholds[i]]
        return {"labels": reached, "top_k": found[:top_k]}


def to_rgb(image: Any, value_range: Sequence[float] | None) -> Image.Image:
    """Convert an image to RGB of 8 bits, as a viewer shows it: first frame, upright, transparency over white.

    value_range: of 16-bit images; None: their full range. Raises: ValueError for an unreadable image.
    """
    try:
        if isinstance(image, str):  # a data URL has a comma before the base64 text
            image = base64.b64decode(image.rpartition(",")[2], validate=True)
        if isinstance(image, bytes):
            image = opened(image)
        if not isinstance(image, Image.Image):
            raise ValueError(f"it is of type {type(image).__name__}; pass bytes or base64 text")
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"it has more than {MAX_PIXELS:,} pixels")
        image.seek(0)
        if image.mode in (*GREY_16_BIT, "I", "F"):
            image = scaled(image, value_range)
        image = ImageOps.exif_transpose(image)
        if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
            image = image.convert("LA") if image.mode == "La" else image
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except UnidentifiedImageError:  # whose message shows a Python object
        raise ValueError("cannot read image: not a known image format") from None
    except Exception as error:  # Pillow's decoders fail on damaged bytes in many ways
        raise ValueError(f"cannot read image: {error}") from None


def opened(encoded: bytes) -> Image.Image:
    """Open an encoded image. Raises: ValueError for colours of 16 bits, whose lower half Pillow drops."""
    image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    deep = image.format == "PNG" and encoded[PNG_BITS] == 16
    if deep and (image.mode not in GREY_16_BIT or "transparency" in image.info):
        raise ValueError(DEEP)
    return image


def scaled(image: Image.Image, value_range: Sequence[float] | None) -> Image.Image:
    """Scale a grey image of 16 bits to 8. Raises: ValueError for other images of more than 8 bits."""
    tags = image.getexif()
    if image.mode not in GREY_16_BIT or tags.get(PHOTOMETRIC, BLACK_IS_ZERO) != BLACK_IS_ZERO:
        raise ValueError(DEEP)
    low, high = (0, 65535) if value_range is None else value_range
    values = (np.asarray(image).astype(np.float64) - low) * (255 / (high - low))
    grey = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    grey.info, grey.getexif()[ORIENTATION] = image.info, tags.get(ORIENTATION, 1)
    return grey

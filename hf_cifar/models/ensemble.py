"""An ensemble of classifiers as one transformers model: the mean of their probabilities.

Importing this module registers it, so that `from_pretrained` and `pipeline` load such a model. A copy of this
file and of article.py is saved with each model, so that `trust_remote_code=True` works without hf_cifar; they
import nothing from the package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

# Relative, so that transformers copies and finds the file; importing it registers its models.
from .article import ArticleModel  # noqa: F401

CROP = 0.875  # side of a crop, relative to the image


class EnsembleConfig(PreTrainedConfig):
    """The parts of an ensemble.

    members: the config of each member. scales, shifts: [members][3]; pixel values are multiplied by the
    scale, and the shift is added, for members whose normalisation differs from that of the image processor.
    views: of each image, see VIEWS. logits_divisor: a temperature.
    """

    model_type = "image_classifier_ensemble"

    def __init__(
        self,
        members: Sequence[dict[str, Any]] = (),
        scales: Sequence[Sequence[float]] = (),
        shifts: Sequence[Sequence[float]] = (),
        views: Sequence[str] = ("image",),
        logits_divisor: float = 1.0,
        **kwargs: Any,
    ) -> None:
        self.members, self.scales, self.shifts = list(members), list(scales), list(shifts)
        self.views = list(views)
        self.logits_divisor = logits_divisor
        super().__init__(**kwargs)


class EnsembleForImageClassification(PreTrainedModel):
    """The mean of the probabilities of all members for all views, as logits."""

    config_class = EnsembleConfig
    base_model_prefix = "members"
    main_input_name = "pixel_values"
    accepts_loss_kwargs = False

    def __init__(self, config: EnsembleConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.members = nn.ModuleList(
            AutoModelForImageClassification.from_config(
                CONFIG_MAPPING[each["model_type"]].from_dict(dict(each))
            )
            for each in config.members
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: the members initialise their own weights."""

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None
    ) -> ImageClassifierOutputWithNoAttention:
        """Compute logits [N, K] of pixel_values [N, 3, H, W] and, with labels, the loss of the problem type:
        cross-entropy with labels [N], binary cross-entropy with labels [N, K]."""
        several = self.config.problem_type == "multi_label_classification"
        found = [
            member(pixel_values=self._normalised(VIEWS[view](pixel_values), number)).logits.float()
            for number, member in enumerate(self.members)
            for view in self.config.views
        ]
        logits = mean_logits(torch.stack(found), several) / self.config.logits_divisor
        loss = None
        if labels is not None:
            loss = (
                F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
                if several
                else F.cross_entropy(logits, labels)
            )
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)

    def _normalised(self, pixel_values: Tensor, number: int) -> Tensor:
        """Normalise images as one of the members expects them."""
        scale, shift = self.config.scales[number], self.config.shifts[number]
        if all(each == 1 for each in scale) and not any(shift):
            return pixel_values
        scale, shift = (pixel_values.new_tensor(each).view(3, 1, 1) for each in (scale, shift))
        return pixel_values * scale + shift


def mean_logits(logits: Tensor, multi_label: bool = False) -> Tensor:
    """Return logits [N, K] whose probabilities are the mean of those of `logits` [M, N, K].

    multi_label: the probabilities are sigmoids; the logits of their mean are log p - log(1 - p).
    """
    count = math.log(len(logits))
    if not multi_label:
        return F.log_softmax(logits, dim=2).logsumexp(dim=0) - count
    # The two means have the same number of terms, which cancels.
    return F.logsigmoid(logits).logsumexp(dim=0) - F.logsigmoid(-logits).logsumexp(dim=0)


def flipped(pixel_values: Tensor) -> Tensor:
    """Mirror images left to right."""
    return pixel_values.flip(3)


def cropped(pixel_values: Tensor, top: float, left: float) -> Tensor:
    """Crop a window of 0.875 of each side, and enlarge it to the size of the image.

    top, left: position of the window, 0..1.
    """
    height, width = pixel_values.shape[2:]
    rows, columns = round(CROP * height), round(CROP * width)
    first_row, first_column = round(top * (height - rows)), round(left * (width - columns))
    window = pixel_values[:, :, first_row : first_row + rows, first_column : first_column + columns]
    return F.interpolate(window, size=(height, width), mode="bilinear", align_corners=False)


# What a member sees of an image [N, 3, H, W].
VIEWS = {
    "image": lambda images: images,
    "flip": flipped,
    "top_left": lambda images: cropped(images, 0, 0),
    "top_right": lambda images: cropped(images, 0, 1),
    "bottom_left": lambda images: cropped(images, 1, 0),
    "bottom_right": lambda images: cropped(images, 1, 1),
    "center": lambda images: cropped(images, 0.5, 0.5),
}

AutoConfig.register(EnsembleConfig.model_type, EnsembleConfig, exist_ok=True)
AutoModelForImageClassification.register(
    EnsembleConfig, EnsembleForImageClassification, exist_ok=True
)
EnsembleConfig.register_for_auto_class()
EnsembleForImageClassification.register_for_auto_class("AutoModelForImageClassification")

"""Explain the predictions of a classifier, image by image, and check the explanations."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hf_cifar.config.explanation import DEFAULT_METHODS
from hf_cifar.errors import UserError
from hf_cifar.explain.methods import METHODS, Example, check_methods
from hf_cifar.explain.pictures import enlarged, feature_maps, filters, overlay
from hf_cifar.explain.sanity import (
    Check,
    Curves,
    curves_of_chance,
    curves_of_map,
    randomized,
    rank_correlation,
)
from hf_cifar.explain.target_layer import TargetLayer, find_target_layer
from hf_cifar.models.classifier import Classifier
from hf_cifar.models.problem_type import thresholds_of
from hf_cifar.text import listed, nearest_hint
from hf_cifar.transforms.preprocessing import Preprocessing

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Explanation:
    """Why a model gave an image a class.

    prediction: the predicted class with its probability `score`; of a multi-label model all predicted
    classes, and the highest probability. explained: the class that the maps are for, and its probability.
    pictures: uint8 [H, W, 3], the model's input, and one for each method. checks: by method; chance: the
    curves of a random order. feature_layers: the rows of the picture `feature_maps`.
    """

    prediction: str
    score: float
    explained: str
    explained_score: float
    pictures: dict[str, np.ndarray]
    checks: dict[str, Check] = field(default_factory=dict)
    chance: Curves | None = None
    feature_layers: Sequence[str] = ()


class Explainer:
    """A classifier and the methods that explain its predictions.

    methods: by name; None for those of `DEFAULT_METHODS` that apply to the model. target: the class to
    explain; None for the predicted one. check: run the sanity checks of each map.
    Raises: UserError for a method that does not apply or is not installed, or an unknown class.
    """

    def __init__(
        self,
        classifier: Classifier,
        methods: Sequence[str] | None = None,
        *,
        target: str | None = None,
        check: bool = True,
        device: torch.device | None = None,
    ) -> None:
        check_methods(methods or DEFAULT_METHODS)
        self.device = device or torch.device("cpu")
        self.model = classifier.model.to(self.device).eval()
        self.preprocessing = Preprocessing.from_image_processor(classifier.image_processor)
        self.id2label: dict[int, str] = self.model.config.id2label
        self.target = None if target is None else _id_of(target, self.id2label)
        self.check = check
        self.layer: TargetLayer | None = None
        self.methods = self._applicable(methods)
        self.filters = filters(self.model) if "filters" in self.methods else None
        self._randomized = None  # made from the first image

    def _applicable(self, requested: Sequence[str] | None) -> list[str]:
        """Try on noise which methods apply, and find the target layer."""
        size = self.preprocessing.size
        noise = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
        noise, view = noise.to(self.device), torch.zeros(*size, 3, dtype=torch.uint8)
        names = list(dict.fromkeys(requested or DEFAULT_METHODS))
        applicable = []
        for name in names:
            try:
                if name in ("grad_cam", "attention_rollout"):
                    self.layer = self.layer or find_target_layer(self.model, noise)
                    METHODS[name](self.model, Example(noise, view, 0, self.layer))
                elif name == "feature_maps":
                    feature_maps(self.model, Example(noise, view, 0))
            except UserError:
                if requested:
                    raise
                continue
            applicable.append(name)
        if not requested:
            logger.info("methods: %s", listed(applicable))
        if self.layer is not None and "grad_cam" in applicable:
            height, width = self.layer.layout.grid
            logger.info("Grad-CAM: maps of %d x %d of layer %s", height, width, self.layer.name)
        return applicable

    def explain(self, image: np.ndarray, class_id: int | None = None) -> Explanation:
        """Explain the prediction of an image [H, W, 3] uint8. class_id: explain this class instead."""
        view = self.preprocessing.view_each([image], self.device)
        pixel_values = self.preprocessing.normalize(view)
        view = view[0].permute(1, 2, 0).to(torch.uint8).cpu()
        with torch.inference_mode():
            logits = self.model(pixel_values=pixel_values).logits[0].double()
        probabilities, prediction = self._predicted(logits)
        top = int(probabilities.argmax())
        chosen = next(each for each in (class_id, self.target, top) if each is not None)
        example = Example(pixel_values, view, chosen, self.layer)
        pictures = {"input": enlarged(view.numpy())}
        layers: Sequence[str] = ()
        chance = curves_of_chance(self.model, example) if self.check else None
        checks = {}
        for name in self.methods:
            if name == "feature_maps":
                pictures[name], layers = feature_maps(self.model, example)
            elif name in METHODS:
                attribution = METHODS[name](self.model, example)
                pictures[name] = overlay(view.numpy(), attribution.cpu().numpy())
                if self.check:
                    checks[name] = self._checked(name, example, attribution)
        return Explanation(
            prediction, float(probabilities[top]), self.id2label[chosen],
            float(probabilities[chosen]), pictures, checks, chance, layers,
        )  # fmt: skip

    def _predicted(self, logits: Tensor) -> tuple[Tensor, str]:
        """Return the probabilities of logits [K], and the predicted class, or classes."""
        thresholds = thresholds_of(self.model)
        if thresholds is None:
            probabilities = logits.softmax(dim=0)
            return probabilities, self.id2label[int(probabilities.argmax())]
        probabilities = logits.sigmoid()
        reached = (probabilities.cpu().numpy() >= thresholds).nonzero()[0]
        return probabilities, ", ".join(self.id2label[int(i)] for i in reached) or "no label"

    def _checked(self, name: str, example: Example, attribution: Tensor) -> Check:
        if self._randomized is None:
            self._randomized = randomized(self.model, example.pixel_values)
        other = METHODS[name](self._randomized, example)
        is_flat = float(attribution.max()) == float(attribution.min())
        curves = curves_of_map(self.model, example, attribution)
        return Check(curves, rank_correlation(attribution, other), is_flat)


def _id_of(label: str, id2label: dict[int, str]) -> int:
    for class_id, name in id2label.items():
        if name == label:
            return class_id
    raise UserError(
        f"the model has no class {label!r}{nearest_hint(label, id2label.values())}; it has "
        f"{listed(id2label.values(), 10)}; pass another --target"
    )

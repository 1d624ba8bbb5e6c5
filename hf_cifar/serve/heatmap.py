"""The heat map of a prediction, for the page: Grad-CAM over the model's input, as PNG."""

from __future__ import annotations

import copy
import io
import threading

import numpy as np
import torch
from PIL import Image

from hf_cifar.errors import UserError
from hf_cifar.explain.explainer import Explainer
from hf_cifar.explain.methods import METHODS, Example
from hf_cifar.models.classifier import Classifier
from hf_cifar.models.exported import ExportedClassifier
from hf_cifar.predict import Predictor

METHOD = "grad_cam"


class Heatmap:
    """Explains one image at a time, with a copy of the model, because hooks on its layers would see the
    images of other threads. The copy is made for the first heat map.

    available: False for an exported file, which has no layers, and for a network without feature maps.
    """

    def __init__(self, predictor: Predictor) -> None:
        self._predictor, self._lock = predictor, threading.Lock()
        self._explainer: Explainer | None = None
        self.available = not isinstance(predictor.model, ExportedClassifier) and _has_maps(
            predictor
        )

    def __call__(self, image: np.ndarray) -> bytes:
        """Return the heat map of the predicted class for an image uint8 [H, W, 3].

        Raises: UserError if it is not available.
        """
        if not self.available:
            raise UserError(
                "a heat map needs a run of a network with feature maps; an exported file has none"
            )
        with self._lock:
            if self._explainer is None:
                model = copy.deepcopy(self._predictor.model)
                classifier = Classifier(model, self._predictor.image_processor)
                self._explainer = Explainer(
                    classifier, [METHOD], check=False, device=self._predictor.device
                )
            picture = self._explainer.explain(image).pictures[METHOD]
        content = io.BytesIO()
        Image.fromarray(picture).save(content, "PNG")
        return content.getvalue()


def _has_maps(predictor: Predictor) -> bool:
    """Try the method on an empty image, before other threads use the model."""
    height, width = predictor.preprocessor.preprocessing.size
    blank = torch.zeros(1, 3, height, width, device=predictor.device)
    example = Example(blank, torch.zeros(height, width, 3, dtype=torch.uint8), 0)
    try:
        METHODS[METHOD](predictor.model, example)
    except UserError:
        return False
    return True

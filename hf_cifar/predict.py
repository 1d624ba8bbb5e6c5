"""Classify image files with a saved model."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import PreTrainedModel

from hf_cifar.config.deployment import PredictConfig
from hf_cifar.config.model import is_exported
from hf_cifar.config.objects import InMemory
from hf_cifar.data.listing import list_images, render_left_out
from hf_cifar.errors import UserError
from hf_cifar.models.build import load_classifier
from hf_cifar.models.distance import load_distance, rejecting
from hf_cifar.models.files import REJECT, model_folder
from hf_cifar.models.fingerprint import model_hash
from hf_cifar.models.folding import fold_norms
from hf_cifar.models.problem_type import is_multi_label, thresholds_of
from hf_cifar.models.rejection import Rejection, rejection_of
from hf_cifar.preprocessor import Preprocessor
from hf_cifar.runs.processes import local_gpu
from hf_cifar.threads import map_in_threads
from hf_cifar.training.memory import keep_freed_memory

logger = logging.getLogger(__name__)
MAX_THREADS = 8

Batch = TypeVar("Batch")
Result = TypeVar("Result")


def predict_files(config: PredictConfig, paths: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield one record for each image file, in the given order; folders are searched recursively.

    A record is {"path", "label", "score", "top_k": [{"label", "score"}, ...]}, scores 0..1, or
    {"path", "error"} for an unreadable file. With the thresholds of --reject, the label of an image of none
    of the classes is "unknown", and its score None. For a multi-label model, "labels": [{"label", "score"},
    ...], those that reach their thresholds, replaces "label" and "score".
    Raises: UserError for an unknown model, or a folder without images.
    """
    files = expand_paths(paths)
    predictor = Predictor(config)

    def records(batch: Sequence[Path]) -> list[dict[str, Any]]:
        found = zip(batch, predictor.records(batch), strict=True)
        return [{"path": str(file), **record} for file, record in found]

    num_threads = min(predictor.num_threads, len(files))
    at_once = min(config.batch_size, math.ceil(len(files) / num_threads))
    batches = [files[start : start + at_once] for start in range(0, len(files), at_once)]
    yield from chain.from_iterable(map_in_threads(records, batches, num_threads))


class Predictor:
    """A saved model, ready to classify images. Threads may use it at the same time.

    Raises: UserError for an unknown model.
    """

    def __init__(self, config: PredictConfig) -> None:
        exported = is_exported(config.model_name_or_path)  # runs on the CPU
        on_gpu = torch.cuda.is_available() and not (config.use_cpu or exported)
        self.device = torch.device("cuda", local_gpu()) if on_gpu else torch.device("cpu")
        self.dtype = _autocast_dtype(config, self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        model, self.image_processor = load_classifier(
            config.model_name_or_path,
            revision=config.model_revision,
            trust_remote_code=config.trust_remote_code,
        )
        self.preprocessor = Preprocessor.of(model, self.image_processor, config.max_image_pixels)
        self.model_hash = model_hash(model, self.preprocessor.preprocessing.to_dict())
        self.multi_label, self.top_k = is_multi_label(model), config.top_k
        self.rejection = rejection_of(model)
        if self.rejection is not None and not exported:
            model = self._rejecting(model, self.rejection, config)
        # Folded on the CPU: on a GPU, rounding of convolutions would hide a change of the logits.
        noise = torch.Generator().manual_seed(0)
        size = self.preprocessor.preprocessing.size
        model = fold_norms(model, torch.randn(2, 3, *size, generator=noise))
        self._levels = self.preprocessor.preprocessing.levels(self.device)
        self.memory_format = torch.contiguous_format if exported else torch.channels_last
        self.model = model.to(self.device, memory_format=self.memory_format).eval()
        # A GPU computes one batch at a time, to limit memory, while the next batches are decoded.
        on_cpu = self.device.type == "cpu"
        self._device_lock = contextlib.nullcontext() if on_cpu else threading.Lock()
        self.num_threads = min(MAX_THREADS, torch.get_num_threads())

    def _rejecting(
        self, model: PreTrainedModel, rejection: Rejection, config: PredictConfig
    ) -> PreTrainedModel:
        """Return the model with the distance that lies beside it."""
        if isinstance(config.model_name_or_path, InMemory):
            logger.warning(
                "every image gets a class, because a model in memory has no %s beside it; pass the run's "
                "folder to answer %r too", REJECT, rejection.answer,
            )  # fmt: skip
            self.rejection = None
            return model
        folder = model_folder(
            config.model_name_or_path, config.model_revision, config.trust_remote_code
        )
        return rejecting(model, load_distance(folder), rejection.head)

    def records(self, images: Sequence[Any]) -> list[dict[str, Any]]:
        """Classify images of any kind that `Preprocessor.decode` takes, as a batch of the readable ones.

        A record is as in `predict_files`, without its path.
        """
        decoded = [self._decoded(image) for image in images]
        readable = [image for image in decoded if not isinstance(image, UserError)]
        rows = iter(self.scores(readable) if readable else ())
        return [
            {"error": str(image)} if isinstance(image, UserError) else self.record(next(rows))
            for image in decoded
        ]

    def _decoded(self, image: Any) -> np.ndarray | UserError:
        try:
            return self.preprocessor.decode(image)
        except UserError as error:
            return error

    def scores(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """Compute the scores [N, K], 0..1, of decoded images [H, W, 3] uint8; of a model that rejects images,
        [N, K + 1], the distance last."""
        with self._device_lock:
            return self._scores(self.preprocessor(images, self.device))

    def view(self, image: bytes) -> np.ndarray:
        """Decode, resize and crop an image to [h, w, 3] uint8, the size of the model's input.

        Raises: UserError for an unreadable image.
        """
        return self.preprocessor.preprocessing.view_image(self.preprocessor.decode(image))

    def scores_of_views(self, views: Sequence[np.ndarray]) -> torch.Tensor:
        """Compute the same of what `view` returned."""
        with self._device_lock:
            pixels = torch.from_numpy(np.stack(views)).to(self.device).permute(0, 3, 1, 2)
            return self._scores(self._levels(pixels))

    @torch.inference_mode()
    def _scores(self, pixel_values: torch.Tensor) -> torch.Tensor:
        pixel_values = pixel_values.contiguous(memory_format=self.memory_format)
        enabled = self.dtype is not torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=enabled):
            output = self.model(pixel_values=pixel_values)
        if self.multi_label:
            return output.logits.double().sigmoid().cpu()
        scores = output.logits.float().softmax(1)
        if self.rejection is not None:
            scores = torch.cat((scores, output.distances.float()[:, None]), dim=1)
        return scores.cpu()

    def record(self, scores: torch.Tensor) -> dict[str, Any]:
        """Render the scores of one image: the best labels, and those that reach their thresholds."""
        names, thresholds = self.model.config.id2label, thresholds_of(self.model)
        distance, scores = scores[-1], scores[: len(names)]
        best = scores.topk(min(self.top_k, len(scores))).indices
        ranked = _labels_and_scores(scores, best, names)
        if self.rejection is not None and self.rejection.rejects(
            scores.max().item(), distance.item()
        ):
            return {"label": self.rejection.answer, "score": None, "top_k": ranked}
        if thresholds is None:
            return {**ranked[0], "top_k": ranked}
        predicted = [i for i in scores.argsort(descending=True) if scores[i] >= thresholds[i]]
        return {"labels": _labels_and_scores(scores, predicted, names), "top_k": ranked}


def _autocast_dtype(config: PredictConfig, device: torch.device) -> torch.dtype:
    if config.fp16 and device.type == "cpu":
        raise UserError(
            "--fp16 needs a GPU, and none is in use; use --bf16 instead, or leave it out"
        )
    return torch.float16 if config.fp16 else torch.bfloat16 if config.bf16 else torch.float32


def expand_paths(paths: Sequence[str]) -> list[Path]:
    """Replace each folder by the images below it, sorted, and log how many other files there are. A file is
    always taken, whatever its name."""
    if not paths:
        raise UserError("no images to predict; pass files or folders")
    files: list[Path] = []
    left_out: Counter[str] = Counter()
    for path in map(Path, paths):
        path = path if path.exists() else path.expanduser()
        if not path.is_dir():
            files.append(path)
            continue
        found, others = list_images(path)
        if not found:
            among = f" among {render_left_out(others)}" if others else ""
            raise UserError(f"no image files in {path}{among}; pass another folder")
        files += map(Path, found)
        left_out += others
    if left_out:
        logger.info("left out: %s", render_left_out(left_out))
    return files


def _labels_and_scores(
    scores: torch.Tensor, chosen: Iterable[torch.Tensor], id2label: dict[int, str]
) -> list[dict[str, Any]]:
    return [{"label": id2label[int(i)], "score": round(scores[i].item(), 6)} for i in chosen]

"""Classify image files with a saved model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_cifar.data.images import decode_image, list_images
from hf_cifar.data.preprocessing import Preprocessing
from hf_cifar.data.store import to_batch
from hf_cifar.errors import UserError
from hf_cifar.models.build import load_classifier
from hf_cifar.options import PredictConfig


def predict_files(config: PredictConfig, paths: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One record for each image file, folders searched, in the given order.

    Yields {"path", "label", "score", "top_k": [{"label", "score"}, ...]}, scores 0..1, or {"path", "error"}
    for a file that cannot be read.
    Raises: UserError for an unknown model, or a folder without images.
    """
    files = expand_paths(paths)
    model, image_processor = load_classifier(
        config.model_name_or_path, trust_remote_code=config.trust_remote_code
    )
    device = torch.device("cuda" if torch.cuda.is_available() and not config.use_cpu else "cpu")
    model = model.to(device).eval()
    preprocessing = Preprocessing.from_image_processor(image_processor)
    for start in range(0, len(files), config.batch_size):
        yield from _predict_batch(
            model, preprocessing, files[start : start + config.batch_size], config.top_k
        )


def expand_paths(paths: Sequence[str]) -> list[Path]:
    """Files as they are, folders as the images below them, sorted."""
    if not paths:
        raise UserError("no image to predict; pass files or folders")
    files: list[Path] = []
    for path in map(Path, paths):
        found = list_images(path) if path.is_dir() else [path]
        if not found:
            raise UserError(f"no image file in {path}")
        files += found
    return files


def _predict_batch(
    model: torch.nn.Module, preprocessing: Preprocessing, files: Sequence[Path], top_k: int
) -> Iterator[dict[str, Any]]:
    device = next(model.parameters()).device
    views: list[Tensor] = []
    errors: dict[Path, str] = {}
    for file in files:
        try:
            views.append(preprocessing.view(to_batch(decode_image(file)).to(device)))
        except UserError as error:
            errors[file] = str(error)
    rows = iter(())
    if views:
        with torch.inference_mode():
            logits = model(pixel_values=preprocessing.normalize(torch.cat(views))).logits
        rows = iter(logits.float().softmax(dim=1).cpu())
    for file in files:
        if file in errors:
            yield {"path": str(file), "error": errors[file]}
            continue
        scores, labels = next(rows).topk(min(top_k, len(model.config.id2label)))
        ranked = [
            {"label": model.config.id2label[label], "score": round(score, 6)}
            for score, label in zip(scores.tolist(), labels.tolist(), strict=True)
        ]
        yield {"path": str(file), **ranked[0], "top_k": ranked}

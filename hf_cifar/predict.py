"""Classify image files with a saved model."""

from __future__ import annotations

import contextlib
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from hf_cifar.config.deployment import PredictConfig
from hf_cifar.data.images import decode_image, list_images
from hf_cifar.errors import UserError
from hf_cifar.models.build import load_classifier
from hf_cifar.models.folding import fold_norms
from hf_cifar.models.problem_type import thresholds_of
from hf_cifar.training.memory import keep_freed_memory
from hf_cifar.transforms.preprocessing import Preprocessing

MOST_THREADS = 8

Batch = TypeVar("Batch")
Result = TypeVar("Result")


def predict_files(config: PredictConfig, paths: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One record for each image file, folders searched, in the given order.

    Yields {"path", "label", "score", "top_k": [{"label", "score"}, ...]}, scores 0..1, or {"path", "error"}
    for a file that cannot be read. A multi-label model gives "labels": [{"label", "score"}, ...] in place of
    the one, those that reach their thresholds.
    Raises: UserError for an unknown model, or a folder without images.
    """
    files = expand_paths(paths)
    device = torch.device("cuda" if torch.cuda.is_available() and not config.use_cpu else "cpu")
    dtype = _autocast_dtype(config, device)
    if device.type == "cpu":
        keep_freed_memory()
    model, image_processor = load_classifier(
        config.model_name_or_path,
        revision=config.model_revision,
        trust_remote_code=config.trust_remote_code,
    )
    preprocessing = Preprocessing.from_image_processor(image_processor)
    # Folded on the CPU: on a GPU, rounding of convolutions would hide a change of the logits.
    noise = torch.Generator().manual_seed(0)
    model = fold_norms(model, torch.randn(2, 3, *preprocessing.size, generator=noise))
    model = model.to(device, memory_format=torch.channels_last).eval()
    # A GPU computes one batch at a time, for the memory of one; its next ones are decoded meanwhile.
    turn = contextlib.nullcontext() if device.type == "cpu" else threading.Lock()

    def records(batch: Sequence[Path]) -> list[dict[str, Any]]:
        images = [_decoded(file, config.max_image_pixels) for file in batch]
        with turn:
            return list(_predict_batch(model, preprocessing, batch, images, config.top_k, dtype))

    num_threads = min(MOST_THREADS, torch.get_num_threads(), len(files))
    size = min(config.batch_size, math.ceil(len(files) / num_threads))
    batches = [files[start : start + size] for start in range(0, len(files), size)]
    yield from chain.from_iterable(each_on_its_cores(records, batches, num_threads))


def _autocast_dtype(config: PredictConfig, device: torch.device) -> torch.dtype:
    if config.fp16 and device.type == "cpu":
        raise UserError(
            "--fp16 needs a GPU and there is none; use --bf16 --use_cpu, or leave it out"
        )
    return torch.float16 if config.fp16 else torch.bfloat16 if config.bf16 else torch.float32


def each_on_its_cores(
    work: Callable[[Batch], Result], batches: Iterable[Batch], num_threads: int
) -> Iterator[Result]:
    """Results in order, of as many batches at once as there are threads; each has its part of the cores.

    On a CPU, a batch on a core of its own takes fewer core seconds than one batch after the other on all
    cores, which wait for each other in every layer.
    """
    all_cores = torch.get_num_threads()
    results: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(
        num_threads, initializer=torch.set_num_threads, initargs=(all_cores // num_threads,)
    ) as pool:
        try:
            for batch in batches:
                results.append(pool.submit(work, batch))
                if len(results) > 2 * num_threads:
                    yield results.popleft().result()
            while results:
                yield results.popleft().result()
        finally:
            for left in results:
                left.cancel()
            torch.set_num_threads(all_cores)  # what one thread sets is the start of new ones


def _decoded(file: Path, max_pixels: int) -> np.ndarray | UserError:
    try:
        return decode_image(file, max_pixels)
    except UserError as error:
        return error


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
    model: torch.nn.Module,
    preprocessing: Preprocessing,
    files: Sequence[Path],
    images: Sequence[np.ndarray | UserError],
    top_k: int,
    dtype: torch.dtype,
) -> Iterator[dict[str, Any]]:
    device = next(model.parameters()).device
    readable = [image for image in images if not isinstance(image, UserError)]
    rows, thresholds = iter(()), thresholds_of(model)
    if readable:
        with torch.inference_mode():
            pixel_values = preprocessing.normalize(preprocessing.view_each(readable, device))
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
                logits = model(pixel_values=pixel_values).logits
        probabilities = (
            logits.float().softmax(dim=1) if thresholds is None else logits.double().sigmoid()
        )
        rows = iter(probabilities.cpu())
    for file, image in zip(files, images, strict=True):
        if isinstance(image, UserError):
            yield {"path": str(file), "error": str(image)}
            continue
        scores: torch.Tensor = next(rows)
        ranked = _listed(
            scores, scores.topk(min(top_k, len(scores))).indices, model.config.id2label
        )
        if thresholds is None:
            yield {"path": str(file), **ranked[0], "top_k": ranked}
            continue
        given = [i for i in scores.argsort(descending=True) if scores[i] >= thresholds[i]]
        labels = _listed(scores, given, model.config.id2label)
        yield {"path": str(file), "labels": labels, "top_k": ranked}


def _listed(
    scores: torch.Tensor, chosen: Iterable[torch.Tensor], id2label: dict[int, str]
) -> list[dict[str, Any]]:
    return [{"label": id2label[int(i)], "score": round(scores[i].item(), 6)} for i in chosen]

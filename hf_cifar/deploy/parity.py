"""Does an exported model give the answers of the model that it was made from?"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from hf_cifar.data.listing import list_images
from hf_cifar.data.splits import DataSource
from hf_cifar.deploy.formats import Runner
from hf_cifar.errors import UserError
from hf_cifar.models.problem_type import is_multi_label
from hf_cifar.preprocessor import Preprocessor
from hf_cifar.progress import progress
from hf_cifar.runs.folder import RunFolder

logger = logging.getLogger(__name__)
BATCH_SIZES = (1, 2, 7, 64)
TOLERANCE = 1e-4  # of logits
# Images are compared in parts: of this many, or fewer if they have more than this many values.
PART, PART_VALUES = max(BATCH_SIZES), 2**27


class ParityImages(NamedTuple):
    """Images for a comparison: what they are, and how each is decoded to [H, W, 3] uint8."""

    source: str
    items: Sequence[Any]
    decode: Callable[[Any], np.ndarray]


def parity_images(
    run: Path, folder: str | None, limit: int, preprocessor: Preprocessor
) -> ParityImages:
    """Draw up to `limit` images: from a folder, or else from the run's validation split.

    Raises: UserError if there are none, or the run's data cannot be opened.
    """
    if folder is not None:
        files = list_images(folder)[0] if Path(folder).is_dir() else []
        if not files:
            raise UserError(
                f"no image files in {folder}; pass a folder with images as --dataset_name"
            )
        found = [files[row] for row in _drawn(len(files), limit)]
        return ParityImages(f"images of {Path(folder).resolve().name}", found, preprocessor.decode)
    try:
        split = DataSource(RunFolder(run).data()).splits.validation
    except UserError as error:
        raise UserError(
            f"no validation images of the run to compare on: {error}; pass --dataset_name FOLDER with "
            "images, or --parity_images 0"
        ) from None
    positions = split.positions[_drawn(len(split), limit)].tolist()
    return ParityImages("the run's validation images", positions, split.pixels.decode)


def _drawn(count: int, limit: int) -> np.ndarray:
    """Draw row numbers, always the same, in ascending order."""
    return np.sort(np.random.default_rng(0).choice(count, min(count, limit), replace=False))


def compare(
    run: Runner,
    model: PreTrainedModel,
    preprocessor: Preprocessor,
    given: ParityImages,
    *,
    takes_images: bool,
) -> dict[str, Any]:
    """Compare an exported model with the model that it was made from, in batches of 1, 2, 7 and 64.

    takes_images: its preprocessing is in the graph, so that only images of one size share a batch.
    Returns the source and the number of images, and for each batch size how many have the same top-1, and the
    largest differences of a logit and of a probability. Raises: UserError if no image can be read.
    """
    batches = {size: {"same_top1": 0, "logits": 0.0, "probabilities": 0.0} for size in BATCH_SIZES}
    unreadable: list[UserError] = []
    num_images = 0
    for images in _parts(given, unreadable):
        num_images += len(images)
        pixel_values = preprocessor(images)
        with torch.inference_mode():
            logits = model(pixel_values=pixel_values).logits.float()
        probabilities = logits.sigmoid() if is_multi_label(model) else logits.softmax(dim=-1)
        expected = logits.numpy(), probabilities.numpy()
        for rows, inputs in _by_size(images) if takes_images else [(slice(None), pixel_values)]:
            for size, batch in batches.items():
                starts = range(0, len(inputs), size)
                outputs = [run(np.asarray(inputs[start : start + size])) for start in starts]
                found = [np.concatenate(each) for each in zip(*outputs, strict=True)]
                wanted = [each[rows] for each in expected]
                same = found[0].argmax(axis=1) == wanted[0].argmax(axis=1)
                batch["same_top1"] += int(same.sum())
                for name, ours, theirs in zip(
                    ("logits", "probabilities"), found, wanted, strict=True
                ):
                    # Unlike max, this keeps NaN.
                    batch[name] = float(np.maximum(batch[name], np.abs(ours - theirs).max()))
    if not num_images:
        raise UserError(
            f"no image can be read ({given.source}): {unreadable[0]}; pass another --dataset_name"
        )
    if unreadable:
        logger.warning("%d images cannot be read and are not compared", len(unreadable))
    return {
        "source": given.source,
        "num_images": num_images,
        "num_unreadable": len(unreadable),
        "batches": {str(size): batch for size, batch in batches.items()},
    }


def _parts(given: ParityImages, unreadable: list[UserError]) -> Iterator[list[np.ndarray]]:
    """Yield decoded images, a few at a time; collects errors in `unreadable`."""
    part: list[np.ndarray] = []
    for item in progress(given.items, "comparing"):
        try:
            part.append(given.decode(item))
        except UserError as error:
            unreadable.append(error)
        if len(part) == PART or sum(image.size for image in part) > PART_VALUES:
            yield part
            part = []
    if part:
        yield part


def _by_size(images: Sequence[np.ndarray]) -> list[tuple[list[int], np.ndarray]]:
    """Batch images by size: their positions, and the images [n, H, W, 3]."""
    rows: dict[tuple[int, ...], list[int]] = {}
    for row, image in enumerate(images):
        rows.setdefault(image.shape, []).append(row)
    return [(each, np.stack([images[row] for row in each])) for each in rows.values()]


def verdict(report: dict[str, Any]) -> tuple[str, bool]:
    """Say in a line how well the models of a report agree, and whether they do: all images have the same
    top-1, and logits differ by at most TOLERANCE."""
    batches, count = report["batches"].values(), report["num_images"]
    same = min(batch["same_top1"] for batch in batches)
    largest = np.max([batch["logits"] for batch in batches])
    agrees = same == count and bool(largest <= TOLERANCE)
    text = (
        f"{'agrees' if agrees else 'does not agree'} with the model: the same top-1 on {same:,} of {count:,} "
        f"images ({report['source']}), and logits that differ by up to {largest:.1e}"
    )
    return text, agrees

"""Fit the thresholds at which a model answers that an image is of none of its classes, after calibration.

The distance is fitted to training images, and the thresholds to validation images, whose distances are like
those of other new images of the same kind.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PreTrainedModel

from hf_cifar.data.split import Split
from hf_cifar.data.splits import Splits
from hf_cifar.data.store import default_num_workers, take_batch
from hf_cifar.data.stratify import representative_rows
from hf_cifar.errors import UserError
from hf_cifar.evaluation.predictions import Predictions
from hf_cifar.models.classifier import describe
from hf_cifar.models.distance import Distance, plain_copy, rejecting
from hf_cifar.models.heads import linear_head
from hf_cifar.models.rejection import ANSWERS, Rejection, answer_for, rejection_of
from hf_cifar.progress import progress
from hf_cifar.training.features import has_feature_vectors, head_inputs
from hf_cifar.training.trainer import ImageClassificationTrainer
from hf_cifar.transforms.preprocessing import Preprocessing

logger = logging.getLogger(__name__)
TRAIN_IMAGES = 10_000  # at most, for the class means and the covariance
FEW_REJECTED = 5  # validation images: the thresholds depend on single ones
MAX_WIDTH = 8192  # of a feature: the saved file grows with its square


def check_rejection(splits: Splits, model: PreTrainedModel, preprocessing: Preprocessing) -> None:
    """Raises: UserError for data or a model that --reject does not support."""
    if not isinstance(splits.train, Split):
        raise UserError(
            "--reject reads training images again after training, and a stream is not stored; leave out "
            "either --reject or --streaming"
        )
    if splits.multi_label:
        raise UserError(
            "--reject needs one label per image, but the data is multi-label, where an image may have no "
            "label; leave it out"
        )
    answer_for(splits.id2label.values())
    head = linear_head(model)
    if head is None or not has_feature_vectors(model, preprocessing):
        raise UserError(
            "--reject needs a head that is one linear layer on one feature vector per image, and "
            f"{describe(model)} has another kind of head; leave it out, or pass another model"
        )
    if head.in_features > MAX_WIDTH:
        raise UserError(
            f"--reject works with up to {MAX_WIDTH:,} features, and {describe(model)} has "
            f"{head.in_features:,}; leave it out, or pass another model"
        )


def fitting_rows(train: Split) -> np.ndarray:
    """Return the positions of the training images that the distance is fitted to, stratified."""
    return representative_rows(train.labels, TRAIN_IMAGES, seed=0)


def fit_to_reject(
    trainer: ImageClassificationTrainer,
    train: Dataset,
    validation: Dataset,
    predictions: Predictions,
    keep: float,
) -> tuple[Predictions, Distance]:
    """Fit a distance to training images, and both thresholds to the calibrated predictions for validation
    images. train, validation: stores of these images. The thresholds are written into the model's config.

    Returns the predictions with their distances and the thresholds, and the distance.
    """
    model = trainer.classifier
    layer = linear_head(model)
    assert layer is not None  # see `check_rejection`
    head = next(name for name, module in model.named_modules() if module is layer)
    distance = _fit_distance(trainer, train)
    distances = _distances(trainer, rejecting(model, distance, head), validation)
    answer = answer_for(predictions.id2label.values())
    rejection = Rejection.fit(
        predictions.confidences, distances, keep=keep, answer=answer, head=head
    )
    model.config.reject = rejection.to_dict()
    found = dataclasses.replace(predictions, distances=distances, rejection=rejection)
    logger.info(
        "the answer is %r below a confidence of %.3f or beyond a distance of %.1f%s: %.1f%% of the "
        "validation images keep their label, with an accuracy of %.4f; on all of them it is %.4f",
        answer, rejection.min_confidence, rejection.max_distance,
        "" if answer == ANSWERS[0] else f" ({ANSWERS[0]!r} is a class)",
        100 * found.metrics["kept"], found.metrics["accuracy_kept"], found.metrics["accuracy"],
    )  # fmt: skip
    expected = (1 - keep) * len(predictions.labels)
    if expected < FEW_REJECTED:
        logger.warning(
            "--reject: the thresholds are set by %.1f of %s validation images, so the share of other images "
            "that keep their label may be far from %g%%",
            expected, f"{len(predictions.labels):,}", 100 * keep,
        )  # fmt: skip
    return found, distance


def reject_images(
    trainer: ImageClassificationTrainer,
    images: Dataset,
    predictions: Predictions,
    distance: Distance | None,
) -> Predictions:
    """Return the predictions for a store's images with their distances and the model's thresholds.

    distance: None for an exported model, which computes distances itself.
    """
    model, rejection = trainer.classifier, rejection_of(trainer.classifier)
    assert rejection is not None
    if distance is not None:
        model = rejecting(model, distance, rejection.head)
    distances = _distances(trainer, model, images)
    return dataclasses.replace(predictions, distances=distances, rejection=rejection)


def _fit_distance(trainer: ImageClassificationTrainer, train: Dataset) -> Distance:
    """Fit the distance to the features of a store's images, as in evaluation."""
    model = plain_copy(trainer.classifier)
    head = linear_head(model)
    assert head is not None
    with head_inputs(head) as seen:
        outputs = list(_outputs(trainer, model, train, "features of training images"))
    labels = torch.cat([labels for _, labels in outputs])
    return Distance.fit(torch.cat(seen).cpu().numpy(), labels.numpy())


def _distances(
    trainer: ImageClassificationTrainer, model: PreTrainedModel, images: Dataset
) -> np.ndarray:
    """Return the distance [N] of each image of a store, float32. model: one that returns distances."""
    outputs = _outputs(trainer, model, images, "distances")
    return np.concatenate([output.distances.cpu().numpy() for output, _ in outputs])


@torch.inference_mode()
def _outputs(
    trainer: ImageClassificationTrainer, model: PreTrainedModel, store: Dataset, what: str
) -> Iterator[tuple[Any, Tensor]]:
    """Yield the output of a model and the labels for each batch of a store, in order, as in evaluation."""
    args, whole = trainer.args, store.dataset if isinstance(store, Subset) else store
    loader: DataLoader = DataLoader(
        store, batch_size=args.eval_batch_size, collate_fn=take_batch,
        num_workers=default_num_workers(decodes=whole.decodes),
    )  # fmt: skip
    model.eval()
    for batch in progress(loader, f"computing {what}", unit="batches"):
        pixel_values = trainer.preprocessing(batch["pixel_values"].to(args.device))
        yield model(pixel_values=pixel_values), batch["labels"].cpu()

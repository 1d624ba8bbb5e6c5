"""Predict every image of a split once, and calibrate by what was predicted."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_cifar.data.split import Split
from hf_cifar.data.store import CPU, ResidentStore, StreamedStore, build_store
from hf_cifar.data.stratify import subsample
from hf_cifar.evaluation.calibration import fit_temperature
from hf_cifar.evaluation.corruptions import CORRUPTIONS, SEVERITIES, CorruptedStore
from hf_cifar.evaluation.intervals import wilson
from hf_cifar.evaluation.multi_label import fit_thresholds, multi_label_training_metrics, sigmoid
from hf_cifar.evaluation.predictions import Predictions
from hf_cifar.models.heads import divide_logits
from hf_cifar.models.problem_type import thresholds_of
from hf_cifar.training.trainer import ImageClassificationTrainer

logger = logging.getLogger(__name__)


def evaluate_classifier(
    trainer: ImageClassificationTrainer,
    split: Split,
    pixel_store: str = "auto",
    temperature: float = 1.0,
) -> Predictions:
    """Predict every image of a split once; on all processes, each row counted once.

    pixel_store: auto, resident or streamed. temperature: what the model's logits are already divided by,
    for the record.
    """
    store = _store_of(trainer, split, pixel_store)
    return predict_images(trainer, split, store, temperature)


def _store_of(
    trainer: ImageClassificationTrainer, split: Split, pixel_store: str
) -> ResidentStore | StreamedStore:
    device = trainer.args.device if trainer.args.dataloader_num_workers == 0 else CPU
    return build_store(
        split, trainer.preprocessing, augmented=False, kind=pixel_store, device=device
    )


def predict_images(
    trainer: ImageClassificationTrainer, split: Split, images: Dataset, temperature: float = 1.0
) -> Predictions:
    """What the model says of `images`, a store of the split's images in their order."""
    output = trainer.predict(images)
    return Predictions(
        split=split.name,
        row_ids=split.row_ids,
        labels=split.labels,
        logits=np.asarray(output.predictions, dtype=np.float32),
        id2label=split.id2label,
        temperature=temperature,
        thresholds=thresholds_of(trainer.model),
        skipped_rows=tuple(split.skipped.tolist()),
    )


def evaluate_corrupted(
    trainer: ImageClassificationTrainer, split: Split, num_images: int, pixel_store: str = "auto"
) -> dict[str, Any]:
    """Accuracy under each corruption at severities 1 to 5, and without any, on up to `num_images` images of
    the split, stratified. Images are corrupted at the size at which they are stored."""
    part = subsample(split, max(num_images, len(split.id2label)), seed=0)
    store = _store_of(trainer, part, pixel_store)

    def hits(images: Dataset) -> int:
        return int(predict_images(trainer, part, images).right.sum())

    clean, count = hits(store), len(part)
    work = [(name, severity) for name in CORRUPTIONS for severity in SEVERITIES]
    accuracy: dict[str, list[float]] = {name: [] for name in CORRUPTIONS}
    for name, severity in tqdm(work, desc="corruptions", disable=None, leave=False):
        accuracy[name].append(hits(CorruptedStore(store, name, severity)) / count)
    return {
        "num_images": count,
        "clean": clean / count,
        "clean_interval": wilson(clean, count).tolist(),
        "mean": float(np.mean(list(accuracy.values()))),
        "accuracy": accuracy,
    }


def calibrate_classifier(model: PreTrainedModel, validation: Predictions) -> Predictions:
    """Fold the temperature that suits the predictions into the model; what it then predicts.

    The model stays an ordinary one, and its labels the same. Left as it is where no linear layer gives
    the logits. A multi-label model has thresholds fitted instead.
    """
    if validation.multi_label:
        return set_thresholds(model, validation)
    temperature = fit_temperature(validation.logits, validation.labels)
    if not divide_logits(model, temperature):
        logger.info(
            "no temperature: %s has no linear layer that gives its logits", type(model).__name__
        )
        return validation
    calibrated = dataclasses.replace(
        validation,
        logits=(validation.logits / temperature).astype(np.float32),
        temperature=temperature,
    )
    figures = calibrated.metrics
    logger.info(
        "logits divided by %.3f: calibration error on validation %.4f, before %.4f",
        temperature, figures["ece"], figures["ece_uncalibrated"],
    )  # fmt: skip
    return calibrated


def set_thresholds(model: PreTrainedModel, validation: Predictions) -> Predictions:
    """Fit a threshold for each class to the predictions, and keep it in the model's config; what it then
    predicts."""
    thresholds = fit_thresholds(sigmoid(validation.logits), validation.labels)
    model.config.thresholds = thresholds.tolist()
    fitted = dataclasses.replace(validation, thresholds=thresholds)
    before = multi_label_training_metrics(validation.logits, validation.labels)
    logger.info(
        "a threshold fitted for each class, and no temperature: macro F1 on validation %.4f, at 0.5 %.4f",
        fitted.metrics["f1_macro"], before["f1_macro"],
    )  # fmt: skip
    return fitted

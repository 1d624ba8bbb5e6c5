"""Predict every image of a split once, and calibrate by what was predicted."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
from transformers import PreTrainedModel

from hf_cifar.data.splits import Split
from hf_cifar.data.store import CPU, build_store
from hf_cifar.evaluation.calibration import fit_temperature
from hf_cifar.evaluation.multilabel import (
    fit_thresholds,
    multi_label_training_metrics,
    sigmoid,
)
from hf_cifar.evaluation.predictions import Predictions
from hf_cifar.models.layers import divide_logits
from hf_cifar.models.problem import thresholds_of
from hf_cifar.trainer import ImageClassificationTrainer

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
    device = trainer.args.device if trainer.args.dataloader_num_workers == 0 else CPU
    store = build_store(
        split, trainer.preprocessing, augmented=False, kind=pixel_store, device=device
    )
    output = trainer.predict(store)
    return Predictions(
        split=split.name,
        row_ids=split.row_ids,
        labels=split.labels,
        logits=np.asarray(output.predictions, dtype=np.float32),
        id2label=split.id2label,
        temperature=temperature,
        thresholds=thresholds_of(trainer.model),
    )


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

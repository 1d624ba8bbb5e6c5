"""Predict every image of a split once, calibrate on the predictions, and evaluate a saved model."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainingArguments

from hf_cifar.config.data import FULL_RANGE, DataConfig
from hf_cifar.config.evaluation import EvaluateConfig
from hf_cifar.config.metrics import words
from hf_cifar.data.split import Split, prepare_split
from hf_cifar.data.splits import DataSource
from hf_cifar.data.store import (
    CPU,
    PreparedStore,
    ResidentStore,
    build_store,
    default_num_workers,
    images_of,
)
from hf_cifar.data.stratify import subsample
from hf_cifar.errors import UserError
from hf_cifar.evaluation.corruptions import CORRUPTIONS, SEVERITIES, CorruptedStore
from hf_cifar.evaluation.intervals import wilson
from hf_cifar.evaluation.predictions import Predictions
from hf_cifar.models.build import load_classifier
from hf_cifar.models.heads import divide_logits
from hf_cifar.models.problem_type import is_multi_label, thresholds_of
from hf_cifar.models.value_range import saved_value_range
from hf_cifar.progress import progress
from hf_cifar.report.card import is_untouched, save_card
from hf_cifar.runs.folder import RunFolder
from hf_cifar.runs.processes import computes_on_cpu
from hf_cifar.training.losses import evaluation_loss
from hf_cifar.training.trainer import ImageClassificationTrainer
from hf_cifar.transforms.preprocessing import Preprocessing

logger = logging.getLogger(__name__)


def evaluate_classifier(
    trainer: ImageClassificationTrainer,
    split: Split,
    temperature: float = 1.0,
    *,
    store: Dataset | None = None,
) -> Predictions:
    """Predict every image of a split once; distributed over all processes, each row counted once.

    split: its images are prepared if they are not yet. temperature: the number by which the model already
    divides its logits, for the record. store: a store of the split's images, if already built.
    """
    if store is None:
        if split.images is None:
            split = prepare_split(split, trainer.preprocessing)
        store = _store_of(trainer, split)
    return predict_images(trainer, split, store, temperature)


def _store_of(trainer: ImageClassificationTrainer, split: Split) -> ResidentStore | PreparedStore:
    device = trainer.args.device if trainer.args.dataloader_num_workers == 0 else CPU
    return build_store(split, device=device)


def predict_images(
    trainer: ImageClassificationTrainer, split: Split, images: Dataset, temperature: float = 1.0
) -> Predictions:
    """Predict `images`, a store of the split's images in their order."""
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
    trainer: ImageClassificationTrainer, split: Split, num_images: int
) -> dict[str, Any]:
    """Return the accuracy under each corruption at severities 1 to 5, and without one, on up to `num_images`
    images of the split, stratified. Images are corrupted at their stored size."""
    part = subsample(split, max(num_images, len(split.id2label)), seed=0)
    store = _store_of(trainer, part)

    def hits(images: Dataset) -> int:
        return int(predict_images(trainer, part, images).correct.sum())

    clean, count = hits(store), len(part)
    work = [(name, severity) for name in CORRUPTIONS for severity in SEVERITIES]
    accuracy: dict[str, list[float]] = {name: [] for name in CORRUPTIONS}
    for name, severity in progress(work, "evaluating corruptions", unit="corruptions"):
        accuracy[name].append(hits(CorruptedStore(store, name, severity)) / count)
    return {
        "num_images": count,
        "clean": clean / count,
        "clean_interval": wilson(clean, count).tolist(),
        "mean": float(np.mean(list(accuracy.values()))),
        "accuracy": accuracy,
    }


def calibrate_classifier(model: PreTrainedModel, validation: Predictions) -> Predictions:
    """Calibrate a model on its predictions; returns the calibrated predictions.

    With one label per image, a fitted temperature is folded into the model, which remains an ordinary one and
    gives the same labels. Without a linear layer that gives the logits, the model does not change. With any
    number of labels, a threshold for each class goes into the model's config.
    """
    calibrated = dataclasses.replace(validation, **validation.outcome.calibrate())
    if calibrated.thresholds is not None:
        model.config.thresholds = calibrated.thresholds.tolist()
        change = "a threshold fitted for each class, and no temperature"
    elif divide_logits(model, calibrated.temperature):
        change = f"logits divided by {calibrated.temperature:.3f}"
    else:
        logger.info(
            "no temperature: %s has no linear layer that gives its logits", type(model).__name__
        )
        return validation
    name = calibrated.outcome.calibration_metric
    before, after = (each.outcome.metric(name) for each in (validation, calibrated))
    logger.info("%s: %s on validation %.4f, before %.4f", change, words(name), after, before)
    return calibrated


def evaluate_saved(
    config: EvaluateConfig, data: DataConfig, source: DataSource | None = None
) -> Predictions:
    """Evaluate a saved model on one split, and update metrics, predictions and card in its folder.

    source: the open data set of `data`, if there is one.
    Raises: UserError if the data's classes are not the model's, or only one of them has multiple labels.
    """
    if config.fp16 and (config.use_cpu or not torch.cuda.is_available()):
        raise UserError(
            "--fp16 needs a GPU and there is none; use --bf16 --use_cpu, or leave it out"
        )
    temperature = temperature_of(config.model_name_or_path)
    source = source or DataSource(data_as_trained(config, data))
    split = source.test_split if config.split == "test" else source.splits.validation
    model, image_processor = load_classifier(
        config.model_name_or_path,
        revision=config.model_revision,
        trust_remote_code=config.trust_remote_code,
    )
    known = {int(i): name for i, name in model.config.id2label.items()}
    if known != split.id2label:
        raise UserError(
            f"the model has the classes {list(known.values())[:5]}..., but the data has "
            f"{list(split.id2label.values())[:5]}...; pass the --dataset_name that it was trained on"
        )
    if is_multi_label(model) != (split.labels.ndim == 2):
        kinds = ("one label", "multiple labels")
        raise UserError(
            f"the model assigns {kinds[is_multi_label(model)]}, but the data "
            f"{kinds[split.labels.ndim == 2]}; pass the --label_column_name that it was trained on"
        )
    preprocessing = Preprocessing.from_image_processor(image_processor)
    split = prepare_split(
        split, preprocessing, kind=data.pixel_store, on_bad_image=data.on_bad_image
    )
    num_workers = config.dataloader_num_workers
    if num_workers is None:
        num_workers = default_num_workers(decodes=images_of(split).decodes)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = ImageClassificationTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch,
                per_device_eval_batch_size=config.per_device_eval_batch_size,
                dataloader_num_workers=num_workers,
                dataloader_pin_memory=num_workers > 0,
                bf16=config.bf16,
                fp16=config.fp16,
                use_cpu=computes_on_cpu(config.use_cpu),
                remove_unused_columns=False,
                label_names=["labels"],
                report_to="none",
            ),
            processing_class=image_processor,
            preprocessing=preprocessing,
            evaluation_loss=evaluation_loss(multi_label=is_multi_label(model)),
        )
        evaluation = evaluate_classifier(trainer, split, temperature)
        corrupted = None
        if config.corruptions:
            corrupted = evaluate_corrupted(trainer, split, config.corruptions)
    folder = output_folder(config)
    if folder is not None and trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        untouched = is_untouched(folder)
        evaluation.save(folder)
        if corrupted is not None:
            RunFolder(folder).save_corruptions(split.name, corrupted)
        if untouched:  # keep an edited card
            save_card(folder)
    return evaluation


def data_as_trained(config: EvaluateConfig, data: DataConfig) -> DataConfig:
    """Return the data options with the model's own range of values, unless they set one."""
    if data.value_range is not None:
        return data
    found = saved_value_range(
        config.model_name_or_path, config.model_revision, trust_remote_code=config.trust_remote_code
    )
    return dataclasses.replace(data, value_range=FULL_RANGE if found is None else str(found))


def temperature_of(model_name_or_path: str) -> float:
    """Return the temperature that a run's calibration folded into its model; 1 for a model without a run.

    Raises: UserError if the run's file is damaged.
    """
    folder = RunFolder(model_name_or_path)
    value = folder.facts().get("temperature", 1.0)
    try:
        return float(value)
    except (ValueError, TypeError):
        raise UserError(f"{folder.facts_path} is damaged: temperature is {value!r}") from None


def output_folder(config: EvaluateConfig) -> Path | None:
    """Return the folder for the metrics: --output_dir, or the model's; None for a Hub model without one."""
    if config.output_dir is not None:
        return Path(config.output_dir)
    folder = Path(config.model_name_or_path)
    return folder if folder.is_dir() else None

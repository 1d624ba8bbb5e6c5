"""Evaluate a saved model, on the data and with the preprocessing of its own run unless told otherwise."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from transformers import TrainingArguments

from hf_cifar.config.data import DataConfig
from hf_cifar.config.evaluation import EvaluateConfig
from hf_cifar.config.run import on_cpu
from hf_cifar.data.splits import load_splits, load_test_split
from hf_cifar.data.store import default_num_workers, is_resident, stored_view
from hf_cifar.errors import UserError
from hf_cifar.evaluation.evaluation import evaluate_classifier, evaluate_corrupted
from hf_cifar.evaluation.predictions import Predictions
from hf_cifar.models.build import load_classifier
from hf_cifar.models.problem_type import is_multi_label
from hf_cifar.report.card import is_untouched, save_card
from hf_cifar.runs.folder import CORRUPTIONS_FILE, RUN_FILE, read_json, write_json
from hf_cifar.text import one_line
from hf_cifar.training.trainer import ImageClassificationTrainer
from hf_cifar.transforms.preprocessing import Preprocessing


def evaluate_saved(config: EvaluateConfig, data: DataConfig) -> Predictions:
    """Evaluate a saved model on one split, and update figures, predictions and card in its folder.

    Raises: UserError if the data's classes are not the model's, or an image has several for one.
    """
    if config.fp16 and (config.use_cpu or not torch.cuda.is_available()):
        raise UserError(
            "--fp16 needs a GPU and there is none; use --bf16 --use_cpu, or leave it out"
        )
    temperature = temperature_of(config.model_name_or_path)
    split = load_test_split(data) if config.split == "test" else load_splits(data).validation
    model, image_processor = load_classifier(
        config.model_name_or_path,
        revision=config.model_revision,
        trust_remote_code=config.trust_remote_code,
    )
    known = {int(i): name for i, name in model.config.id2label.items()}
    if known != split.id2label:
        raise UserError(
            f"the model tells {list(known.values())[:5]}..., but the data has "
            f"{list(split.id2label.values())[:5]}...; pass the --dataset_name that it was trained on"
        )
    if is_multi_label(model) != (split.labels.ndim == 2):
        kinds = ("one label", "several labels")
        raise UserError(
            f"the model gives an image {kinds[is_multi_label(model)]}, but the data "
            f"{kinds[split.labels.ndim == 2]}; pass the --label_column_name that it was trained on"
        )
    preprocessing = Preprocessing.from_image_processor(image_processor)
    num_workers = config.dataloader_num_workers
    if num_workers is None:
        stored = stored_view(preprocessing, augmented=False)
        num_workers = default_num_workers(is_resident(split, stored, data.pixel_store))
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
                use_cpu=on_cpu(config.use_cpu),
                remove_unused_columns=False,
                label_names=["labels"],
                report_to="none",
            ),
            processing_class=image_processor,
            preprocessing=preprocessing,
        )
        evaluation = evaluate_classifier(trainer, split, data.pixel_store, temperature)
        corrupted = None
        if config.corruptions:
            corrupted = evaluate_corrupted(trainer, split, config.corruptions, data.pixel_store)
    folder = output_folder(config)
    if folder is not None and trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        untouched = is_untouched(folder)
        evaluation.save(folder)
        if corrupted is not None:
            path = folder / CORRUPTIONS_FILE
            write_json(path, {**read_json(path), split.name: corrupted})
        if untouched:  # what somebody wrote into the card stays
            save_card(folder)
    return evaluation


def temperature_of(model_name_or_path: str) -> float:
    """What a run's calibration has divided its model's logits by; 1 for a model without a run.

    Raises: UserError if the run's file is damaged.
    """
    path = Path(model_name_or_path) / RUN_FILE
    if not path.is_file():
        return 1.0
    try:
        return float(json.loads(path.read_text()).get("temperature", 1.0))
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({one_line(error, 200)}); move it away to evaluate without it"
        ) from None


def output_folder(config: EvaluateConfig) -> Path | None:
    """Where the figures go: --output_dir, else the model's folder; None for a Hub model without a folder."""
    if config.output_dir is not None:
        return Path(config.output_dir)
    folder = Path(config.model_name_or_path)
    return folder if folder.is_dir() else None

"""Predict every image of a split once, calibrate on the predictions, and evaluate a saved model."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainingArguments

from hf_cifar.config.data import FULL_RANGE, DataConfig, is_same_source
from hf_cifar.config.evaluation import EvaluateConfig
from hf_cifar.config.metrics import words
from hf_cifar.config.model import is_exported
from hf_cifar.config.objects import InMemory
from hf_cifar.config.training import TrainingConfig
from hf_cifar.data.listing import refuse_data_folder
from hf_cifar.data.split import Split, prepare_split, subset, trained_rows
from hf_cifar.data.splits import DataSource, is_named, load_other_split
from hf_cifar.data.store import default_num_workers, images_of
from hf_cifar.data.stratify import subsample
from hf_cifar.data.streams import Stream
from hf_cifar.errors import UserError
from hf_cifar.evaluation.corruptions import CORRUPTIONS, SEVERITIES, CorruptedStore
from hf_cifar.evaluation.intervals import wilson
from hf_cifar.evaluation.predictions import Predictions
from hf_cifar.models.build import load_classifier
from hf_cifar.models.classifier import Classifier, describe
from hf_cifar.models.distance import Distance, load_distance
from hf_cifar.models.files import model_folder
from hf_cifar.models.heads import divide_logits, shift_logits
from hf_cifar.models.problem_type import is_multi_label, thresholds_of
from hf_cifar.models.rejection import rejection_of
from hf_cifar.models.value_range import saved_value_range
from hf_cifar.progress import progress
from hf_cifar.report.card import is_untouched, save_card
from hf_cifar.run_data import require_held_out
from hf_cifar.runs.folder import RunFolder, write_bytes, write_json
from hf_cifar.runs.processes import computes_on_cpu
from hf_cifar.text import listed
from hf_cifar.training.build import counts_of_classes
from hf_cifar.training.dataset import store_of
from hf_cifar.training.rejection import (
    check_rejection,
    fit_to_reject,
    fitting_rows,
    reject_images,
)
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
        store = store_of(split, trainer.args)
    return predict_images(trainer, split, store, temperature)


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
    store = store_of(part, trainer.args)

    def hits(images: Dataset) -> int:
        return int(predict_images(trainer, part, images).correct.sum())

    clean, count = hits(store), len(part)
    work = [(name, severity) for name in CORRUPTIONS for severity in SEVERITIES]
    accuracy: dict[str, list[float]] = {name: [] for name in CORRUPTIONS}
    for name, severity in progress(work, "evaluating corruptions", unit="corruptions"):
        accuracy[name].append(hits(CorruptedStore(store, name, severity)) / count)
    mean = float(np.mean(list(accuracy.values())))
    logger.info(
        "accuracy on %s images: %.4f under corruptions (mean of %d kinds at %d severities); %.4f without",
        f"{count:,}", mean, len(CORRUPTIONS), len(SEVERITIES), clean / count,
    )  # fmt: skip
    return {
        "num_images": count,
        "clean": clean / count,
        "clean_interval": wilson(clean, count).tolist(),
        "mean": mean,
        "accuracy": accuracy,
    }


def adapt_classifier(
    model: PreTrainedModel,
    validation: Predictions,
    train: Split | Stream,
    config: TrainingConfig,
) -> Predictions:
    """Correct and calibrate a trained model, as the options say; returns its new predictions."""
    if config.class_balance == "post_hoc":
        assert isinstance(train, Split)  # see `check_balance`
        validation = adjust_classifier(model, validation, counts_of_classes(train))
    return calibrate_classifier(model, validation) if config.calibrate else validation


def metric(predictions: Predictions, name: str) -> float:
    """Return a metric of predictions, 0 if it is undefined."""
    return predictions.outcome.metric(name) or 0.0


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
        logger.info("no temperature: %s has no linear layer that gives its logits", describe(model))
        return validation

    name, reason = calibrated.outcome.calibration_metric, ""
    after, before = (metric(each, name) for each in (calibrated, validation))
    if name == "ece" and after > before:
        found = (metric(each, "cross_entropy") for each in (calibrated, validation))
        reason = "; the fitted cross-entropy is {:.4f}, before {:.4f}".format(*found)
    logger.info(
        "%s: %s on validation %.4f, before %.4f%s", change, words(name), after, before, reason
    )
    return calibrated


def adjust_classifier(
    model: PreTrainedModel, validation: Predictions, counts: Tensor
) -> Predictions:
    """Subtract the log of each class's share of the training images from the biases of the head. The
    probabilities are then those for equally frequent classes. Returns the adjusted predictions.

    If this would lower the balanced accuracy on validation, or leave it and lower the accuracy, nothing
    changes. counts: [K], at least 1.
    Source: Menon et al., Long-tail Learning via Logit Adjustment, 2021, post-hoc, with tau = 1.
    """
    shift = (counts / counts.mean()).log()
    logits = validation.logits - shift.numpy()
    adjusted = dataclasses.replace(validation, logits=logits, post_hoc=True)

    # Of equal balanced accuracies, the accuracy decides.
    after, before = (
        (metric(each, "balanced_accuracy"), metric(each, "accuracy"))
        for each in (adjusted, validation)
    )
    is_worse = after < before
    if not is_worse:
        shift_logits(model, shift)
    logger.info(
        "--class_balance post_hoc: balanced accuracy on validation %.4f, before %.4f; accuracy %.4f, before "
        "%.4f%s", after[0], before[0], after[1], before[1],
        "; the biases are not changed" if is_worse else "",
    )  # fmt: skip
    return validation if is_worse else adjusted


def evaluate_saved(
    config: EvaluateConfig, data: DataConfig, source: DataSource | None = None
) -> Predictions:
    """Evaluate a saved model on one split, and update metrics, predictions and card in its folder.

    Classes are matched by name. Data other than the run's are evaluated as a whole if they have no splits.
    source: the open data set of `data`, if there is one.
    Raises: UserError for classes that the model does not know, or if only one of model and data has multiple
    labels.
    """
    if config.fp16 and (config.use_cpu or not torch.cuda.is_available()):
        raise UserError(
            "--fp16 needs a GPU and there is none; use --bf16 --use_cpu, or leave it out"
        )
    check_output(config, data)
    temperature = temperature_of(config.model_name_or_path)
    data = data_as_trained(config, data)
    model, image_processor = load_classifier(
        config.model_name_or_path,
        revision=config.model_revision,
        trust_remote_code=config.trust_remote_code,
    )
    known = {int(i): name for i, name in model.config.id2label.items()}
    preprocessing = Preprocessing.from_image_processor(image_processor)
    names = [known[i] for i in range(len(known))]
    split = split_to_evaluate(config, data, names, preprocessing, source)
    if is_multi_label(model) != (split.labels.ndim == 2):
        kinds = ("one label", "multiple labels")
        raise UserError(
            f"the model assigns {kinds[is_multi_label(model)]}, but the data "
            f"{kinds[split.labels.ndim == 2]}; pass the --label_column_name that it was trained on"
        )
    train = None if config.reject is None else train_of_run(config, data, model, preprocessing)
    split = prepare_split(
        split, preprocessing, kind=data.pixel_store, on_bad_image=data.on_bad_image
    )
    classifier = Classifier(model, image_processor)
    with evaluating(classifier, config, decodes=images_of(split).decodes) as trainer:
        store, distance = store_of(split, trainer.args), None
        evaluation = evaluate_classifier(trainer, split, temperature, store=store)
        if train is not None and config.reject is not None:
            sample = store_of(train, trainer.args)
            evaluation, distance = fit_to_reject(trainer, sample, store, evaluation, config.reject)
        elif rejection_of(model) is not None and not isinstance(
            config.model_name_or_path, InMemory
        ):
            evaluation = reject_images(trainer, store, evaluation, saved_distance(config))
        corrupted = None
        if config.corruptions:
            corrupted = evaluate_corrupted(trainer, split, config.corruptions)
    folder = output_folder(config)
    if folder is not None and trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        untouched = is_untouched(folder)
        if distance is not None:
            save_rejection(RunFolder(folder), model, distance)
        evaluation.save(folder)
        if corrupted is not None:
            RunFolder(folder).save_corruptions(split.name, corrupted)
        if untouched:  # keep an edited card
            save_card(folder)
    return evaluation


@contextlib.contextmanager
def evaluating(
    classifier: Classifier, config: EvaluateConfig, *, decodes: bool
) -> Iterator[ImageClassificationTrainer]:
    """Yield a Trainer that predicts. decodes: its images are decoded when they are read."""
    num_workers = config.dataloader_num_workers
    if num_workers is None:
        num_workers = default_num_workers(decodes=decodes)
    with tempfile.TemporaryDirectory() as scratch:
        yield ImageClassificationTrainer(
            model=classifier.model,
            args=TrainingArguments(
                output_dir=scratch,
                per_device_eval_batch_size=config.per_device_eval_batch_size,
                dataloader_num_workers=num_workers,
                dataloader_pin_memory=num_workers > 0,
                bf16=config.bf16,
                fp16=config.fp16,
                use_cpu=computes_on_cpu(config.use_cpu or is_exported(config.model_name_or_path)),
                report_to="none",
            ),
            processing_class=classifier.image_processor,
            preprocessing=Preprocessing.from_image_processor(classifier.image_processor),
        )


def train_of_run(
    config: EvaluateConfig, data: DataConfig, model: PreTrainedModel, preprocessing: Preprocessing
) -> Split:
    """Return training images of a run, to fit a distance to. `split_to_evaluate` has checked that the data
    are the same.

    Raises: UserError for a folder without a run, or for data or a model that --reject does not support.
    """
    run = RunFolder(config.model_name_or_path)
    if not run.has_run or not is_same_source(run.data(), data):
        raise UserError(
            "--reject needs the training images of a run; pass its folder as --model_name_or_path, and "
            "leave out --dataset_name"
        )
    splits = DataSource(data).splits
    check_rejection(splits, model, preprocessing)
    assert isinstance(splits.train, Split)
    train = trained_rows(splits.train, run.facts())
    return prepare_split(
        subset(train, fitting_rows(train)), preprocessing, on_bad_image=data.on_bad_image
    )


def saved_distance(config: EvaluateConfig) -> Distance | None:
    """Load the distance of a model that rejects images; None for an exported one, which computes it."""
    if is_exported(config.model_name_or_path):
        return None
    folder = model_folder(
        config.model_name_or_path, config.model_revision, config.trust_remote_code
    )
    return load_distance(folder)


def save_rejection(run: RunFolder, model: PreTrainedModel, distance: Distance) -> None:
    """Add the thresholds of a model to the config.json of its run, and the distance beside it."""
    write_bytes(run.reject_path, distance.to_bytes())
    if "test" in run.metrics():
        logger.info(
            "the test metrics do not include these thresholds yet; run: hf-cifar evaluate "
            "--model_name_or_path %s --split test", run.path,
        )  # fmt: skip
    settings = run.model_config() | {"reject": model.config.reject}
    write_json(run.model_config_path, dict(sorted(settings.items())))


def data_as_trained(config: EvaluateConfig, data: DataConfig) -> DataConfig:
    """Return the data options with the model's own range of values, unless they set one."""
    if data.value_range is not None:
        return data
    found = saved_value_range(
        config.model_name_or_path, config.model_revision, trust_remote_code=config.trust_remote_code
    )
    return dataclasses.replace(data, value_range=FULL_RANGE if found is None else str(found))


def split_to_evaluate(
    config: EvaluateConfig,
    data: DataConfig,
    class_names: Sequence[str],
    preprocessing: Preprocessing,
    source: DataSource | None = None,
) -> Split:
    """Load the split to evaluate, with the classes of the model.

    For the data that the run was trained on, validation is the run's own: rows that it did not train on.
    Other data without splits are evaluated as a whole. source: the open data set of `data`, if there is one.
    Raises: UserError for a split that is missing, has unknown classes, or could have been trained on.
    """
    run = RunFolder(config.model_name_or_path)
    own = run.data() if run.has_run else None
    if own is not None and is_same_source(own, data):
        source = source or DataSource(data)
        if config.split == "test":
            return _require_classes(source.test_split, class_names, data)
        return _validation_of_run(run, own, source, class_names)
    split = load_other_split(data, config.split, class_names)
    if is_named(split):
        return split
    if own is not None and not data.streaming:
        moved = dataclasses.replace(
            own,
            dataset_name=data.dataset_name,
            dataset_config_name=data.dataset_config_name,
            pixel_store=data.pixel_store,
            value_range=data.value_range,
        )
        if _has_data_of_run(run, moved, len(split), preprocessing):
            if config.split == "test":
                raise UserError(
                    f"{data.dataset_name} holds the images that the run was trained on, and no test split; "
                    "pass other data, or --split validation for those that it did not train on"
                )
            logger.info(
                "%s holds the data of the run: only its validation images are evaluated",
                data.dataset_name,
            )
            source = DataSource(dataclasses.replace(moved, max_eval_samples=data.max_eval_samples))
            return _validation_of_run(run, moved, source, class_names)
    if own is not None and _is_train_of_run(run, split, preprocessing):
        logger.warning(
            "%s holds the images that the run was trained on: the metrics say nothing about new images",
            data.dataset_name,
        )
    logger.info(
        "%s has no splits: all of its images are evaluated, %s",
        data.dataset_name,
        f"{len(split):,}",
    )
    return split


# Options that decide which rows of train become validation.
SPLIT_OPTIONS = (
    "train_val_split", "split_seed", "num_folds", "fold", "label_column_name", "group_column_name",
    "streaming",
)  # fmt: skip


def _validation_of_run(
    run: RunFolder, own: DataConfig, source: DataSource, class_names: Sequence[str]
) -> Split:
    """Return the validation split of a run's data. own: the options of the run.

    Raises: UserError if it is a part of train, and the run may have trained on rows of it: because of another
    option, or because the data has changed.
    """
    require_held_out(run)
    data, splits = source.config, source.splits
    if is_named(splits.validation):
        return _require_classes(splits.validation, class_names, data)
    for name in SPLIT_OPTIONS:
        asked, original = getattr(data, name), getattr(own, name)
        if asked != original:
            raise UserError(
                f"--{name} {asked} would put images into validation that the run trained on, with --{name} "
                f"{original}; leave it out"
            )
    recorded = run.facts().get("split_hash")
    # An object in memory can be opened by the given name only, not by the recorded one.
    own = dataclasses.replace(own, dataset_name=data.dataset_name)
    same = data == dataclasses.replace(
        own, pixel_store=data.pixel_store, value_range=data.value_range
    )
    original_splits = splits if same else DataSource(own).splits
    if recorded is not None and original_splits.hash != recorded:
        raise UserError(
            f"{data.dataset_name} has changed since the run, so that images it trained on would be in "
            "validation; restore the data, or pass only new images as --dataset_name"
        )
    return _require_classes(splits.validation, class_names, data)


def _require_classes(split: Split, class_names: Sequence[str], data: DataConfig) -> Split:
    """Raises: UserError if the data of a run no longer has the classes of its model."""
    names = list(split.id2label.values())
    if names != list(class_names):
        raise UserError(
            f"the model has the classes {listed(class_names, 5)}, but {data.dataset_name} now has "
            f"{listed(names, 5)}; restore the data, or pass only the images to evaluate as --dataset_name"
        )
    return split


def _has_data_of_run(
    run: RunFolder, moved: DataConfig, num_images: int, preprocessing: Preprocessing
) -> bool:
    """True if the rows of a run's train and validation are those of another data set."""
    facts = run.facts()
    whole = moved.max_train_samples is None and moved.max_eval_samples is None
    total = facts.get("num_train", 0) + facts.get("num_validation", 0)
    total += (facts.get("doubted_rows") or {"num_rows": 0})["num_rows"]
    if moved.on_bad_image == "error" and whole and total != num_images:
        return False
    try:
        splits = DataSource(moved).splits
        if splits.hash != facts.get("split_hash"):
            return False
        recorded = facts.get("pixel_hashes", {}).get("validation")
        return recorded is None or pixel_hash(splits.validation, preprocessing) == recorded
    except UserError:
        return False


def _is_train_of_run(run: RunFolder, split: Split, preprocessing: Preprocessing) -> bool:
    """True if the images of a split are those that a run trained on, as far as its pixels are recorded."""
    facts = run.facts()
    recorded, split = facts.get("pixel_hashes", {}).get("train"), trained_rows(split, facts)
    as_many = recorded is not None and facts.get("num_train") == len(split)
    return as_many and pixel_hash(split, preprocessing, augmented=True) == recorded


def pixel_hash(
    split: Split, preprocessing: Preprocessing, *, augmented: bool = False
) -> str | None:
    """Return the hash of a split's images as a run records it. Raises: UserError for unreadable images."""
    return images_of(prepare_split(split, preprocessing, augmented=augmented)).pixel_hash


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


def check_output(config: EvaluateConfig, data: DataConfig) -> None:
    """Raises: UserError for an output folder that holds another model or run, or the data."""
    if config.output_dir is None or config.writes_to_model:
        return
    folder = Path(config.output_dir)
    if RunFolder(folder).has_run or RunFolder(folder).model_config_path.exists():
        raise UserError(f"{folder} holds another run; pass another --output_dir")
    refuse_data_folder(folder, data.dataset_name)


def output_folder(config: EvaluateConfig) -> Path | None:
    """Return the folder for the metrics: --output_dir, or the model's; None for a Hub model without one."""
    if config.output_dir is not None:
        return Path(config.output_dir)
    folder = Path(config.model_name_or_path)
    return folder if folder.is_dir() else None

"""The main path: from options to a fine-tuned model and its metrics."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset
from transformers import TrainerCallback, set_seed
from transformers.integrations import get_reporting_integration_callbacks

from hf_cifar.config.run import RunConfig
from hf_cifar.data.split import Split, prepare_split, readable
from hf_cifar.data.splits import DataSource, Splits, prepare_splits
from hf_cifar.data.store import images_of
from hf_cifar.data.streams import Stream
from hf_cifar.errors import UserError
from hf_cifar.evaluate import adapt_classifier, evaluate_classifier
from hf_cifar.evaluation.predictions import Predictions
from hf_cifar.hub.push import push_run
from hf_cifar.models.build import build_model
from hf_cifar.models.distance import Distance
from hf_cifar.plan import Plan, plan_run
from hf_cifar.preflight import check_card, check_request, check_space
from hf_cifar.record import Fitted, known_facts, run_facts
from hf_cifar.report.card import card_for, save_card
from hf_cifar.runs.energy import measured_energy
from hf_cifar.runs.folder import write_bytes, write_json
from hf_cifar.runs.lock import sole_run
from hf_cifar.runs.resume import with_restarts
from hf_cifar.runs.signals import deferred_signals
from hf_cifar.training.build import build_trainer
from hf_cifar.training.cleaning import clean_labels
from hf_cifar.training.dataset import store_of
from hf_cifar.training.features import FeatureStore, fit_head
from hf_cifar.training.rejection import fit_to_reject, fitting_rows, reject_images
from hf_cifar.training.saving import save_classifier
from hf_cifar.training.trainer import ImageClassificationTrainer
from hf_cifar.transforms.preprocessing import Preprocessing

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder, its metrics by split, and the loaded model."""

    output_dir: Path
    metrics: dict[str, dict[str, Any]]
    model: torch.nn.Module
    image_processor: Any


def finetune_classifier(
    model: Any = None,
    dataset: Any = None,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    **options: Any,
) -> RunResult:
    """Fine-tune, evaluate and save a classifier; README lists the files in `output_dir`.

    model: a name or path, a transformers or timm model, a torch.nn.Module that returns logits, or
    (model, image_processor); or a `RunConfig`, with all options. dataset: a name or path, a
    datasets.Dataset or DatasetDict, a pandas.DataFrame, (images, labels), a dict of columns or of splits, a
    list of (image, label); or a `DataSource`, if already open. Objects are not modified. callbacks: of the
    Trainer. options: any option by its name, see docs/options.md.
    Raises: UserError before anything is written, for options or data that cannot work.
    """
    config, source = requested(model, dataset, options)
    check_request(config, source)
    set_seed(config.train.seed)
    splits = source.splits  # train and validation; test is not read yet
    model, image_processor = build_model(
        config.model,
        splits.id2label,
        multi_label=splits.multi_label,
        value_range=source.value_range,
    )
    check_space(config, model)
    plan = plan_run(config, model, image_processor, splits)
    splits, test = prepare_images(source, image_processor, plan)
    splits = clean_labels(model, image_processor, splits, plan)
    known = known_facts(source, splits, test, plan.config, plan.race)
    check_card(plan, model, known)
    trainer = build_trainer(model, image_processor, splits, plan, callbacks=callbacks)
    with claimed_folder(plan):
        fitted = fit(trainer, splits, plan)
        evaluations, distance = evaluate_run(trainer, splits, test, plan)
        facts = known | run_facts(trainer, splits, fitted, evaluations[0])
        return finish_run(trainer, facts, evaluations, distance, plan)


def prepare_images(
    source: DataSource, image_processor: Any, plan: Plan
) -> tuple[Splits, Split | None]:
    """Decode the images for the model: of train and validation, and of test if it will be evaluated or
    compared.

    Nothing else of test is used before the final evaluation.
    Raises: UserError that names the row of each unreadable image.
    """
    preprocessing = Preprocessing.from_image_processor(image_processor)
    data, device = plan.config.data, plan.processes.device
    splits = prepare_splits(source.splits, preprocessing, data, device)
    if not (plan.config.train.do_predict or plan.config.train.check_leakage):
        return splits, None
    test = prepare_split(
        source.test_split, preprocessing,
        kind=data.pixel_store, on_bad_image=data.on_bad_image, device=device,
    )  # fmt: skip
    return splits, test


def requested(model: Any, dataset: Any, options: dict[str, Any]) -> tuple[RunConfig, DataSource]:
    """Return the options and the data of a call of `finetune_classifier`."""
    config = model if isinstance(model, RunConfig) else RunConfig()
    if not isinstance(model, (RunConfig, type(None))):
        options = {"model_name_or_path": model, **options}
    if dataset is not None and not isinstance(dataset, DataSource):
        options = {"dataset_name": dataset, **options}
    config = with_restarts(config.with_options(**options))
    if isinstance(dataset, DataSource):
        return config, dataset
    return config, DataSource(config.data)


@contextlib.contextmanager
def claimed_folder(plan: Plan) -> Iterator[None]:
    """Lock the output folder, and save the resolved options first, so that an interrupted run can be resumed.

    Raises: UserError if another run holds the folder, or has used it since this one began.
    """
    if not plan.processes.is_main:
        yield
        return
    with sole_run(plan.folder.path):
        if not plan.requested.train.resumes:
            plan.folder.refuse_occupied()
        plan.save()
        yield


def fit(trainer: ImageClassificationTrainer, splits: Splits, plan: Plan) -> Fitted:
    """Train in epochs, or solve for the head at once.

    Raises: UnreadableImages that names every unreadable row, if training encountered one.
    """
    train = plan.config.train
    with measured_energy(plan.processes.is_main) as energy:
        start = time.perf_counter()
        if train.head_solver == "lbfgs":
            fit_head(trainer.model, trainer.train_dataset, trainer.eval_dataset)
            trainer.state.epoch = 0.0
            seconds = time.perf_counter() - start
        else:
            with listing_unreadable(splits.train, plan.config.data.on_bad_image):
                trainer.train(None if plan.checkpoint is None else str(plan.checkpoint))
            seconds = trainer.resuming.seconds
    if trainer.args.gradient_accumulation_steps != train.gradient_accumulation_steps:
        save_batch(trainer, plan)
    # Curves end here: some trackers would record the final predictions of validation under test.
    for reporter in get_reporting_integration_callbacks(trainer.args.report_to):
        trainer.remove_callback(reporter)
    return Fitted(seconds, energy or None)


@contextlib.contextmanager
def listing_unreadable(train: Split | Stream, on_bad_image: str) -> Iterator[None]:
    """If training stops at an unreadable image, check the remaining ones too, to name them all at once."""
    try:
        yield
    except UserError:
        if on_bad_image == "error" and isinstance(train, Split) and images_of(train).faults:
            logger.warning("a training image cannot be read; checking the others")
            readable(train)
        raise


def save_batch(trainer: ImageClassificationTrainer, plan: Plan) -> None:
    """Save the batch size that fitted into memory to config.yaml."""
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    fitting = plan.config.with_training(**{name: getattr(trainer.args, name) for name in names})
    if plan.processes.is_main:
        plan.folder.save_config(fitting)


def evaluate_run(
    trainer: ImageClassificationTrainer, splits: Splits, test: Split | None, plan: Plan
) -> tuple[list[Predictions], Distance | None]:
    """Evaluate and calibrate on validation; with --do_predict, also evaluate test, after all choices.

    With --reject, the distance that the model needs is returned too.
    """
    train, distance = plan.config.train, None
    on_features = isinstance(trainer.eval_dataset, FeatureStore)
    store = store_of(splits.validation, trainer.args) if on_features else trainer.eval_dataset
    validation = evaluate_classifier(trainer, splits.validation, store=store)
    validation = adapt_classifier(trainer.classifier, validation, splits.train, train)
    if train.reject is not None:
        assert isinstance(splits.train, Split)  # see `check_rejection`
        images = (
            store_of(splits.train, trainer.args, skips=True)
            if on_features
            else trainer.train_dataset
        )
        sample = Subset(images, fitting_rows(splits.train).tolist())
        validation, distance = fit_to_reject(trainer, sample, store, validation, train.reject)
    if test is None or not train.do_predict:
        return [validation], distance
    store = store_of(test, trainer.args)
    evaluated = evaluate_classifier(trainer, test, validation.temperature, store=store)
    if distance is not None:
        evaluated = reject_images(trainer, store, evaluated, distance)
    return [validation, evaluated], distance


def finish_run(
    trainer: ImageClassificationTrainer,
    facts: dict[str, Any],
    evaluations: list[Predictions],
    distance: Distance | None,
    plan: Plan,
) -> RunResult:
    """Save the model with its metrics, facts and card, and push it if requested."""
    folder, train = plan.folder, plan.config.train
    with deferred_signals() as stop_request:
        if distance is not None and plan.processes.is_main:
            # Before config.json, which says that it is there.
            write_bytes(folder.reject_path, distance.to_bytes())
        save_classifier(trainer, folder.path)
        if plan.processes.is_main:
            before = folder.facts() if train.resumes else {}
            if before.get("steps") == facts["steps"]:
                # Resuming a finished run trains nothing: its time and speed stay those of its training.
                facts |= before
            else:
                folder.remove_results()
            for evaluation in evaluations:
                evaluation.save(folder.path)
            write_json(folder.facts_path, facts)
            save_card(folder.path)
        stop_request.raise_if_requested()
    if train.push_to_hub and plan.processes.is_main:
        logger.info("pushed to %s", push_run(train, card_for))
    trainer.accelerator.wait_for_everyone()
    metrics = {evaluation.split: evaluation.metrics for evaluation in evaluations}
    return RunResult(folder.path, metrics, trainer.model, trainer.processing_class)

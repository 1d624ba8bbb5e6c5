"""The main path: from options to a fine-tuned model and the figures that go with it."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed
from transformers.integrations import get_reporting_integration_callbacks

from hf_cifar.audit.leakage import find_leakage
from hf_cifar.config.run import RunConfig
from hf_cifar.data.split import require_readable
from hf_cifar.data.splits import DataSource, Splits
from hf_cifar.evaluate import calibrate_classifier, evaluate_classifier
from hf_cifar.evaluation.predictions import Predictions
from hf_cifar.hub.push import prepare_push, push_run
from hf_cifar.models.build import build_model
from hf_cifar.plan import resolve_checkpoint, resolve_defaults, resolve_setting, with_batch_of
from hf_cifar.preflight import check_libraries, check_run, check_space, draft_card
from hf_cifar.record import run_facts
from hf_cifar.report.card import card_for, save_card
from hf_cifar.runs.energy import measured_energy
from hf_cifar.runs.folder import (
    CONFIG_FILE,
    RUN_FILE,
    read_json,
    refuse_occupied,
    remove_figures,
    write_json,
)
from hf_cifar.runs.lock import sole_run
from hf_cifar.runs.resume import resume_point
from hf_cifar.runs.signals import deferred_signals
from hf_cifar.training.build import build_trainer, resolve_workers
from hf_cifar.training.features import FeatureStore, fit_head
from hf_cifar.training.saving import save_classifier
from hf_cifar.training.trainer import ImageClassificationTrainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """A finished run: where it lies, its figures by split, and the loaded model."""

    output_dir: Path
    metrics: dict[str, dict[str, Any]]
    model: torch.nn.Module
    image_processor: Any


def finetune_classifier(config: RunConfig, source: DataSource | None = None) -> RunResult:
    """Fine-tune, evaluate and save a classifier; see README for what `output_dir` then holds.

    source: of `config.data`, if it is open already.
    Raises: UserError before anything is written, for options or data that cannot work.
    """
    source = source or DataSource(config.data)
    check_run(config, source)
    is_new = resume_point(config) is None
    config = resolve_checkpoint(config)
    set_seed(config.train.seed)
    splits = source.splits  # train and validation; test stays sealed
    require_readable(splits.train, splits.validation, pixel_store=config.data.pixel_store)
    model, image_processor = build_model(
        config.model, splits.id2label, multi_label=splits.multi_label
    )
    config = resolve_defaults(config, model)
    check_space(config, model)
    config = resolve_setting(
        config, model, image_processor, splits.train, resumed=bool(resume_point(config))
    )
    config = resolve_workers(config, splits.train)
    leakage = find_leakage(source) if config.train.check_leakage else None
    prepare_push(config.train, draft_card(config, splits, leakage))
    check_libraries(config.train, model)
    trainer = build_trainer(model, image_processor, splits, config)
    with claimed_folder(config, is_new=is_new):
        save_config(config)
        fit(trainer, config)
        evaluations = evaluate_run(trainer, source, config)
        return finish_run(trainer, splits, evaluations, config, leakage)


def fit(trainer: ImageClassificationTrainer, config: RunConfig) -> None:
    """Train in epochs, or solve for the head at once."""
    with measured_energy(trainer.is_world_process_zero()) as energy:
        if config.train.head_solver == "lbfgs":
            start = time.perf_counter()
            fit_head(trainer.model, trainer.train_dataset, trainer.eval_dataset)
            trainer.state.epoch = 0.0
            trainer.state.log_history.append({"train_runtime": time.perf_counter() - start})
        else:
            trainer.train(resume_from_checkpoint=resume_point(config))
    if trainer.args.gradient_accumulation_steps != config.train.gradient_accumulation_steps:
        save_config(with_batch_of(trainer.args, config))
    if energy:
        trainer.state.log_history.append({"energy": energy})
    # Curves end here: some trackers would file the final predictions of validation under test.
    for reporter in get_reporting_integration_callbacks(config.train.report_to):
        trainer.remove_callback(reporter)


def finish_run(
    trainer: ImageClassificationTrainer,
    splits: Splits,
    evaluations: list[Predictions],
    config: RunConfig,
    leakage: dict[str, Any] | None = None,
) -> RunResult:
    """Save the model with its figures, facts and card, and push it if asked."""
    folder = Path(config.train.output_dir)
    metrics = {evaluation.split: evaluation.metrics for evaluation in evaluations}
    with deferred_signals() as stop_request:
        save_classifier(trainer, folder)
        if trainer.is_world_process_zero():
            facts = run_facts(trainer, splits, evaluations[0].temperature, config, leakage)
            before = read_json(folder / RUN_FILE) if resume_point(config) else {}
            if before.get("steps") == facts["steps"]:
                # A finished run that is resumed trains nothing: its time and speed are those of then.
                facts |= before
            else:
                remove_figures(folder)
            for evaluation in evaluations:
                evaluation.save(folder)
            write_json(folder / RUN_FILE, facts)
            save_card(folder)
        stop_request.raise_if_requested()
    if config.train.push_to_hub and trainer.is_world_process_zero():
        logger.info("pushed to %s", push_run(config.train, card_for))
    trainer.accelerator.wait_for_everyone()
    return RunResult(folder, metrics, trainer.model, trainer.processing_class)


@contextlib.contextmanager
def claimed_folder(config: RunConfig, *, is_new: bool) -> Iterator[None]:
    """Hold the output folder. Raises: UserError if another run does, or did since this one began."""
    if config.train.process_index != 0:
        yield
        return
    folder = Path(config.train.output_dir)
    with sole_run(folder):
        if is_new:
            refuse_occupied(folder)
        yield


def save_config(config: RunConfig) -> None:
    """Write the resolved options first, so that even a run that is cut off can be repeated."""
    if config.train.process_index == 0:
        Path(config.train.output_dir).mkdir(parents=True, exist_ok=True)
        config.save(Path(config.train.output_dir) / CONFIG_FILE)


def evaluate_run(
    trainer: ImageClassificationTrainer, source: DataSource, config: RunConfig
) -> list[Predictions]:
    """Validation, by which the model is calibrated, and with --do_predict the test split: shown here for the
    first time, when nothing is left to be chosen."""
    split, store = source.splits.validation, trainer.eval_dataset
    store = None if isinstance(store, FeatureStore) else store
    validation = evaluate_classifier(trainer, split, config.data.pixel_store, store=store)
    if config.train.calibrate:
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        validation = calibrate_classifier(model, validation)
    if not config.train.do_predict:
        return [validation]
    kind, temperature = config.data.pixel_store, validation.temperature
    return [validation, evaluate_classifier(trainer, source.test_split, kind, temperature)]

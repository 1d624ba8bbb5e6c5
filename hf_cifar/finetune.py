"""The main path: from options to a fine-tuned model and the figures that go with it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    get_scheduler,
    set_seed,
)
from transformers.integrations import get_reporting_integration_callbacks

from hf_cifar.audit.leakage import find_leakage
from hf_cifar.config.fields import MULTI_LABEL_METRICS
from hf_cifar.config.model import SCRATCH
from hf_cifar.config.run import FinetuneConfig, RunConfig
from hf_cifar.data.columns import class_counts
from hf_cifar.data.split import Split, require_readable
from hf_cifar.data.splits import Splits, load_splits, load_test_split
from hf_cifar.errors import UserError
from hf_cifar.evaluation.evaluation import calibrate_classifier, evaluate_classifier
from hf_cifar.evaluation.predictions import Predictions
from hf_cifar.extras import require
from hf_cifar.hub.origin import find_origin
from hf_cifar.hub.push import Target, check_push, prepare_push, push_run
from hf_cifar.models.blocks import block_depths, describe_trainable
from hf_cifar.models.build import build_model
from hf_cifar.models.kernels import as_it_came
from hf_cifar.models.problem_type import is_multi_label
from hf_cifar.report.card import CardFacts, card_for, render_card, save_card
from hf_cifar.runs.energy import measured_energy
from hf_cifar.runs.environment import environment
from hf_cifar.runs.folder import (
    CONFIG_FILE,
    RUN_FILE,
    read_json,
    refuse_occupied,
    remove_figures,
    write_json,
)
from hf_cifar.runs.lock import refuse_in_use, sole_run
from hf_cifar.runs.resume import check_same_run, resume_point, run_to_resume
from hf_cifar.runs.signals import noted_signals
from hf_cifar.text import one_line
from hf_cifar.training.autotune import (
    is_sharded,
    resolve_setting,
)
from hf_cifar.training.build import build_trainer, resolve_workers
from hf_cifar.training.checkpoints import find_damage, list_checkpoints, newest_checkpoint
from hf_cifar.training.features import (
    accept_pixels_alone,
    fit_head,
)
from hf_cifar.training.optimizers import default_rates
from hf_cifar.training.resumable import pixel_hashes
from hf_cifar.training.saving import save_classifier
from hf_cifar.training.trainer import ImageClassificationTrainer

logger = logging.getLogger(__name__)

TRACKERS = {"tensorboard", "trackio"}  # those that the extra `track` brings


@dataclass(frozen=True)
class RunResult:
    """A finished run: where it lies, its figures by split, and the loaded model."""

    output_dir: Path
    metrics: dict[str, dict[str, Any]]
    model: torch.nn.Module
    image_processor: Any


def finetune_classifier(config: RunConfig) -> RunResult:
    """Fine-tune, evaluate and save a classifier; see README for what `output_dir` then holds.

    Raises: UserError before anything is written, for options or data that cannot work.
    """
    check_run(config)
    is_new = resume_point(config) is None
    config = resolve_checkpoint(config)
    set_seed(config.train.seed)
    splits = load_splits(config.data)  # train and validation; test stays sealed
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
    prepare_push(config.train, draft_card(config, splits))
    check_libraries(config.train, model)
    trainer = build_trainer(model, image_processor, splits, config)
    with claimed_folder(config, is_new=is_new):
        save_config(config)
        fit(trainer, config)
        evaluations = evaluate_run(trainer, splits, config)
        return finish_run(trainer, splits, evaluations, config)


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
    model = trainer.accelerator.unwrap_model(trainer.model)
    accept_pixels_alone(model)
    as_it_came(model)


def check_libraries(args: FinetuneConfig, model: PreTrainedModel) -> None:
    """Raises: UserError for an option whose package is missing, or which the model does not support."""
    for tracker in TRACKERS.intersection(args.report_to):
        require(tracker, extra="track")
    try:
        for reporter in get_reporting_integration_callbacks(args.report_to):
            reporter()
    except (ImportError, RuntimeError, ValueError) as error:
        raise UserError(f"--report_to: {one_line(error)}") from None
    try:
        ImageClassificationTrainer.get_optimizer_cls_and_kwargs(args, model)
    except (ImportError, RuntimeError, ValueError) as error:
        given = f" with --optim_args {args.optim_args}" if args.optim_args else ""
        raise UserError(f"--optim {args.optim.value}{given}: {one_line(error)}") from None
    try:
        get_scheduler(
            args.lr_scheduler_type,
            torch.optim.SGD([torch.zeros(1)]),
            num_warmup_steps=1,
            num_training_steps=10,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    except (TypeError, ValueError) as error:
        raise UserError(
            f"--lr_scheduler_kwargs {args.lr_scheduler_kwargs} do not suit --lr_scheduler_type "
            f"{args.lr_scheduler_type.value}: {error}"
        ) from None
    if args.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise UserError(
            f"--gradient_checkpointing: {type(model).__name__} does not support it; leave it out"
        )
    if args.torch_compile:
        known = torch.compiler.list_backends(exclude_tags=())
        if args.torch_compile_backend not in known:
            raise UserError(
                f"--torch_compile_backend does not take {args.torch_compile_backend!r}; it takes "
                f"{', '.join(known)}"
            )


def finish_run(
    trainer: ImageClassificationTrainer,
    splits: Splits,
    evaluations: list[Predictions],
    config: RunConfig,
) -> RunResult:
    """Save the model with its figures, facts and card, and push it if asked."""
    folder = Path(config.train.output_dir)
    metrics = {evaluation.split: evaluation.metrics for evaluation in evaluations}
    with noted_signals() as stop_request:
        save_classifier(trainer, folder)
        if trainer.is_world_process_zero():
            facts, before = run_facts(trainer, splits, evaluations[0].temperature, config), {}
            if resume_point(config):
                before = read_json(folder / RUN_FILE)
            if before.get("steps") == facts["steps"]:
                # A finished run that is resumed trains nothing: its time and speed are those of then.
                facts |= before
            else:
                remove_figures(folder)
            for evaluation in evaluations:
                evaluation.save(folder)
            write_json(folder / RUN_FILE, facts)
            save_card(folder)
        stop_request.obey()
    if config.train.push_to_hub and trainer.is_world_process_zero():
        logger.info("pushed to %s", push_run(config.train, card_for))
    trainer.accelerator.wait_for_everyone()
    return RunResult(folder, metrics, trainer.model, trainer.processing_class)


def check_run(config: RunConfig) -> None:
    """Find out now what would otherwise fail at the end of the run.

    Raises: UserError if the output folder holds another run, there is nothing to resume from, the
    device cannot compute as asked, there is no test split to predict or an image of it cannot be read, or a
    push could not work.
    """
    train = config.train
    if train.seeds > 1:
        raise UserError(
            f"--seeds {train.seeds} is for finetune_seeds; finetune_classifier is one run"
        )
    folder = Path(train.output_dir)
    if train.process_index == 0:
        refuse_in_use(folder)
    if resume_point(config):
        run = run_to_resume(train.output_dir, train.resume_from_checkpoint)
        for change in check_same_run(run, config.options()):
            logger.info("going on with %s", change)
    elif train.process_index == 0:
        refuse_occupied(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file; pass a folder")
    if train.mixed_precision == "fp16" and train.device.type == "cpu":
        raise UserError(
            "fp16 needs a GPU and there is none; leave out --fp16, or launch with configs/cpu.yaml"
        )
    if train.auto_find_batch_size and train.world_size > 1:
        raise UserError(
            f"--auto_find_batch_size is for one process, and there are {train.world_size}; pass a smaller "
            "--per_device_train_batch_size"
        )
    if train.ema_decay and is_sharded():
        raise UserError("--ema_decay does not go with FSDP or DeepSpeed; leave it out")
    if train.device.type == "cpu" and is_sharded():
        raise UserError(
            "FSDP and DeepSpeed need GPUs and there are none; launch with configs/cpu.yaml"
        )
    if train.do_predict:
        require_readable(load_test_split(config.data), pixel_store=config.data.pixel_store)
    check_push(train)


def resolve_checkpoint(config: RunConfig) -> RunConfig:
    """Settle which checkpoint a run goes on from: the one that was named, or the newest that is whole. A run
    that was stopped before its first begins again.

    Raises: UserError if there is none, or none that is whole.
    """
    train, resume = config.train, resume_point(config)
    if resume is None:
        return config
    found, folder = resume, Path(train.output_dir)
    if resume is True:
        checkpoint = newest_checkpoint(folder)
        found = None if checkpoint is None else str(checkpoint)
        if found is None and (list_checkpoints(folder) or not (folder / CONFIG_FILE).is_file()):
            what = "whole checkpoint" if list_checkpoints(folder) else "checkpoint"
            raise UserError(
                f"--resume_from_checkpoint: no {what} in {folder}; leave it out to start anew, elsewhere if "
                "there are files"
            )
        logger.info("going on from %s", found or f"the beginning: {folder} has no checkpoint yet")
    elif not Path(resume).is_dir():
        raise UserError(
            f"--resume_from_checkpoint: no checkpoint in {resume}; pass its folder, or last"
        )
    elif damage := find_damage(Path(resume)):
        raise UserError(
            f"--resume_from_checkpoint: {resume} is damaged: {damage}; pass last for the newest that is whole"
        )
    return dataclasses.replace(
        config, train=dataclasses.replace(train, resume_from_checkpoint=found)
    )


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


def with_batch_of(args: FinetuneConfig, config: RunConfig) -> RunConfig:
    """The config with the batch that fitted into memory."""
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    batch = {name: getattr(args, name) for name in names}
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **batch))


def resolve_defaults(config: RunConfig, model: PreTrainedModel) -> RunConfig:
    """Fill in what depends on the model: learning rate, clipping, and what the best checkpoint is best at.

    Raises: UserError for a metric that the data do not have, or a layer decay without layers.
    """
    train = config.train
    batch_size = train.train_batch_size * train.gradient_accumulation_steps * train.world_size
    scratch = config.model.model_name_or_path.startswith(SCRATCH)
    defaults = default_rates(model, batch_size, scratch=scratch)._asdict()
    defaults["metric_for_best_model"] = best_metric(train.metric_for_best_model, model)
    missing = {name: value for name, value in defaults.items() if getattr(train, name) is None}
    train = dataclasses.replace(train, **missing)
    if train.layer_decay != 1:
        block_depths(model)
    return dataclasses.replace(config, train=train)


def best_metric(asked: str | None, model: PreTrainedModel) -> str:
    """The metric that says which checkpoint is best. Raises: UserError for one that the data do not have."""
    if is_multi_label(model):
        return (
            asked or "average_precision_macro"
        )  # which needs no thresholds: they are fitted at the end
    if asked is not None and asked.removeprefix("eval_") in MULTI_LABEL_METRICS:
        raise UserError(
            f"--metric_for_best_model {asked} is for multi-label data; pass accuracy or cross_entropy"
        )
    return asked or "accuracy"


def check_space(config: RunConfig, model: PreTrainedModel) -> None:
    """Raises: UserError for a disk without room for the model and its checkpoints."""
    train = config.train
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    moments = 2 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    checkpoints = 0 if train.save_strategy == "no" else (train.save_total_limit or 1) + 1
    require_space(Path(train.output_dir), weights + checkpoints * (weights + moments))


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raises: UserError if the disk of `folder` has less room than needed."""
    existing = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise UserError(
            f"no space left for {folder}: the model and its checkpoints take {needed_bytes / 1e6:,.0f} MB, "
            f"{free / 1e6:,.0f} MB are free; pass another --output_dir"
        )


def save_config(config: RunConfig) -> None:
    """Write the resolved options first, so that even a run that is cut off can be repeated."""
    if config.train.process_index == 0:
        Path(config.train.output_dir).mkdir(parents=True, exist_ok=True)
        config.save(Path(config.train.output_dir) / CONFIG_FILE)


def evaluate_run(
    trainer: ImageClassificationTrainer, splits: Splits, config: RunConfig
) -> list[Predictions]:
    """Validation, by which the model is calibrated, and with --do_predict the test split: shown here for the
    first time, when nothing is left to be chosen."""
    validation = evaluate_classifier(trainer, splits.validation, config.data.pixel_store)
    if config.train.calibrate:
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        validation = calibrate_classifier(model, validation)
    if not config.train.do_predict:
        return [validation]
    test = load_test_split(config.data)
    kind, temperature = config.data.pixel_store, validation.temperature
    return [validation, evaluate_classifier(trainer, test, kind, temperature)]


def draft_card(config: RunConfig, splits: Splits) -> str:
    """The model card as far as it is known before training, with no accuracy yet: what can be wrong with its
    metadata is wrong now."""
    names = ["validation", "test"] if config.train.do_predict else ["validation"]
    run = known_facts(splits, config)
    facts = CardFacts(
        repo_id=run["repo_id"],
        options=config.options(),
        run=run,
        metrics={name: {"num_images": 0, "accuracy": 0.0} for name in names},
        class_names=list(splits.id2label.values()),
    )
    return render_card(facts)


def known_facts(splits: Splits, config: RunConfig) -> dict[str, Any]:
    """What is known of a run before it trains, as plain values: whose model and data, the split, versions."""
    model, data = config.model, config.data
    return {
        "repo_id": Target.of_run(config.train).repo_id,  # the folder may get another name
        "model": asdict(find_origin(model.model_name_or_path, "model", model.model_revision)),
        "dataset": asdict(find_origin(data.dataset_name, "dataset")),
        "split_hash": splits.hash,
        "source_splits": {
            "train": splits.train.source_split,
            "validation": splits.validation.source_split,
        },
        "num_train": len(splits.train),
        "num_validation": len(splits.validation),
        "skipped_rows": {
            split.name: split.skipped.tolist()
            for split in (splits.train, splits.validation)
            if isinstance(split, Split) and len(split.skipped)
        },
        "leakage": find_leakage(splits, config.data) if config.train.check_leakage else None,
        "environment": environment(),
    }


def run_facts(
    trainer: ImageClassificationTrainer, splits: Splits, temperature: float, config: RunConfig
) -> dict[str, Any]:
    """What happened in a run, as plain values: data, work, time, machine and versions."""
    state, device = trainer.state, trainer.args.device
    logged = {name: value for log in state.log_history for name, value in log.items()}
    seconds = logged["train_runtime"]
    return known_facts(splits, config) | {
        "label_counts": {
            split.name: {
                name: int(count)
                for name, count in zip(
                    split.id2label.values(),
                    class_counts(split.labels, len(split.id2label)),
                    strict=True,
                )
            }
            for split in (splits.train, splits.validation)
            if isinstance(split, Split)  # nobody has counted a stream's
        },
        "pixel_hashes": pixel_hashes(splits, config),
        "trainable": describe_trainable(trainer.model),
        "steps": state.global_step,
        "epochs": state.epoch,
        "best_checkpoint_step": state.best_global_step,
        "temperature": temperature,
        "train_seconds": seconds,
        "train_images_per_second": round(len(splits.train) * (state.epoch or 0) / seconds, 1),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "processes": trainer.args.world_size,
        "num_threads": torch.get_num_threads(),  # sums on a CPU depend on it
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU ({os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()})",
        "energy": logged.get("energy"),  # None where nothing measured it
        "history": plain_history(state.log_history),
    }


def plain_history(log_history: list[dict[str, float]]) -> list[dict[str, float | None]]:
    """The Trainer's log records as JSON can hold them: None for what is no finite number, as the gradient
    norm of a step that overflows in fp16."""
    return [
        {name: value if math.isfinite(value) else None for name, value in record.items()}
        for record in log_history
        if "energy" not in record
    ]


def render_summary(result: RunResult) -> str:
    """The table at the end of a run: figures, where the model lies, and the lines that load it."""
    from hf_cifar.evaluation.multi_label import headline
    from hf_cifar.evaluation.tables import render_figures

    return f"""{render_figures(result.metrics, headline(result.metrics["validation"]))}

model: {result.output_dir}
report: hf-cifar report {result.output_dir}

from transformers import pipeline
classify = pipeline("image-classification", model="{result.output_dir}"{_custom_code(result)})
print(classify("image.png"))"""


def _custom_code(result: RunResult) -> str:
    return ", trust_remote_code=True" if any(result.output_dir.glob("*.py")) else ""

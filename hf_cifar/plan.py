"""The plan of a run: every unset option, resolved once."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import broadcast_object_list
from transformers import BaseImageProcessor, PreTrainedModel

from hf_cifar.config.metrics import best_metrics
from hf_cifar.config.model import SCRATCH
from hf_cifar.config.run import RunConfig
from hf_cifar.config.training import TrainingConfig
from hf_cifar.data.split import Split, with_images
from hf_cifar.data.splits import Splits
from hf_cifar.data.store import default_num_workers
from hf_cifar.data.streams import Stream
from hf_cifar.errors import UserError
from hf_cifar.models.blocks import block_depths, has_statistics
from hf_cifar.models.kernels import has_fused_attention
from hf_cifar.models.problem_type import is_multi_label
from hf_cifar.runs.folder import RunFolder, write_json
from hf_cifar.runs.processes import Processes, is_sharded, start_processes
from hf_cifar.runs.resume import BATCH, run_to_resume, with_batch_of, with_options_of
from hf_cifar.text import duration
from hf_cifar.training.autotune import Setting, pick_setting
from hf_cifar.training.build import build_sampler, check_balance
from hf_cifar.training.checkpoints import find_damage, newest_checkpoint
from hf_cifar.training.cleaning import check_cleaning
from hf_cifar.training.optimizers import default_rate, default_weight_decay
from hf_cifar.training.race import race_rates
from hf_cifar.training.rejection import check_rejection
from hf_cifar.training.teacher import check_teacher
from hf_cifar.transforms.preprocessing import Preprocessing

logger = logging.getLogger(__name__)
# Training images are decoded before training if that takes at most this long.
CHECK_SECONDS = 10
# Default length: MIN_EPOCHS, or up to MAX_EPOCHS for few images, to reach MIN_STEPS, or HEAD_MIN_STEPS if
# only the head trains, which overfits sooner.
MIN_EPOCHS, MAX_EPOCHS, MIN_STEPS, HEAD_MIN_STEPS = 3.0, 30.0, 500, 100
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Plan:
    """A run's options and processes, with every unset option resolved.

    requested: the options as given. config: the same with every unset value resolved, for config.yaml.
    checkpoint: the folder that the run resumes from. processes: those that train. race: chose the
    learning rate with --learning_rate auto, as in `Race.facts`; on resume, the race of the resumed run.
    """

    requested: RunConfig
    config: RunConfig
    processes: Processes
    checkpoint: Path | None = None
    race: dict[str, Any] | None = None

    @property
    def folder(self) -> RunFolder:
        """The folder of the run."""
        return RunFolder(self.config.train.output_dir)

    def save(self) -> None:
        """Write the settled options, the images per step and the race into the folder of the run.

        The options keep the requested batch: other numbers of processes only divide it differently.
        """
        asked = {name: getattr(self.requested.train, name) for name in BATCH}
        self.folder.save_config(self.config.with_training(**asked))
        images = images_a_step(self.config.train, self.processes)
        write_json(self.folder.batch_path, {"images_per_step": images})
        if self.race is not None:
            write_json(self.folder.race_path, self.race)

    @property
    def setting(self) -> Setting:
        """Precision, memory format and attention; compilation is left to the Trainer."""
        train = self.config.train
        return Setting(train.precision, train.memory_format, train.attention)


def plan_run(
    config: RunConfig, model: PreTrainedModel, image_processor: BaseImageProcessor, splits: Splits
) -> Plan:
    """Determine the checkpoint to resume from, rates, clipping, number of epochs, when to evaluate and save,
    the best metric, workers of a stream, and the compute setting.

    Raises: UserError if the options do not fit the model or the data, or there is nothing to resume from.
    """
    check_cleaning(config, splits)
    check_balance(splits, config.train, model)
    if config.train.reject is not None:
        check_rejection(splits, model, Preprocessing.from_image_processor(image_processor))
    check_teacher(
        config, splits.id2label, model, Preprocessing.from_image_processor(image_processor)
    )
    processes, before = start_processes(config), config_before(config.train)
    checkpoint = find_checkpoint(config.train)
    devices = processes.count * processes.num_devices
    resumed = with_options_of(before, config)
    resumed = with_batch_of(run_to_resume(config.train), resumed, devices)
    train = resumed.train
    preprocessing = Preprocessing.from_image_processor(image_processor)
    check = settle_check(resumed, splits, preprocessing, processes)
    resumed = dataclasses.replace(
        resumed, data=dataclasses.replace(resumed.data, check_images=check)
    )
    settled: dict[str, Any] = {
        **settle_rates(resumed, model, processes),
        **settle_evaluation(train),
        "num_train_epochs": settle_epochs(resumed, images_an_epoch(splits.train, train), processes),
        "metric_for_best_model": best_metric(train, multi_label=is_multi_label(model)),
        "freeze_batch_norm": keeps_statistics(resumed, model),
        "dataloader_num_workers": settle_workers(train, splits, processes),
    }
    if train.layer_decay != 1 or train.unfreeze_epochs:
        block_depths(model)  # raises for a model without blocks
    planned = resumed.with_training(**settled)
    setting = settle_setting(planned, model, image_processor, splits, processes, before)
    plan = Plan(
        requested=config,
        config=planned.with_training(**setting),
        processes=processes,
        checkpoint=checkpoint,
        race=race_before(train),
    )
    if train.learning_rate == "auto":
        return with_raced_rate(plan, model, image_processor, splits)
    return plan


def config_before(train: TrainingConfig) -> RunConfig | None:
    """Return the settled options of the run that is resumed, or None."""
    resumed = run_to_resume(train)
    if resumed is None or not RunFolder(resumed).has_run:
        return None
    return RunFolder(resumed).load_config()


def find_checkpoint(train: TrainingConfig) -> Path | None:
    """Find the checkpoint to resume from: the requested one, or the newest complete one.

    None for a new run, and for one that stopped before its first checkpoint: it starts from the beginning.
    So does `last` in a folder without a run: one command line can be repeated until the run is finished.
    Raises: UserError if the requested one is damaged, or all are.
    """
    folder, requested = run_to_resume(train), train.requested_checkpoint
    if folder is None:
        return None
    if requested is not None:
        if damage := find_damage(requested):
            raise UserError(
                f"--resume_from_checkpoint: {requested} is damaged: {damage}; pass last for the newest "
                "complete one"
            )
        return requested
    found = newest_checkpoint(folder)
    if found is None and RunFolder(folder).checkpoints():
        raise UserError(
            f"--resume_from_checkpoint: no complete checkpoint in {folder}; leave it out to start again in "
            "another --output_dir"
        )
    logger.info("resuming from %s", found or f"the beginning: {folder} has no checkpoint yet")
    return found


def race_before(train: TrainingConfig) -> dict[str, Any] | None:
    """Return the race of the run that is resumed, or None."""
    resumed = run_to_resume(train)
    return None if resumed is None else RunFolder(resumed).race() or None


def with_raced_rate(
    plan: Plan, model: PreTrainedModel, image_processor: BaseImageProcessor, splits: Splits
) -> Plan:
    """Return the plan with the learning rate that wins a race, or the default if the run is too short."""
    default = rate_of(plan.config, model, plan.processes)
    race = race_rates(model, image_processor, splits, plan, default)
    return dataclasses.replace(
        plan,
        config=plan.config.with_training(learning_rate=race.winner if race else default),
        race=race.facts if race else None,
    )


def rate_of(config: RunConfig, model: PreTrainedModel, processes: Processes) -> float | None:
    """Return the default learning rate of a run."""
    train = config.train
    return default_rate(
        model,
        images_a_step(train, processes),
        optim=train.optim,
        optim_args=train.optim_args,
        scratch=config.model.model_name_or_path.startswith(SCRATCH),
    )


def settle_rates(config: RunConfig, model: PreTrainedModel, processes: Processes) -> dict[str, Any]:
    """Return learning rate, clipping and weight decay: the requested ones, or the defaults of optimiser
    and model family; with --learning_rate auto, a race decides later.

    Raises: UserError for an optimiser without a known learning rate.
    """
    train = config.train
    rate, decay = train.learning_rate, train.weight_decay
    if rate is None:
        rate = rate_of(config, model, processes)
    if rate is None:
        raise UserError(
            f"--optim {train.optim} has no default learning rate for this model; pass --learning_rate "
            "auto, or a number"
        )
    decay = default_weight_decay(train.optim) if decay is None else decay
    clipping = MAX_GRAD_NORM if train.max_grad_norm is None else train.max_grad_norm
    return {"learning_rate": rate, "weight_decay": decay, "max_grad_norm": clipping}


def keeps_statistics(config: RunConfig, model: PreTrainedModel) -> bool:
    """Return True if BatchNorms keep the checkpoint's statistics: as requested, else if they have any.

    Raises: UserError if this is requested, and they have none.
    """
    requested, known = config.train.freeze_batch_norm, has_statistics(model)
    if requested and not known:
        raise UserError(
            f"--freeze_batch_norm: {config.model.model_name_or_path} has no BatchNorm statistics to keep; "
            "leave it out"
        )
    if requested is None and known and config.model.freeze != "backbone":
        logger.info(
            "BatchNorms keep the checkpoint's statistics; --freeze_batch_norm false uses those of the batch"
        )
    return known if requested is None else requested


def images_a_step(train: TrainingConfig, processes: Processes) -> int:
    """Return the number of training images per optimiser step, over all devices."""
    batch = train.per_device_train_batch_size * processes.num_devices
    return batch * train.gradient_accumulation_steps * processes.count


def images_an_epoch(split: Split | Stream, train: TrainingConfig) -> int:
    """Return the number of images of an epoch, which over- and under-sampling change."""
    sampler = build_sampler(split, train)
    if sampler is None:
        return len(split)
    logger.info(
        "--class_balance %s: an epoch has %s images, %s of each class, instead of %s",
        train.class_balance, f"{len(sampler):,}", f"{sampler.draws:,}", f"{len(split):,}",
    )  # fmt: skip
    return len(sampler)


def settle_epochs(config: RunConfig, num_images: int, processes: Processes) -> float:
    """Return the number of epochs: as requested, else 3, or up to 30 for few images, to reach 500 steps, or
    100 if only the head trains.

    Source: Kolesnikov et al., Big Transfer, 2020, whose shortest run has 500 steps.
    """
    train = config.train
    if train.num_train_epochs is not None:
        return train.num_train_epochs
    steps = math.ceil(num_images / images_a_step(train, processes))
    fewest = HEAD_MIN_STEPS if config.model.freeze == "backbone" else MIN_STEPS
    epochs = float(min(max(MIN_EPOCHS, math.ceil(fewest / steps)), MAX_EPOCHS))
    if epochs != MIN_EPOCHS and train.max_steps <= 0 and train.head_solver == "optimizer":
        logger.info(
            "training for %g epochs, %s steps, because an epoch has only %s images; --num_train_epochs "
            "overrides this",
            epochs, f"{epochs * steps:,.0f}", f"{num_images:,}",
        )  # fmt: skip
    return epochs


def settle_evaluation(train: TrainingConfig) -> dict[str, Any]:
    """Return when to evaluate and to save: unset options follow those that were set.

    The best checkpoint is loaded at the end if each evaluation has a checkpoint.
    """
    default = "steps" if train.eval_steps or train.save_steps else "epoch"
    regular = ("steps", "epoch")
    evaluates = train.eval_strategy or (
        train.save_strategy if train.save_strategy in regular else default
    )
    saves = train.save_strategy or (evaluates if evaluates in regular else default)
    save_steps = train.save_steps or train.eval_steps or 500
    eval_steps = train.eval_steps or save_steps
    steps_match = evaluates != "steps" or _is_multiple(save_steps, eval_steps)
    can_load = evaluates != "no" and (saves == "best" or (saves == evaluates and steps_match))
    mismatch = f"--eval_strategy {evaluates} and --save_strategy {saves}"
    if evaluates == saves == "steps":
        mismatch += f", every {eval_steps:g} and {save_steps:g} steps"
    load_best = can_load if train.load_best_model_at_end is None else train.load_best_model_at_end
    if load_best and not can_load:
        if evaluates != "no":
            raise UserError(
                f"--load_best_model_at_end needs a checkpoint for each evaluation: {mismatch}; leave it out, "
                "or make them match"
            )
        load_best = False  # without evaluations, the last weights are the result
    if not can_load and evaluates != "no":
        logger.info("the last weights are the result, not the best ones: %s", mismatch)
    return {
        "eval_strategy": evaluates, "save_strategy": saves, "load_best_model_at_end": load_best,
        "save_steps": save_steps, "eval_steps": eval_steps if evaluates == "steps" else train.eval_steps,
    }  # fmt: skip


def _is_multiple(larger: float, smaller: float) -> bool:
    """Return True if one number of steps, or one share of all steps, is a multiple of the other."""
    ratio = larger / smaller
    same_unit = (larger < 1) == (smaller < 1)
    return same_unit and ratio > 0.5 and math.isclose(ratio, round(ratio))


def best_metric(train: TrainingConfig, *, multi_label: bool) -> str:
    """Return the metric that picks the best checkpoint. Raises: UserError if the labels rule it out."""
    requested = train.metric_for_best_model
    if multi_label:
        # Average precision needs no thresholds; they are fitted only at the end.
        default = "average_precision_macro"
    else:
        # With --class_balance, all classes are meant to count equally.
        default = "accuracy" if train.class_balance == "none" else "balanced_accuracy"
    known = best_metrics(multi_label=multi_label)
    if requested is not None and requested.removeprefix("eval_") not in known:
        kind = "with one label" if multi_label else "with multiple labels"
        raise UserError(
            f"--metric_for_best_model {requested} is for images {kind}; pass {' or '.join(known)}"
        )
    return requested or default


def settle_check(
    config: RunConfig, splits: Splits, preprocessing: Preprocessing, processes: Processes
) -> Literal["all", "used"]:
    """Return when training images are decoded: as requested, else all before training if that takes at most
    ten seconds, if only the head trains, on features of all images, or if --clean_labels checks all labels.

    The first process measures for all.
    """
    check = config.data.check_images
    if check != "auto":
        return check
    cleans = config.train.clean_labels != "none"
    if isinstance(splits.train, Stream) or config.computes_features or cleans:
        return "all"
    found: list[Literal["all", "used"]] = ["all"]
    if processes.is_main:
        found[0] = measured_check(splits.train, preprocessing, config.data.pixel_store)
    if processes.count > 1:
        broadcast_object_list(found)
    return found[0]


def measured_check(train: Split, preprocessing: Preprocessing, kind: str) -> Literal["all", "used"]:
    """Return when training images are decoded, by the time that a few of them take."""
    images = with_images(train, preprocessing, augmented=True, kind=kind).images
    assert images is not None
    seconds = images.seconds
    if seconds <= CHECK_SECONDS:
        return "all"
    logger.info(
        "train: each image is prepared in the first epoch (--check_images used), because preparing %s first "
        "would take about %s%s",
        images, duration(seconds), images.space(),
    )  # fmt: skip
    return "used"


def settle_workers(train: TrainingConfig, splits: Splits, processes: Processes) -> int | None:
    """Return the number of loader workers: settled for a stream, as requested for other data.

    The order of a stream depends on this number, so config.yaml has to record it.
    """
    if not isinstance(splits.train, Stream) or train.dataloader_num_workers is not None:
        return train.dataloader_num_workers
    return splits.train.num_workers(processes.count, default_num_workers(decodes=True))


def settle_setting(
    config: RunConfig,
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    splits: Splits,
    processes: Processes,
    before: RunConfig | None,
) -> dict[str, Any]:
    """Return the compute setting: requested by the options or the launcher, that of the resumed run, or the
    fastest one here."""
    found = requested_setting(config.train, before)
    if found["attention"] == "eager" and not has_fused_attention(model):
        raise UserError(
            f"--attention eager: {type(model).__name__} has no fused attention to replace; leave it out"
        )
    if found["precision"] != "auto":
        return found
    fixed = {name: found[name] for name in ("memory_format", "attention") if found[name] != "auto"}
    setting = measured_setting(fixed, config, model, image_processor, splits, processes)
    return {
        "precision": setting.precision, "memory_format": setting.memory_format,
        "attention": setting.attention, "torch_compile": setting.compiled or found["torch_compile"],
    }  # fmt: skip


def requested_setting(train: TrainingConfig, before: RunConfig | None) -> dict[str, Any]:
    """Return precision, memory format, attention and compilation from the options, else the launcher, else
    the resumed run; "auto" if none of them sets one."""
    names = ("precision", "memory_format", "attention", "torch_compile")
    found = {name: getattr(train, name) for name in names}
    for name in ("bf16", "fp16"):
        if getattr(train, name):
            found["precision"] = name
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if found["precision"] == "auto" and launcher != "no":
        found["precision"] = launcher
    if found["precision"] == "auto" and before is not None:
        left_open = [name for name, value in found.items() if value == "auto"]
        compiled = train.torch_compile or before.train.torch_compile
        found |= {name: getattr(before.train, name) for name in left_open}
        found["torch_compile"] = compiled
    return found


def measured_setting(
    fixed: dict[str, Any],
    config: RunConfig,
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    splits: Splits,
    processes: Processes,
) -> Setting:
    """Return the fastest setting, measured by the first process for all. fixed: the parts already decided."""
    unmeasured = Setting(**fixed)
    if is_sharded():  # the complete model may not fit on one device
        return unmeasured
    found, num_images = [unmeasured], len(splits.train)
    if processes.is_main:
        preprocessing = Preprocessing.from_image_processor(image_processor)
        batch = config.train.per_device_train_batch_size * processes.num_devices
        size = min(batch, num_images)
        noise = torch.randint(0, 256, (size, 3, *preprocessing.size), dtype=torch.uint8)
        pixel_values = preprocessing(noise.to(processes.device))
        labels = torch.arange(size, device=processes.device) % model.config.num_labels
        found[0], line = pick_setting(
            model.to(processes.device),
            pixel_values,
            labels,
            num_batches(config, num_images, processes),
            fixed.get("memory_format", "auto"),
            fixed.get("attention", "auto"),
            compiles=not config.train.unfreeze_epochs,  # which would recompile for each block
        )
        logger.info(line)
    if processes.count > 1:
        broadcast_object_list(found)
    return found[0]


def num_batches(config: RunConfig, num_images: int, processes: Processes) -> int:
    """Return the number of forward and backward passes of one process in the complete run."""
    train = config.train
    batch = train.per_device_train_batch_size * processes.num_devices
    if config.computes_features:
        # One forward pass for each view, each about a third of a training step.
        return math.ceil(num_images * train.feature_views / batch / 3)
    if train.max_steps > 0:
        return train.max_steps * train.gradient_accumulation_steps
    batches = math.ceil(num_images / (batch * processes.count))
    assert train.num_train_epochs is not None  # settled
    return math.ceil(batches * train.num_train_epochs)

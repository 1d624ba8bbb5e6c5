"""What the options left open, settled: checkpoint to resume, rates, clipping, metric, how to compute."""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel

from hf_cifar.config.metrics import best_metrics, metrics_of
from hf_cifar.config.model import SCRATCH
from hf_cifar.config.run import FinetuneConfig, RunConfig
from hf_cifar.data.split import Split
from hf_cifar.data.streams import Stream
from hf_cifar.errors import UserError
from hf_cifar.models.blocks import block_depths
from hf_cifar.models.kernels import has_fused_attention
from hf_cifar.models.problem_type import is_multi_label
from hf_cifar.runs.folder import CONFIG_FILE
from hf_cifar.runs.resume import resume_point
from hf_cifar.training.autotune import Setting, is_sharded, pick_setting
from hf_cifar.training.checkpoints import find_damage, list_checkpoints, newest_checkpoint
from hf_cifar.training.optimizers import default_rates
from hf_cifar.transforms.preprocessing import Preprocessing

logger = logging.getLogger(__name__)


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
    rates = default_rates(
        model, batch_size, optim=train.optim, optim_args=train.optim_args, scratch=scratch
    )
    if train.learning_rate is None and rates.learning_rate is None:
        raise UserError(
            f"--optim {train.optim.value} has no default learning rate for this model; pass --learning_rate"
        )
    defaults = rates._asdict()
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
    if asked is not None and asked.removeprefix("eval_") not in best_metrics(multi_label=False):
        names = " or ".join(metrics_of(multi_label=False, place="training"))
        raise UserError(f"--metric_for_best_model {asked} is for multi-label data; pass {names}")
    return asked or "accuracy"


def resolve_setting(
    config: RunConfig,
    model: nn.Module,
    image_processor: BaseImageProcessor,
    train_split: Split | Stream,
    *,
    resumed: bool = False,
) -> RunConfig:
    """Settle how the model computes: as the options or the launcher ask, as the run that is resumed, or as is
    fastest here. The result names it, so that a rerun of its config computes the same way."""
    if resumed:
        config = compute_as(Path(config.train.output_dir), config)
    train = config.train
    if train.attention == "eager" and not has_fused_attention(model):
        raise UserError(
            f"--attention eager: {type(model).__name__} has no attention kernel to go without; leave it out"
        )
    if train.precision == "auto":
        setting = _measured(config, model, image_processor, train_split)
        train = dataclasses.replace(
            train,
            precision=setting.precision,
            memory_format=setting.memory_format,
            attention=setting.attention,
            torch_compile=setting.compiled or train.torch_compile,
        )
    return dataclasses.replace(config, train=train)


def compute_as(folder: Path, config: RunConfig) -> RunConfig:
    """The options, with the setting of the run in `folder` where they leave it open."""
    before = folder / CONFIG_FILE
    if config.train.precision != "auto" or not before.is_file():
        return config
    saved = RunConfig.load(before).train
    left_open = {
        name: getattr(saved, name)
        for name in ("precision", "memory_format", "attention")
        if getattr(config.train, name) == "auto"
    }
    train = dataclasses.replace(config.train, **left_open, torch_compile=saved.torch_compile)
    return dataclasses.replace(config, train=train)


def _measured(
    config: RunConfig,
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    split: Split | Stream,
) -> Setting:
    """What the first process finds; one setting for all."""
    train = config.train
    asked = {
        name: getattr(train, name)
        for name in ("memory_format", "attention")
        if getattr(train, name) != "auto"
    }
    unmeasured = Setting(**asked)
    if is_sharded():  # the whole model may fit on no single device
        return unmeasured
    found = [unmeasured]
    if train.process_index == 0:
        preprocessing = Preprocessing.from_image_processor(image_processor)
        size = min(train.train_batch_size, len(split))
        noise = torch.randint(0, 256, (size, 3, *preprocessing.size), dtype=torch.uint8)
        pixel_values = preprocessing(noise.to(train.device))
        labels = torch.arange(size, device=train.device) % model.config.num_labels
        found[0], line = pick_setting(
            model.to(train.device),
            pixel_values,
            labels,
            num_batches(config, len(split)),
            train.memory_format,
            train.attention,
        )
        logger.info(line)
    if train.world_size > 1:
        broadcast_object_list(found)
    return found[0]


def num_batches(config: RunConfig, num_images: int) -> int:
    """Forward and backward passes of a process in the whole run."""
    train = config.train
    if config.model.freeze == "backbone" and train.feature_views and not config.data.streaming:
        # Each view goes forward once, which is about a third of a training step.
        return math.ceil(num_images * train.feature_views / train.train_batch_size / 3)
    if train.max_steps > 0:
        return train.max_steps * train.gradient_accumulation_steps
    batches = math.ceil(num_images / (train.train_batch_size * train.world_size))
    return math.ceil(batches * train.num_train_epochs)

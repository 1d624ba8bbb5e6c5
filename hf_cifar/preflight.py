"""What is checked before the first step: folder, device, libraries, disk, the card."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.integrations import get_reporting_integration_callbacks

from hf_cifar.config.run import FinetuneConfig, RunConfig
from hf_cifar.data.split import require_readable
from hf_cifar.data.splits import DataSource, Splits
from hf_cifar.errors import UserError
from hf_cifar.extras import require
from hf_cifar.hub.push import check_push
from hf_cifar.record import known_facts
from hf_cifar.report.card import CardFacts, render_card
from hf_cifar.runs.folder import refuse_occupied
from hf_cifar.runs.lock import refuse_in_use
from hf_cifar.runs.resume import check_same_run, resume_point, run_to_resume
from hf_cifar.text import one_line
from hf_cifar.training.autotune import is_sharded
from hf_cifar.training.schedules import check_schedule
from hf_cifar.training.trainer import ImageClassificationTrainer

logger = logging.getLogger(__name__)
TRACKERS = {"tensorboard", "trackio"}  # those that the extra `track` brings


def check_run(config: RunConfig, source: DataSource) -> None:
    """Find out now what would otherwise fail at the end of the run.

    Raises: UserError if `source` is of other data, the output folder holds another run, there is nothing to
    resume from, the device cannot compute as requested, there is no test split to predict or an image of it
    cannot be read, or a push could not work.
    """
    train = config.train
    if source.config != config.data:
        raise UserError(
            "the open data set is not the one in config.data; pass one of the same options"
        )
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
        require_readable(source.test_split, pixel_store=config.data.pixel_store)
    check_push(train)


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
    check_schedule(args)
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


def draft_card(config: RunConfig, splits: Splits, leakage: dict[str, Any] | None = None) -> str:
    """The model card as far as it is known before training, with no accuracy yet: what can be wrong with its
    metadata is wrong now."""
    names = ["validation", "test"] if config.train.do_predict else ["validation"]
    run = known_facts(splits, config, leakage)
    facts = CardFacts(
        repo_id=run["repo_id"],
        options=config.options(),
        run=run,
        metrics={name: {"num_images": 0, "accuracy": 0.0} for name in names},
        class_names=list(splits.id2label.values()),
    )
    return render_card(facts)

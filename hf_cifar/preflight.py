"""Checks before the first step: folder, device, disk, card and push."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_cifar.config.run import RunConfig
from hf_cifar.data.cache import free_bytes
from hf_cifar.data.listing import refuse_data_folder
from hf_cifar.data.splits import DataSource
from hf_cifar.errors import UserError
from hf_cifar.hub.push import check_push, prepare_push
from hf_cifar.plan import Plan
from hf_cifar.report.card import CardFacts, render_card
from hf_cifar.runs.folder import RunFolder
from hf_cifar.runs.processes import computes_on_cpu, is_main_process, is_sharded
from hf_cifar.runs.resume import check_folder
from hf_cifar.training.race import check_race

logger = logging.getLogger(__name__)


def check_request(config: RunConfig, source: DataSource) -> None:
    """Run the checks that need no model, including those of steps at the end of the run.

    Raises: UserError if `source` has other data, the output folder holds another run, the device does not
    support the requested precision, a race of learning rates is not possible, test is requested but
    missing, or a push would fail.
    """
    for check in request_checks(config, source):
        check()


def request_checks(config: RunConfig, source: DataSource) -> list[Callable[[], object]]:
    """Return the checks of `check_request` one by one, each of which raises a UserError of its own."""
    checks: list[Callable[[], object]] = [
        lambda: check_source(config, source),
        lambda: check_output(config),
        lambda: check_device(config),
        lambda: check_race(config),
    ]
    if config.train.do_predict or config.train.check_leakage:
        # Raises without labels; its images are checked before training.
        checks.append(lambda: source.test_split)
    if is_main_process():
        checks.append(lambda: check_push(config.train))
    return checks


def check_source(config: RunConfig, source: DataSource) -> None:
    """Raises: UserError if `source` has other data, or multiple runs are requested of one."""
    if source.config != config.data:
        raise UserError(
            "the open data set is not the one in config.data; open it with the same options"
        )
    if config.train.seeds > 1:
        raise UserError(
            f"--seeds {config.train.seeds} is for finetune_seeds; finetune_classifier is one run"
        )


def check_output(config: RunConfig) -> None:
    """Raises: UserError if the output folder holds another run, or the data, or is a file."""
    folder = Path(config.train.output_dir)
    for change in check_folder(config):
        logger.info("resuming with %s", change)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file; pass a folder")
    if not RunFolder(folder).has_run:
        refuse_data_folder(folder, config.data.dataset_name)


def check_device(config: RunConfig) -> None:
    """Raises: UserError for options that this device or number of processes rules out."""
    train = config.train
    on_cpu, launcher = computes_on_cpu(train.use_cpu), os.environ.get("ACCELERATE_MIXED_PRECISION")
    fp16 = train.fp16 or train.precision == "fp16"
    fp16 = fp16 or (train.precision == "auto" and not train.bf16 and launcher == "fp16")
    if fp16 and on_cpu:
        raise UserError(
            "fp16 needs a GPU and there is none; leave out --fp16, or launch with configs/cpu.yaml"
        )
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if train.auto_find_batch_size and num_processes > 1:
        raise UserError(
            f"--auto_find_batch_size is for one process, and there are {num_processes}; pass a smaller "
            "--per_device_train_batch_size"
        )
    refused = {name: getattr(train, name) for name in ("ema_decay", "sam_rho", "unfreeze_epochs")}
    refused |= {"reject": train.reject, "class_balance post_hoc": train.class_balance == "post_hoc"}
    refused |= {"lora_rank": config.model.lora_rank, "clean_labels": train.clean_labels != "none"}
    for name, value in refused.items():
        if value and is_sharded():
            raise UserError(f"--{name} cannot be combined with FSDP or DeepSpeed; leave it out")
    if on_cpu and is_sharded():
        raise UserError(
            "FSDP and DeepSpeed need GPUs and there are none; launch with configs/cpu.yaml"
        )


def check_card(plan: Plan, model: PreTrainedModel, known: dict[str, Any]) -> None:
    """Check the card, and what a push would need. known: see `known_facts`.

    Raises: UserError for metadata that the Hub refuses, or a push that could not work.
    """
    if plan.processes.is_main:
        prepare_push(plan.config.train, draft_card(plan.config, model, known))


def check_space(config: RunConfig, model: PreTrainedModel) -> None:
    """Raises: UserError if the disk has too little space for the model and its checkpoints."""
    require_space(Path(config.train.output_dir), run_bytes(config, model))


def run_bytes(config: RunConfig, model: PreTrainedModel) -> int:
    """Return the disk space that the model and its checkpoints take, in bytes."""
    train = config.train
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    moments = 2 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    checkpoints = 0 if train.save_strategy == "no" else (train.save_total_limit or 1) + 1
    return weights + checkpoints * (weights + moments)


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raises: UserError if the disk of `folder` has too little free space."""
    free = free_bytes(folder)
    if free < needed_bytes:
        raise UserError(
            f"no space left for {folder}: the model and its checkpoints take {needed_bytes / 1e6:,.0f} MB, "
            f"{free / 1e6:,.0f} MB are free; pass another --output_dir"
        )


def draft_card(config: RunConfig, model: PreTrainedModel, known: dict[str, Any]) -> str:
    """Render the model card before training, without metrics, to find mistakes in its metadata early."""
    names = ["validation", "test"] if config.train.do_predict else ["validation"]
    facts = CardFacts(
        repo_id=known["repo_id"],
        options=config.options(),
        run=known,
        metrics={name: {"num_images": 0, "accuracy": 0.0} for name in names},
        class_names=list(model.config.id2label.values()),
        module_class=getattr(model.config, "module_class", ""),
    )
    return render_card(facts)

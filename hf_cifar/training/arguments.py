"""transformers' TrainingArguments of a planned run."""

from __future__ import annotations

import copy
import dataclasses
import logging

import torch
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from hf_cifar.config.metrics import BEST_METRICS
from hf_cifar.config.run import RunConfig
from hf_cifar.config.training import TrainingConfig
from hf_cifar.errors import UserError
from hf_cifar.extras import require
from hf_cifar.progress import shows_bars
from hf_cifar.runs.processes import computes_on_cpu
from hf_cifar.text import one_line
from hf_cifar.training.optimizers import optimizer_class, optimizer_name
from hf_cifar.training.schedules import check_schedule

logger = logging.getLogger(__name__)
TRACKERS = {"tensorboard", "trackio"}  # installed by the extra `track`
# Options hidden from the Trainer: precision is set below, hub/push.py pushes once at the end, no logger may
# record a token, a smaller batch must not change the step, and the plan has already found the checkpoint.
NOT_PASSED_ON = (
    "bf16", "fp16", "push_to_hub", "hub_token", "auto_find_batch_size", "resume_from_checkpoint",
)  # fmt: skip


def training_arguments(config: RunConfig, num_workers: int) -> TrainingArguments:
    """Build the TrainingArguments of a run from settled options. Raises: UserError if they are refused."""
    train = config.train
    theirs = {each.name for each in dataclasses.fields(TrainingArguments)}
    values = {
        each.name: getattr(train, each.name)
        for each in dataclasses.fields(TrainingConfig)
        if each.name in theirs and each.name not in NOT_PASSED_ON
    }
    values = {name: value for name, value in values.items() if value is not None}
    assert train.metric_for_best_model is not None  # settled by the plan
    metric = train.metric_for_best_model.removeprefix("eval_")
    values |= {
        "dataloader_num_workers": num_workers,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "use_cpu": computes_on_cpu(train.use_cpu),
        "run_name": train.run_name or train.output_dir,  # otherwise trackers invent one
        "report_to": train.report_to or "none",
        "greater_is_better": BEST_METRICS[metric],
        "logging_nan_inf_filter": False,
        "disable_tqdm": not shows_bars()  # bars for people, lines for logs
        if train.disable_tqdm is None
        else train.disable_tqdm,
    } | dict(config.trainer)
    # Set afterwards: TrainingArguments refuses names that transformers does not have.
    ours = {
        name: values.pop(name)
        for name, theirs in (("optim", OptimizerNames), ("lr_scheduler_type", SchedulerType))
        if values[name] not in tuple(theirs)
    }
    try:
        arguments = TrainingArguments(**values)
    except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
        raise UserError(one_line(error)) from None
    for name, value in ours.items():
        setattr(arguments, name, value)
    # Not as a flag, which would require a GPU; bfloat16 runs on a CPU as well. The options take precedence
    # over the launcher's precision.
    if train.precision != "auto":
        arguments.mixed_precision = "no" if train.precision == "fp32" else train.precision
    arguments.dataloader_pin_memory &= num_workers > 0  # images on the device cannot be pinned
    if "accelerator_config" not in config.trainer:
        # Batches are copied to a GPU while it computes.
        arguments.accelerator_config.non_blocking = arguments.dataloader_pin_memory
    return arguments


def own_arguments(args: TrainingArguments | None) -> TrainingArguments:
    """Return a copy of a user's arguments with what the prepared images require."""
    args = TrainingArguments("tmp_trainer") if args is None else copy.copy(args)
    args.remove_unused_columns, args.label_names = False, ["labels"]
    args.disable_tqdm = args.disable_tqdm or not shows_bars()
    if args.push_to_hub:
        logger.warning(
            "push_to_hub=True: nothing is pushed while training; call trainer.push_to_hub() afterwards"
        )
    return args


def set_workers(args: TrainingArguments, num_workers: int) -> None:
    """Set the number of loader workers, and what depends on it."""
    if args.dataloader_num_workers > num_workers:
        logger.info(
            "dataloader_num_workers is %d instead of %d: images are prepared, so workers would only copy",
            num_workers,
            args.dataloader_num_workers,
        )
    args.dataloader_num_workers = num_workers
    args.dataloader_pin_memory &= num_workers > 0  # images on the device cannot be pinned
    if not num_workers:
        args.dataloader_persistent_workers, args.dataloader_prefetch_factor = False, None


def check_libraries(args: TrainingArguments, model: PreTrainedModel) -> None:
    """Raises: UserError for an option whose package is missing, or which the model does not support."""
    for tracker in TRACKERS.intersection(args.report_to):
        require(tracker, extra="track")
    try:
        for reporter in get_reporting_integration_callbacks(args.report_to):
            reporter()
    except (ImportError, RuntimeError, ValueError) as error:
        raise UserError(f"--report_to: {one_line(error)}") from None
    try:
        optimizer_class(args, model)
    except (ImportError, RuntimeError, ValueError) as error:
        given = f" with --optim_args {args.optim_args}" if args.optim_args else ""
        raise UserError(f"--optim {optimizer_name(args)}{given}: {one_line(error)}") from None
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

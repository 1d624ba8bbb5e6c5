"""Every option of a run: parse a command line into a RunConfig, save it, and read it back."""

from __future__ import annotations

import dataclasses
import enum
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainingArguments

from hf_cifar.config.augmentation import AugmentConfig
from hf_cifar.config.command_line import check_option_names, parse_dataclasses
from hf_cifar.config.data import DataConfig
from hf_cifar.config.fields import (
    BOUNDS,
    WITHOUT_EFFECT,
    check_bounds,
    field_names,
    option,
)
from hf_cifar.config.metrics import BEST_METRICS
from hf_cifar.config.model import ModelConfig
from hf_cifar.config.recipes import expand_tokens
from hf_cifar.config.training import LIGHT_CONFIGS, FinetuneOptions
from hf_cifar.errors import UserError
from hf_cifar.text import one_line

# A token must never reach a file; the others say where a run runs, not what it computes.
UNSAVED = {
    "hub_token", "resume_from_checkpoint", "local_rank", "disable_tqdm", "label_names", "do_eval",
    "dataloader_pin_memory", "remove_unused_columns", "seeds",
}  # fmt: skip


@dataclass
class FinetuneConfig(FinetuneOptions, TrainingArguments):
    """transformers' TrainingArguments with defaults that suit fine-tuning an image classifier."""

    _argument_group_name = "training"

    learning_rate: float | None = option(
        None, "Peak learning rate; if not given, the model family's default, scaled to the batch."
    )
    max_grad_norm: float | None = option(
        None, "Norm to which gradients are clipped, 0 for none; if not given, the family's default."
    )
    weight_decay: float = option(0.05, "Weight decay of weight matrices and kernels alone.")
    label_smoothing_factor: float = option(0.1, "Label smoothing of the training loss alone.")
    per_device_train_batch_size: int = option(32, "Training images per step and process.")
    per_device_eval_batch_size: int = option(128, "Evaluation images per step and process.")
    warmup_steps: float = option(0.1, "Warm-up, in steps, or as a share of all steps if below 1.")
    lr_scheduler_type: str = option("linear", "Learning rate schedule, after the warm-up.")
    eval_strategy: str = option("epoch", "When to evaluate on validation: no, steps or epoch.")
    save_strategy: str = option("epoch", "When to save a checkpoint: no, steps, epoch or best.")
    save_total_limit: int | None = option(2, "Checkpoints kept; the best one is always among them.")
    load_best_model_at_end: bool = option(
        True, "End with the checkpoint that did best on validation."
    )
    metric_for_best_model: str | None = option(
        None,
        "Validation metric that says which is best; if not given, accuracy, or average_precision_macro (mAP) "
        "of multi-label data.",
    )
    logging_steps: float = option(50, "Log the training loss every this many steps.")
    logging_nan_inf_filter: bool = option(False, "Hide NaN and infinite losses from the log.")
    remove_unused_columns: bool = option(
        False, "Not used here: batches hold only what the model needs."
    )
    dataloader_num_workers: int | None = option(
        None, "Loader processes; if not given, 0 for images held in memory, else one per core."
    )
    hub_private_repo: bool = option(True, "With --push_to_hub: make a new repository private.")

    def __post_init__(self) -> None:
        self._check()
        if self.eval_strategy == "no":
            # Without evaluations there is no best checkpoint; the last weights are the result.
            self.load_best_model_at_end = False
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()  # bars for people, lines for logs
        self.label_names = ["labels"]
        self.use_cpu = on_cpu(self.use_cpu)
        for name in ("bf16", "fp16"):
            if getattr(self, name):
                # The parent would ask for a GPU, or --use_cpu; bfloat16 runs on a CPU as well.
                self.precision = name
                setattr(self, name, False)
        # What is to be resolved with the data must not reach the parent as None: it compares the number of
        # workers, and puts a metric of its own in place of none.
        num_workers, self.dataloader_num_workers = self.dataloader_num_workers, 0
        metric, self.metric_for_best_model = self.metric_for_best_model, "unresolved"
        super().__post_init__()
        self.dataloader_num_workers, self.metric_for_best_model = num_workers, metric
        # The launcher names a precision too; the options go before it.
        if self.precision == "auto" and self.mixed_precision != "no":
            self.precision = self.mixed_precision
        if self.precision != "auto":
            self.mixed_precision = "no" if self.precision == "fp32" else self.precision

    def _check(self) -> None:
        """Raises: UserError for a value out of range, or an option that would have no effect."""
        for name in BOUNDS:
            check_bounds(name, getattr(self, name))
        for name in WITHOUT_EFFECT:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise UserError(f"--{name} has no effect here; leave it out")
        metric = (self.metric_for_best_model or "accuracy").removeprefix("eval_")
        if metric not in BEST_METRICS:
            raise UserError(
                f"--metric_for_best_model is {metric}; it takes {', '.join(BEST_METRICS)}"
            )
        if self.greater_is_better is None:
            self.greater_is_better = BEST_METRICS[metric]
        for name in ("bf16", "fp16"):
            if getattr(self, name) and self.precision not in ("auto", name):
                raise UserError(
                    f"--{name} and --precision {self.precision} differ; pass one of them"
                )
        if self.early_stopping_patience is not None and self.eval_strategy == "no":
            raise UserError(
                "--early_stopping_patience needs evaluations; leave out --eval_strategy no"
            )


@dataclass(frozen=True)
class RunConfig:
    """All that a fine-tuning run depends on."""

    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: FinetuneConfig = field(default_factory=FinetuneConfig)

    def __post_init__(self) -> None:
        # Made now: once a Trainer is built, new TrainingArguments would reset accelerate's state.
        _default_arguments(self.train.use_cpu)

    @classmethod
    def parse(cls, argv: Sequence[str], prog: str = "hf-cifar finetune") -> RunConfig:
        """Read a command line; `--recipe` and `--config` files come first, flags last, the last one wins.

        Raises: UserError for an unknown option or a bad value.
        """
        classes = [*LIGHT_CONFIGS, FinetuneConfig]
        tokens = expand_tokens(argv)
        check_option_names(tokens, {name for c in classes for name in field_names(c)})
        try:
            *configs, unused = parse_dataclasses(classes, tokens, prog)
        except UserError:
            raise
        except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
            raise UserError(one_line(error)) from None
        if unused:
            raise UserError(f"unexpected argument {unused[0]!r}; options start with --, see --help")
        return cls(*configs)

    @classmethod
    def load(cls, path: str | Path) -> RunConfig:
        """Read what `save` wrote."""
        return cls.parse(["--config", str(path)])

    def options(self) -> dict[str, Any]:
        """Resolved options by name: all of data, augmentation and model, and the training options that
        differ from transformers' own defaults. Never a token."""
        values: dict[str, Any] = {}
        for config in (self.data, self.augment, self.model):
            values |= dataclasses.asdict(config)
        own = {
            f.name
            for f in dataclasses.fields(FinetuneConfig)
            if f.name in FinetuneConfig.__annotations__
        }
        own |= set(field_names(FinetuneOptions)) | {"seed", "num_train_epochs", "optim"}
        reference = _default_arguments(self.train.use_cpu)
        for name in field_names(FinetuneConfig):
            value = getattr(self.train, name)
            if name not in UNSAVED and (name in own or value != getattr(reference, name)):
                values[name] = _plain(value)
        return values

    def save(self, path: str | Path) -> None:
        """Write the resolved options as YAML: `hf-cifar finetune --config FILE` is the same run."""
        Path(path).write_text(yaml.safe_dump(self.options(), sort_keys=False))


def on_cpu(asked: bool) -> bool:
    """Whether to compute on the CPU: where it is asked for, and where there is nothing else.

    TrainingArguments has to be told: without a word, several processes on a CPU would each train alone.
    """
    return asked or not torch.accelerator.is_available()


@functools.lru_cache
def _default_arguments(use_cpu: bool) -> TrainingArguments:
    return TrainingArguments(output_dir="unused", use_cpu=use_cpu)


def _plain(value: Any) -> Any:
    """The value as YAML and a command line can hold it."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    return value

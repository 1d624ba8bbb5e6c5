"""Every option of a run: read from a command line, saved, and read back. Imports no torch."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hf_cifar.config.augmentation import AugmentConfig
from hf_cifar.config.command_line import (
    from_python,
    parse,
    parse_inherited,
    refuse_early,
    require_inherited,
)
from hf_cifar.config.data import DataConfig
from hf_cifar.config.fields import field_names
from hf_cifar.config.model import ModelConfig
from hf_cifar.config.recipes import expand_tokens
from hf_cifar.config.training import WITHOUT_TEACHER, TrainingConfig
from hf_cifar.errors import UserError

CONFIG_FILE = "config.yaml"  # in the folder of a run: its settled options
CONFIGS = (DataConfig, AugmentConfig, ModelConfig, TrainingConfig)


@dataclass(frozen=True)
class RunConfig:
    """All options of a fine-tuning run.

    trainer: options of transformers' TrainingArguments that `TrainingConfig` does not have, by name.
    """

    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainingConfig = field(default_factory=TrainingConfig)
    trainer: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for conflict in conflicts(self):
            raise UserError(f"{conflict}; leave out one of them")

    @classmethod
    def parse(cls, argv: Sequence[str], prog: str = "hf-cifar finetune") -> RunConfig:
        """Read a command line: `--recipe`, then `--config` files, then flags; later values take precedence.

        Imports torch only if there are options of TrainingArguments that are not ours.
        Raises: UserError for an unknown option or a bad value.
        """
        data, augment, model, train, rest = parse(CONFIGS, expand_tokens(argv), prog)
        refuse_early(rest, CONFIGS)
        trainer = parse_inherited(rest, CONFIGS) if rest else {}
        return cls(data, augment, model, train, trainer)

    @classmethod
    def of(cls, **options: Any) -> RunConfig:
        """Make a configuration from options by name; values may be objects, see `with_options`."""
        return cls().with_options(**options)

    def with_options(self, **options: Any) -> RunConfig:
        """Return a copy with these options replaced, ours and those of TrainingArguments, by name.

        Imports torch only if there are options of TrainingArguments that are not ours.
        Raises: UserError for an unknown option or a bad value.
        """
        parts: dict[str, Any] = {
            "data": self.data, "augment": self.augment, "model": self.model, "train": self.train,
        }  # fmt: skip
        rest = dict(options)
        for part, config in parts.items():
            names = [name for name in field_names(type(config)) if name in rest]
            values = {name: from_python(config, name, rest.pop(name)) for name in names}
            parts[part] = dataclasses.replace(config, **values)
        if rest:
            refuse_early([f"--{name}" for name in rest], CONFIGS)
            require_inherited(rest, CONFIGS)
        return RunConfig(**parts, trainer={**self.trainer, **rest})

    @classmethod
    def load(cls, path: str | Path) -> RunConfig:
        """Read a file written by `to_yaml`."""
        return cls.parse(["--config", str(path)])

    def options(self) -> dict[str, Any]:
        """Return all options by name, as in config.yaml: without tokens, unset ones, and options of
        distillation where there is no teacher."""
        values = {
            each.name: getattr(config, each.name)
            for config in (self.data, self.augment, self.model, self.train)
            for each in dataclasses.fields(config)
            if each.metadata.get("saved", True)
        }
        if self.train.teacher is None:
            values = {name: value for name, value in values.items() if name not in WITHOUT_TEACHER}
        values |= self.trainer
        return {name: _plain(value) for name, value in values.items() if value is not None}

    def to_yaml(self) -> str:
        """Return the options as YAML: `hf-cifar finetune --config FILE` is the same run."""
        return yaml.safe_dump(self.options(), sort_keys=False)

    @property
    def computes_features(self) -> bool:
        """True if the options ask for the head alone to train, on features that are computed once."""
        wanted = self.model.freeze == "backbone" and self.train.feature_views > 0
        # A teacher sees images.
        return wanted and not self.data.streaming and self.train.teacher is None

    def with_training(self, **changes: Any) -> RunConfig:
        """Return a copy with these training options replaced."""
        return dataclasses.replace(self, train=dataclasses.replace(self.train, **changes))

    def as_trial(self, output_dir: str) -> RunConfig:
        """Return the options of a training inside the run, in a temporary folder: without evaluation, saving
        and reporting."""
        trial = self.with_training(
            output_dir=output_dir, run_name=None, report_to=None, push_to_hub=False, eval_strategy="no",
            save_strategy="no", load_best_model_at_end=False, early_stopping_patience=None,
        )  # fmt: skip
        return dataclasses.replace(trial, trainer={**self.trainer, "eval_on_start": False})


def split_options(classes: Sequence[type], argv: Sequence[str], prog: str) -> tuple[Any, ...]:
    """Read a command's own options from a command line whose other options are those of finetune: an instance
    of each class, and the command line without them, with recipes and config files written out.

    Raises: UserError for a misspelled option of the classes.
    """
    *own, rest = parse(classes, expand_tokens(argv), prog)
    refuse_early(rest, classes)
    return (*own, rest)


def conflicts(config: RunConfig) -> Iterator[str]:
    """Yield a message for each option that has no effect, or does not work, with another one."""
    train, model, augment = config.train, config.model, config.augment
    if train.backbone_learning_rate is not None and model.freeze in ("backbone", "0"):
        yield f"--backbone_learning_rate has no effect with --freeze {model.freeze}"
    if train.layer_decay != 1 and model.freeze == "backbone":
        yield "--layer_decay has no effect with --freeze backbone"
    if train.unfreeze_epochs:
        if model.freeze != "none":
            yield f"--unfreeze_epochs and --freeze {model.freeze} both set what is frozen"
        if train.torch_compile:
            yield "--unfreeze_epochs would recompile the model for each block with --torch_compile"
        if config.trainer.get("ddp_find_unused_parameters") is False:
            yield "--unfreeze_epochs cannot be combined with --ddp_find_unused_parameters false"
    if train.reject is not None and config.data.streaming:
        yield "--reject reads training images again after training, and --streaming does not keep them"
    if train.teacher is not None and train.head_solver == "lbfgs":
        yield "--teacher has no effect with --head_solver lbfgs"
    if train.head_solver == "lbfgs":
        for name in ("sam_rho", "ema_decay", "l1_decay", "early_stopping_patience"):
            if getattr(train, name):
                yield f"--{name} has no effect with --head_solver lbfgs"
    if config.computes_features and not (augment.mixup_alpha or augment.cutmix_alpha):
        for name in ("dropout", "drop_path"):
            if getattr(model, name):
                yield f"--{name} has no effect with --freeze backbone and without --feature_views 0"
    if "lomo" in train.optim or train.optim.endswith("layerwise"):
        for name in ("backbone_learning_rate", "unfreeze_epochs", "sam_rho"):
            if getattr(train, name):
                yield f"--{name} does not work with --optim {train.optim}, which has no gradients to keep"


def is_run_config(path: str | Path) -> bool:
    """Return True for a file that `to_yaml` wrote."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return text.startswith("dataset_name:") and "\noutput_dir:" in text


def _plain(value: Any) -> Any:
    """Return the value in a form that YAML and a command line can represent."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, str):
        return str(value)  # of an object in memory, its name
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value):
        return {
            each.name: _plain(getattr(value, each.name))
            for each in dataclasses.fields(value)
            if each.init
        }
    return value

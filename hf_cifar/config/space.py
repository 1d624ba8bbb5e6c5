"""The space of a search: options with a range or a list of choices. Imports no torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from hf_cifar.config.command_line import names_of
from hf_cifar.config.data import DataConfig
from hf_cifar.config.fields import NumberOr, field_types
from hf_cifar.config.model import SCRATCH
from hf_cifar.config.run import CONFIGS, RunConfig
from hf_cifar.config.training import TrainingConfig
from hf_cifar.errors import UserError
from hf_cifar.text import nearest_hint, one_line

KEYS = ("low", "high", "log")
# Options that say how a trial is evaluated, or where it is written; those of the data are shared too.
SHARED = (
    "seed", "seeds", "metric_for_best_model", "greater_is_better", "do_predict", "check_leakage",
    "resume_from_checkpoint", "trust_remote_code",
)  # fmt: skip


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included. log: uniform in the logarithm. whole: integers only."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    @property
    def examples(self) -> tuple[Any, ...]:
        return self.low, self.high

    @property
    def plain(self) -> dict[str, Any]:
        """The range as in a file."""
        return {"low": self.low, "high": self.high} | ({"log": True} if self.log else {})

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}{' (log)' if self.log else ''}"


@dataclass(frozen=True)
class Choices:
    """A list of words, numbers, booleans, or None for an option's default."""

    values: tuple[Any, ...]

    @property
    def examples(self) -> tuple[Any, ...]:
        return self.values

    @property
    def plain(self) -> list[Any]:
        """The choices as in a file."""
        return list(self.values)

    def __str__(self) -> str:
        return " | ".join(map(render_choice, self.values))


Space = Mapping[str, Range | Choices]

WEIGHT_DECAY, SMOOTHING = Range(1e-3, 0.3, log=True), Range(0.0, 0.2)
WHOLE_NETWORK: Space = {
    "weight_decay": WEIGHT_DECAY,
    "label_smoothing_factor": SMOOTHING,
    "mixup_alpha": Choices((0.0, 0.2)),
    "lr_scheduler_type": Choices(("linear", "cosine")),
}
# The default rates of training/optimizers.py are in the middle of each range.
SPACES: dict[str, Space] = {
    "a pretrained network": {"learning_rate": Range(1e-5, 2e-3, log=True), **WHOLE_NETWORK},
    "adapters": {"learning_rate": Range(3e-4, 3e-2, log=True), **WHOLE_NETWORK},
    "a head on a frozen backbone": {
        "learning_rate": Range(1e-4, 1e-2, log=True),
        "weight_decay": WEIGHT_DECAY,
        "label_smoothing_factor": SMOOTHING,
    },
    "random weights": {"learning_rate": Range(3e-4, 2e-2, log=True), **WHOLE_NETWORK},
}


def space_of(path: str | None, config: RunConfig) -> Space:
    """Return the space of a file, or the default one, checked against the options of the run.

    Raises: UserError that names the file and the option.
    """
    found, where = (
        (default_space(config), "the default space") if path is None else (read_space(path), path)
    )
    try:
        space = {name: checked(name, given, config) for name, given in found.items()}
        check_pairs(space, config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return space


def default_space(config: RunConfig) -> dict[str, Any]:
    """Return the default space of a kind of training. Raises: UserError if there is none."""
    model, train = config.model, config.train
    if train.head_solver == "lbfgs":
        raise UserError("--head_solver lbfgs has no default space; pass --space FILE.yaml")
    if not train.optim.startswith("adamw"):
        raise UserError(f"--optim {train.optim} has no default space; pass --space FILE.yaml")
    kind = "a pretrained network"
    if model.lora_rank:
        kind = "adapters"
    elif model.freeze == "backbone":
        kind = "a head on a frozen backbone"
    elif model.model_name_or_path.startswith(SCRATCH):
        kind = "random weights"
    return {name: each.plain for name, each in SPACES[kind].items()}


def read_space(path: str) -> dict[str, Any]:
    """Read a file that maps options to ranges and lists. Raises: UserError for anything else."""
    if not Path(path).is_file():
        raise UserError(f"--space: no file {path}")
    try:
        found = yaml.safe_load(Path(path).read_bytes())
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {one_line(error)}") from None
    if not isinstance(found, dict) or not found:
        raise UserError(f"{path} must map options to ranges {{low: X, high: X}} or lists")
    return {str(name).removeprefix("--").replace("-", "_"): each for name, each in found.items()}


def checked(name: str, given: Any, config: RunConfig) -> Range | Choices:
    """Return a range or choices with values of the option's type. Raises: UserError."""
    output = [each.name for each in fields(TrainingConfig) if not each.metadata.get("public", True)]
    if name in (*SHARED, *output, *names_of([DataConfig])) or name.startswith(("hub_", "push_")):
        raise UserError(f"{name} cannot be searched: all trials share it")
    if isinstance(given, dict):
        return checked_range(name, given, config)
    if not isinstance(given, list) or len(given) < 2:
        raise UserError(
            f"{name} takes a range {{low: X, high: X}} or a list of at least two choices, not {given!r}"
        )
    values = tuple(value_of(config.with_options(**{name: each}), name) for each in given)
    if bad := [each for each in values if not isinstance(each, (str, int, float, type(None)))]:
        raise UserError(f"{name}: {bad[0]!r} is not a word or a number, so it cannot be a choice")
    if len(set(map(str, values))) < len(values):
        raise UserError(f"{name} has the same choice twice")
    return Choices(values)


def checked_range(name: str, given: dict[str, Any], config: RunConfig) -> Range:
    """Return a range of numbers that the option takes. Raises: UserError."""
    for key in given:
        if key not in KEYS:
            raise UserError(
                f"{name} has an unknown key {key!r}{nearest_hint(str(key), KEYS)}; a range has "
                f"{', '.join(KEYS)}"
            )
    if not {"low", "high"} <= given.keys():
        raise UserError(f"{name} has no {'low' if 'low' not in given else 'high'}")
    log = given.get("log", False)
    if not isinstance(log, bool):
        raise UserError(f"{name}: log is true or false, not {log!r}")
    low, high = (number(name, given[key]) for key in ("low", "high"))
    kinds = {key: kind for each in CONFIGS for key, kind in field_types(each).items()}
    kind = kinds.get(name, int if isinstance(low, int) and isinstance(high, int) else float)
    kind = kind.number if isinstance(kind, NumberOr) else kind
    if kind not in (int, float):
        raise UserError(f"{name} does not take a number; give a list of choices")
    low, high = (value_of(config.with_options(**{name: end}), name) for end in (low, high))
    if not low < high:
        raise UserError(f"{name}: low is {low:g} and high is {high:g}; low must be below high")
    if log and low <= 0:
        raise UserError(f"{name}: low is {low:g}; with log: true it must be above 0")
    return Range(low, high, log, whole=kind is int)


def number(name: str, value: Any) -> float:
    """Return an end of a range; YAML reads 1e-4 as a word. Raises: UserError unless it is a number."""
    try:
        found = float(value) if isinstance(value, str) else value
    except ValueError:
        found = None
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found):
        raise UserError(f"{name}: {value!r} is not a number")
    return found


def value_of(config: RunConfig, name: str) -> Any:
    """Return the value of an option, ours or of TrainingArguments."""
    for part in (config.data, config.augment, config.model, config.train):
        if name in vars(part):
            return getattr(part, name)
    return config.trainer[name]


def check_pairs(space: Space, config: RunConfig) -> None:
    """Raises: UserError for two options with values that exclude each other."""
    for (first, one), (second, other) in itertools.combinations(space.items(), 2):
        for value, another in itertools.product(one.examples, other.examples):
            config.with_options(**{first: value, second: another})


def render_choice(value: Any) -> str:
    """Format a value of an option for people."""
    if value is None:
        return "default"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)

"""How a command line is read and checked. Imports no torch."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from hf_cifar.config.data import DataConfig
from hf_cifar.config.fields import BEST_METRICS, WITHOUT_EFFECT, check_bounds, field_names
from hf_cifar.config.recipes import yaml_tokens
from hf_cifar.config.training import LIGHT_CONFIGS, FinetuneOptions
from hf_cifar.errors import UserError
from hf_cifar.text import nearest_hint

CONFIG_FILE = "config.yaml"  # the resolved options in a run's folder
RUN_FILE = "run.json"  # what happened in it
METRICS_FILE = "metrics.json"  # the figures of its splits


def refuse_occupied(folder: Path) -> None:
    """Raises: UserError if an output folder holds a run, finished or not, or is a file."""
    if folder.is_file():
        raise UserError(f"--output_dir {folder} is a file; pass a folder")
    if (folder / "config.json").exists() or any(folder.glob("checkpoint-*")):
        raise UserError(
            f"{folder} holds another run; pass another --output_dir, or --resume_from_checkpoint last"
        )
    if (folder / CONFIG_FILE).exists():
        raise UserError(
            f"{folder} holds another run, which saved no checkpoint; pass another --output_dir, or remove it"
        )
    if any(folder.glob(f"seed-*/{CONFIG_FILE}")):
        raise UserError(
            f"{folder} holds runs with --seeds; pass another --output_dir, or go on with the same --seeds "
            "and --resume_from_checkpoint last"
        )


# Words for true and false.
TRUTH = ("true", "false", "yes", "no", "t", "f", "y", "n", "1", "0")
# What may differ when a run goes on: how long, where, what is shown and kept. All else is the run itself.
MAY_CHANGE = re.compile(
    r"num_train_epochs|max_steps|output_dir|resume_.*|early_stopping_.*|(eval|save|logging|log|hub|dataloader)_.*|"
    r"do_.*|check_leakage|push_to_hub|load_best_.*|metric_.*|greater_.*|report_to|run_name|disable_tqdm|use_cpu|"
    r"trust_remote_code|per_device_eval_.*|pixel_store|precision|memory_format|attention|torch_compile.*|bf16|fp16|tf32"
)


def check_same_run(folder: Path, options: dict[str, Any]) -> list[str]:
    """Before a run goes on: the options that make it what it is must be those of its config.yaml.

    options: by name; None stands for a default. Returns what else differs, as `--NAME NEW, which was OLD`.
    Raises: UserError for the first that may not differ.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        return []
    changes = []
    # What a config.yaml does not name had its default.
    defaults = {
        f.name: f.default for c in (*LIGHT_CONFIGS, FinetuneOptions) for f in dataclasses.fields(c)
    }
    saved = yaml.safe_load(path.read_text()) or {}
    for name, value in options.items():
        before = saved.get(name, defaults.get(name, "its default"))
        # The order of a stream depends on how many workers share its shards.
        fixed = name == "dataloader_num_workers" and options.get("streaming")
        if value in (None, before):
            continue
        if fixed or not MAY_CHANGE.fullmatch(name):
            raise UserError(
                f"--resume_from_checkpoint: --{name} is {value}, but the run in {folder} began with "
                f"{before}; go on with --config {path}, or start anew in another --output_dir"
            )
        changes.append(f"--{name} {value}, which was {before}")
    return changes


def run_to_resume(output_dir: str, resume_from_checkpoint: str | None) -> Path | None:
    """The folder of the run that is to go on, or None for a new one."""
    value = resume_from_checkpoint
    if value is None or value.lower() in ("false", "no"):
        return None
    if value.lower() in ("true", "last", "latest"):
        return Path(output_dir)
    return Path(value).parent


def run_data_tokens(folder: Path) -> list[str]:
    """The data options of a run's config.yaml, as tokens; none without the file."""
    path, names = folder / CONFIG_FILE, field_names(DataConfig)
    if not path.is_file():
        return []
    tokens, kept = yaml_tokens(path.read_bytes(), str(path)), False
    chosen = []
    for token in tokens:  # an option, then its values
        if token.startswith("--"):
            kept = token[2:] in names
        if kept:
            chosen.append(token)
    return chosen


def run_data(folder: Path) -> DataConfig:
    """The data of a run. Raises: UserError if the folder has no config.yaml."""
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{folder} has no {CONFIG_FILE} that names its data")
    data, *_ = parse_dataclasses([DataConfig], run_data_tokens(folder), "hf-cifar", add_help=False)
    return data


@functools.cache
def trainer_options() -> dict[str, str | tuple[str, ...]]:
    """Options of transformers' TrainingArguments: each with its type, or with the words that it takes.

    Read from the source, because importing it would import torch.
    """
    folder = Path(importlib.util.find_spec("transformers").origin).parent
    files = [folder / "trainer_utils.py", folder / "training_args.py"]
    nodes = [node for path in files for node in ast.parse(path.read_text()).body]
    classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
    options: dict[str, str | tuple[str, ...]] = {}
    for field_ in classes["TrainingArguments"].body:
        if isinstance(field_, ast.AnnAssign) and not field_.target.id.startswith("_"):
            kind = ast.unparse(field_.annotation)
            enumeration = classes.get(kind.removesuffix(" | str"))
            options[field_.target.id] = _words(enumeration) if enumeration else kind
    return options


def _words(enumeration: ast.ClassDef) -> tuple[str, ...]:
    """The values of an enumeration's members."""
    return tuple(
        ast.literal_eval(item.value) for item in enumeration.body if isinstance(item, ast.Assign)
    )


def check_values(tokens: Sequence[str], options: dict[str, str | tuple[str, ...]]) -> None:
    """Find a mistake in a training option before it is parsed, which takes torch.

    Raises: UserError for the first value that is no number, out of range, or no word that its option
    takes, and for an option that would have no effect.
    """
    options = {
        **options,
        "metric_for_best_model": (*BEST_METRICS, *(f"eval_{m}" for m in BEST_METRICS)),
    }
    for token, following in zip(tokens, [*tokens[1:], ""], strict=False):
        flag, has_value, value = token.partition("=")
        name = flag[2:].replace("-", "_") if flag.startswith("--") else ""
        kind = options.get(name)
        value = value if has_value else following
        if name in WITHOUT_EFFECT and (name, value) != ("remove_unused_columns", "false"):
            raise UserError(f"--{name} has no effect here; leave it out")
        if isinstance(kind, tuple) and value not in kind:
            hint = nearest_hint(value, kind) or f"; it takes {', '.join(kind[:8])}"
            raise UserError(f"{flag} does not take {value!r}{hint}")
        if kind in ("int", "float", "int | None", "float | None"):
            try:
                check_bounds(name, (int if kind.startswith("int") else float)(value))
            except UserError:
                raise
            except ValueError:
                number = "a whole number" if kind.startswith("int") else "a number"
                raise UserError(f"{flag} takes {number}, not {value!r}") from None
        if "dict" in str(kind) and value.startswith("{"):
            try:
                json.loads(value)
            except ValueError as error:
                raise UserError(f"{flag} takes JSON, and {value!r} is none: {error}") from None


def check_words(tokens: Iterable[str], kinds: dict[str, str | tuple[str, ...]]) -> None:
    """Raises: UserError for a word that no option takes.

    kinds: each option's type, or the words that it takes.
    """
    flag, kind, num_left = "", "", 0
    for token in tokens:
        if token.startswith("--"):
            flag, has_value, value = token.partition("=")
            kind = str(kinds.get(flag[2:].replace("-", "_"), "nothing"))  # as --no_calibrate
            num_left = 0 if kind == "nothing" else math.inf if "list" in kind else 1
        else:
            has_value, value = "=", token
        if not has_value:
            continue
        if num_left == 0:
            raise UserError(f"unexpected argument {value!r}; options start with --, see --help")
        if kind == "bool" and value.lower() not in TRUTH:
            raise UserError(f"{flag} takes true or false, not {value!r}")
        num_left -= 1


def check_option_names(tokens: Iterable[str], known: Iterable[str]) -> None:
    """Raises: UserError that names the nearest option for the first unknown one."""
    known = set(known)
    for token in tokens:
        flag = token.partition("=")[0]
        name = flag[2:].replace("-", "_")
        if flag.startswith("--") and name not in known and name.removeprefix("no_") not in known:
            raise UserError(f"no option {flag}{nearest_hint(name, known, '--')}; see --help")


@functools.cache
def _argument_parser() -> type:
    """transformers' HfArgumentParser. Its file needs no other, and the package takes seconds."""
    path = Path(importlib.util.find_spec("transformers").origin).with_name("hf_argparser.py")
    spec = importlib.util.spec_from_file_location("hf_argparser", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.HfArgumentParser


def parse_dataclasses(
    classes: Sequence[type], tokens: Sequence[str], prog: str, **parser_options: Any
):
    """Build one instance of each dataclass from command line tokens; also returns what is left over.

    Raises: UserError for a missing or malformed value.
    """
    parser = _argument_parser()(list(classes), prog=prog, allow_abbrev=False, **parser_options)

    def fail(message: str) -> None:
        raise UserError(message)

    parser.error = fail
    return parser.parse_args_into_dataclasses(
        _explicit_flags(classes, tokens), return_remaining_strings=True, look_for_args_file=False
    )


def _explicit_flags(classes: Sequence[type], tokens: Sequence[str]) -> list[str]:
    """Write a bare `--flag` as `--flag true`: the parser would take a file name behind it for its value."""
    hints = {name: hint for c in classes for name, hint in get_type_hints(c).items()}
    explicit = []
    for token, following in zip(tokens, [*tokens[1:], ""], strict=False):
        explicit.append(token)
        is_flag = token.startswith("--") and hints.get(token[2:].replace("-", "_")) is bool
        if is_flag and following.lower() not in TRUTH:
            explicit.append("true")
    return explicit

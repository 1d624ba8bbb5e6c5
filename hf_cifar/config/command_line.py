"""How a command line is read and checked. Imports no torch."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from hf_cifar.config.fields import WITHOUT_EFFECT, check_bounds
from hf_cifar.config.metrics import BEST_METRICS
from hf_cifar.errors import UserError
from hf_cifar.text import nearest_hint

# Words for true and false.
TRUTH = ("true", "false", "yes", "no", "t", "f", "y", "n", "1", "0")


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

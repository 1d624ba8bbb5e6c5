"""Read a command line into configurations. Imports no torch.

argparse splits the tokens and prints the help; values are converted by the fields' types. Other options are
left over; they may belong to transformers' TrainingArguments, see `parse_inherited`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import numbers
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from hf_cifar.config.fields import NumberOr, field_names, field_types
from hf_cifar.config.other_tools import instead
from hf_cifar.errors import UserError
from hf_cifar.text import nearest, nearest_hint, one_line

TRUE, FALSE = ("true", "yes", "t", "y", "1"), ("false", "no", "f", "n", "0")
# Options of TrainingArguments without effect here: the model always trains, hub/push.py pushes once, and
# batches contain only the model's inputs.
WITHOUT_EFFECT = (
    "do_train", "do_eval", "hub_strategy", "hub_always_push", "remove_unused_columns", "label_names",
)  # fmt: skip
# Similarity above which an unknown option is a misspelled one of ours; those of TrainingArguments are below.
MISSPELLED = 0.85


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors."""

    def error(self, message: str) -> NoReturn:
        """Raises: UserError, in one line."""
        name, _, problem = one_line(message).removeprefix("argument ").partition(": ")
        if problem.startswith("expected"):
            raise UserError(f"{name} needs a value; see --help")
        raise UserError(f"{one_line(message)}; see --help")


def parse(
    classes: Sequence[type],
    tokens: Sequence[str],
    prog: str,
    *,
    usage: str | None = None,
    description: str | None = None,
    paths_follow: bool = False,
) -> tuple[Any, ...]:
    """Build one instance of each dataclass from command line tokens; the last item has the tokens left over.

    paths_follow: a word after a bare `--flag` may be a file. `--help` prints the options and exits.
    Raises: UserError for a missing, malformed or impossible value.
    """
    parser = build_parser(classes, prog, usage, description)
    if wants_help(tokens):
        print(parser.format_help())
        raise SystemExit(0)
    kinds = {name: kind for each in classes for name, kind in field_types(each).items()}
    namespace, rest = parser.parse_known_args(
        explicit_flags(tokens, bare_values(classes), paths_follow)
    )
    given = vars(namespace)
    configs = [
        each(**{
            field.name: convert(field, given[field.name], kinds[field.name])
            for field in dataclasses.fields(each)
            if field.name in given
        })
        for each in classes
    ]  # fmt: skip
    return (*configs, rest)


def wants_help(tokens: Sequence[str]) -> bool:
    """Return True if a command line requests help."""
    return "-h" in tokens or "--help" in tokens


def refuse_options(rest: Sequence[str], classes: Sequence[type]) -> None:
    """Raises: UserError for an unknown option among the tokens left over by `parse`; says what to pass
    instead, or names the nearest."""
    known = names_of(classes)
    refuse_names_of_other_tools(rest, known)
    for token in rest:
        if token.startswith("--"):
            raise unknown_option(token, known)


def refuse_early(rest: Sequence[str], classes: Sequence[type]) -> None:
    """Raises: UserError for a misspelled option of ours among the tokens left over by `parse`, one of
    another tool, or one without effect. Other mistakes show when transformers' options are read, which takes
    seconds."""
    known = names_of(classes)
    refuse_names_of_other_tools(rest)
    for token in rest:
        name = token[2:].partition("=")[0] if token.startswith("--") else ""
        if name.removeprefix("no_") in WITHOUT_EFFECT:
            raise UserError(f"--{name} has no effect here; leave it out")
        if name and nearest(name, known, MISSPELLED):
            raise unknown_option(token, known)


def refuse_names_of_other_tools(rest: Sequence[str], known: Sequence[str] | None = None) -> None:
    """Raises: UserError that says, for all options of other tools at once, what to pass instead.

    known: the options of the command; None for finetune. `-b 64` is understood too, and in finetune, where
    no file names follow, `batch=64`.
    """
    found = {}
    for before, token in zip(["", *rest], rest, strict=False):
        flag, equals, _ = token.partition("=")
        is_word = not flag.startswith("-")
        if is_word and (not equals or before.startswith("-") or known is not None):
            continue
        if advice := instead(flag.lstrip("-+"), known):
            found[flag] = advice
    if found:
        advice = "; ".join(f"{flag}: {advice}" for flag, advice in found.items())
        raise UserError(f"unknown option{'s' * (len(found) > 1)} {advice}")


def names_of(classes: Sequence[type]) -> list[str]:
    """Return the names of the options that the dataclasses declare."""
    return [name for each in classes for name in field_names(each)]


def unexpected_argument(token: str) -> UserError:
    """Return the error for a word that belongs to no option."""
    if (Path(token) / "config.json").is_file():
        return UserError(
            f"unexpected argument {token!r}; pass a model as --model_name_or_path {token}"
        )
    if Path(token).is_dir():
        return UserError(
            f"unexpected argument {token!r}; pass a folder of images as --dataset_name {token}"
        )
    return UserError(f"unexpected argument {token!r}; options start with --, see --help")


def unknown_option(token: str, known: Iterable[str]) -> UserError:
    """Return the error for an option that does not exist."""
    flag = token.partition("=")[0]
    return UserError(f"unknown option {flag}{nearest_hint(flag[2:], known, '--')}; see --help")


def build_parser(
    classes: Sequence[Any], prog: str, usage: str | None = None, description: str | None = None
) -> Parser:
    """Return the parser of the options that the dataclasses declare, in the groups that their fields name."""
    parser = Parser(
        prog=prog, usage=usage or f"{prog} [options]", description=description,
        allow_abbrev=False, add_help=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=118),
    )  # fmt: skip
    for each in classes:
        group = parser.add_argument_group(each._argument_group_name)
        kinds = field_types(each)
        for field in dataclasses.fields(each):
            if field.metadata.get("group"):
                group = parser.add_argument_group(field.metadata["group"])
            group.add_argument(
                f"--{field.name}",
                metavar=metavar(kinds[field.name]),
                nargs="+" if get_origin(kinds[field.name]) is list else None,
                help=help_text(field),
            )
            if kinds[field.name] is bool:
                group.add_argument(
                    f"--no_{field.name}", dest=field.name, action="store_const", const="false",
                    help=argparse.SUPPRESS,
                )  # fmt: skip
    return parser


def metavar(kind: Any) -> str:
    """Return the placeholder of an option's value in the help: its choices, or its type."""
    if get_origin(kind) is Literal:
        choices = [str(choice) for choice in get_args(kind)]
        return "{" + ",".join(choices) + "}" if len(",".join(choices)) < 40 else "NAME"
    if get_origin(kind) is list:
        (item,) = get_args(kind)
        return "NAME" if item is str else metavar(item)
    if isinstance(kind, NumberOr):
        return "|".join([metavar(kind.number), *kind.words])
    return {bool: "BOOL", int: "N", float: "X", str: "TEXT"}.get(kind, "JSON")


def help_text(field: dataclasses.Field) -> str:
    """Return an option's help with its default."""
    default = render_default(field.default)
    text = field.metadata["help"].removesuffix(".").replace("%", "%%")
    return f"{text} ({default})" if default else text


def render_default(value: Any) -> str:
    """Return a default as a user would type it; empty for None and an empty string."""
    if value is None or value == "":
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def bare_values(classes: Sequence[Any]) -> dict[str, str]:
    """Return the values of the options that may be given without one: true, or what the field says."""
    found: dict[str, str] = {}
    for each in classes:
        kinds = field_types(each)
        for field in dataclasses.fields(each):
            value = "true" if kinds[field.name] is bool else field.metadata.get("bare")
            found |= {field.name: value} if value else {}
    return found


def explicit_flags(
    tokens: Sequence[str], bare: dict[str, str], paths_follow: bool = False
) -> list[str]:
    """Write a bare `--flag` with its value, names with underscores, and `--flag -1,2` with an equals sign,
    because argparse would take -1,2 for an option. bare: the values. paths_follow: see `parse`."""
    explicit: list[str] = []
    for token, following in zip(tokens, [*tokens[1:], "--"], strict=False):
        if explicit and re.match(r"-[\d.]", token) and re.fullmatch(r"--\w+", explicit[-1]):
            explicit[-1] += f"={token}"
            continue
        if not token.startswith("--"):
            explicit.append(token)
            continue
        flag, equals, value = token.partition("=")
        flag = f"--{flag[2:].replace('-', '_')}"
        explicit.append(f"{flag}{equals}{value}")
        has_value = equals or not following.startswith("--")
        if paths_follow and not equals:
            has_value = following.lower() in TRUE + FALSE
        if flag[2:] in bare and not has_value:
            explicit.append(bare[flag[2:]])
    return explicit


def convert(field: dataclasses.Field, words: str | list[str], kind: Any) -> Any:
    """Return an option's value, converted from its words. Its class checks bounds and choices.

    Raises: UserError for words of another type.
    """
    flag = f"--{field.name}"
    if get_origin(kind) is list:
        (item,) = get_args(kind)
        return [convert(field, word, item) for word in words]
    word = str(words)
    if get_origin(kind) is dict:
        return parse_json(flag, word)
    if kind is bool:
        if word.lower() not in TRUE + FALSE:
            raise UserError(f"{flag} takes true or false, not {word!r}")
        return word.lower() in TRUE
    if isinstance(kind, NumberOr):
        return word if word in kind.words else parse_number(flag, word, kind.number, kind.words)
    return parse_number(flag, word, kind) if kind in (int, float) else word


def from_python(config: Any, name: str, value: Any) -> Any:
    """Return a value for an option of a config object; a number may be given as text, a list as a tuple.

    Raises: UserError for a value of another type.
    """
    kind = field_types(type(config))[name]
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if get_origin(kind) is list and isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, str) and kind is not str and get_origin(kind) is not Literal:
        (field,) = (each for each in dataclasses.fields(config) if each.name == name)
        return convert(field, [value] if get_origin(kind) is list else value, kind)
    words = kind.words if isinstance(kind, NumberOr) else ()
    kind = kind.number if isinstance(kind, NumberOr) else kind
    if value is not None and kind in (int, float):
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not is_number or (kind is int and value != int(value)):
            raise UserError(f"--{name} takes {number_or(kind, words)}, not {value!r}")
        return kind(value)
    if kind is bool and value not in (None, True, False):
        raise UserError(f"--{name} takes True or False, not {value!r}")
    return value


def parse_number(flag: str, word: str, kind: type, words: Sequence[str] = ()) -> float:
    """Convert a word to a number. words: others that the option takes. Raises: UserError for a word
    that is not a number."""
    try:
        return kind(word)
    except ValueError:
        raise UserError(f"{flag} takes {number_or(kind, words)}, not {word!r}") from None


def number_or(kind: type, words: Sequence[str]) -> str:
    """Describe what an option takes: a number, or one of some words."""
    return " or ".join(["a whole number" if kind is int else "a number", *words])


def parse_json(flag: str, word: str) -> dict[str, Any]:
    """Raises: UserError for a word that is not a JSON object."""
    try:
        value = json.loads(word)
    except ValueError as error:
        raise UserError(f"{flag} takes a JSON object, not {word!r}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{flag} takes a JSON object, not {word!r}")
    return value


def require_inherited(names: Iterable[str], ours: Sequence[type]) -> None:
    """Imports torch. Raises: UserError for a name that is not an option of TrainingArguments."""
    from transformers import TrainingArguments

    theirs = [each.name for each in dataclasses.fields(TrainingArguments)]
    for name in names:
        if name not in theirs:
            raise unknown_option(f"--{name}", [*theirs, *names_of(ours)])


def parse_inherited(tokens: Sequence[str], ours: Sequence[type]) -> dict[str, Any]:
    """Return the values by name of the TrainingArguments options that `parse` left over.

    Imports torch. ours: the classes to suggest options from, in place of an unknown one.
    Raises: UserError for an unknown option or a bad value.
    """
    if not tokens[0].startswith("--"):
        raise unexpected_argument(tokens[0])
    from transformers import TrainingArguments

    parser = inherited_parser(ours)
    theirs = {each.name for each in dataclasses.fields(TrainingArguments)}
    known = [*theirs, *names_of(ours)]
    flags = [token.partition("=")[0][2:] for token in tokens if token.startswith("--")]
    for flag in flags:
        if flag not in theirs and flag.removeprefix("no_") not in theirs:
            raise unknown_option(f"--{flag}", known)
    namespace, rest = parser.parse_known_args(tokens)
    if rest and rest[0].startswith("--"):
        raise unknown_option(rest[0], known)
    if rest:
        raise unexpected_argument(rest[0])
    given = {flag if flag in theirs else flag.removeprefix("no_") for flag in flags}
    return {name: value for name, value in vars(namespace).items() if name in given}


def inherited_parser(ours: Sequence[type]) -> argparse.ArgumentParser:
    """Return transformers' parser of the TrainingArguments that are not options of `ours`; imports torch."""
    from transformers import HfArgumentParser, TrainingArguments

    left_out = {*names_of(ours), *WITHOUT_EFFECT}
    kinds = get_type_hints(TrainingArguments)
    rest = [
        (
            each.name,
            kinds[each.name],
            dataclasses.field(default_factory=each.default_factory, metadata=each.metadata)
            if each.default_factory is not dataclasses.MISSING
            else dataclasses.field(default=each.default, metadata=each.metadata),
        )
        for each in dataclasses.fields(TrainingArguments)
        if each.init and each.name not in left_out
    ]
    inherited = dataclasses.make_dataclass("TrainingArguments", rest)
    parser = HfArgumentParser(inherited, allow_abbrev=False, add_help=False)

    def fail(message: str) -> NoReturn:
        raise UserError(
            f"{one_line(message).removeprefix('argument ').rstrip('.')}; see --help_all"
        )

    parser.error = fail
    return parser

"""Options as dataclass fields: default, help, bounds, and whether they may change on resume."""

from __future__ import annotations

import dataclasses
import types
from dataclasses import Field, field
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from hf_cifar.errors import UserError
from hf_cifar.text import listed, nearest_hint


def option(
    default: Any,
    text: str,
    *,
    low: float | None = None,
    high: float | None = None,
    group: str | None = None,
    may_change: bool = False,
    saved: bool = True,
    public: bool = True,
    bare: str | None = None,
) -> Any:
    """Declare an option: a dataclass field with its metadata.

    text: shown in `--help` and docs/options.md. low, high: inclusive bounds of a number. group: heading in
    `--help` from this option on; the class's name if none was given. may_change: a resumed run may change it.
    saved: config.yaml records it; not for secrets and options that do not affect the run. public: a model
    card may show it. bare: the value of the flag when it is given without one; true for a BOOL.
    """
    metadata = {
        "help": text, "low": low, "high": high, "group": group, "may_change": may_change,
        "saved": saved, "public": public, "bare": bare,
    }  # fmt: skip
    return field(default=default, metadata=metadata)


def check_fields(config: Any) -> None:
    """Raises: UserError for the first option of a config that is out of bounds, or not one of its choices."""
    kinds = field_types(type(config))
    for each in dataclasses.fields(config):
        value, kind = getattr(config, each.name), kinds[each.name]
        if value is None or (isinstance(kind, NumberOr) and value in kind.words):
            continue
        for number in value if isinstance(value, list) else [value]:
            check_bounds(each, number)
        check_choice(each.name, value, kind)


def check_bounds(each: Field, value: Any) -> None:
    """Raises: UserError for a number out of bounds."""
    low, high = each.metadata.get("low"), each.metadata.get("high")
    if (low is None or low <= value) and (high is None or value <= high):
        return
    if low is None or high is None:
        bound = f"at least {low:g}" if high is None else f"at most {high:g}"
    else:
        bound = f"in {low:.10g}..{high:.10g}"
    raise UserError(f"--{each.name} is {value:.10g}; it must be {bound}")


def check_choice(name: str, value: Any, kind: Any) -> None:
    """Raises: UserError for a word that is not a choice of the Literal."""
    if get_origin(kind) is Literal and value not in get_args(kind):
        choices = [str(choice) for choice in get_args(kind)]
        hint = nearest_hint(str(value), choices) or f"; it takes {listed(choices)}"
        raise UserError(f"--{name} does not take {value!r}{hint}")


def field_types(config_class: type) -> dict[str, Any]:
    """Return the types of a configuration's fields by name; for optional ones without None."""
    return {name: _without_none(hint) for name, hint in get_type_hints(config_class).items()}


def _without_none(hint: Any) -> Any:
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    kind, *words = [argument for argument in get_args(hint) if argument is not type(None)]
    return NumberOr(kind, get_args(words[0])) if words else kind


class NumberOr(NamedTuple):
    """The type of an option that takes a number or one of some words: `float | Literal["auto"]`."""

    number: type
    words: tuple[str, ...]


def field_names(config_class: type) -> list[str]:
    """Return the names of the options that a configuration class declares."""
    return [each.name for each in dataclasses.fields(config_class)]


def refuse_both_formats(config: Any) -> None:
    """Raises: UserError for --bf16 and --fp16 at once."""
    if config.bf16 and config.fp16:
        raise UserError("--bf16 and --fp16 cannot be combined; pass one")

"""Recipes and config files: command lines saved as YAML."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import yaml

from hf_cifar.errors import UserError
from hf_cifar.text import nearest_hint, one_line


def recipe_names() -> list[str]:
    """List the names that `--recipe` takes."""
    folder = resources.files("hf_cifar") / "recipes"
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_recipe(name: str) -> str:
    """Return the text of a packaged recipe. Raises: UserError for an unknown name."""
    if name not in recipe_names():
        raise UserError(
            f"unknown recipe {name!r}{nearest_hint(name, recipe_names())}; see: hf-cifar recipes"
        )
    return (resources.files("hf_cifar") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


def yaml_tokens(text: str | bytes, source: str) -> list[str]:
    """Read a YAML file as a command line: null keeps the default, a list becomes multiple tokens.

    Raises: UserError for anything but option names with their values.
    """
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not valid YAML: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError(
            f"{source} contains a {type(values).__name__}; it must map option names to values"
        )
    tokens = []
    for name, value in values.items():
        if not str(name).replace("-", "_").isidentifier():
            raise UserError(f"{source}: {name!r} is not the name of an option")
        if value is None or value == []:
            continue
        tokens.append(f"--{name}")
        if isinstance(value, dict):
            tokens.append(json.dumps(value))
        else:
            tokens.extend(str(item) for item in (value if isinstance(value, list) else [value]))
    return tokens


def expand_tokens(argv: Sequence[str]) -> list[str]:
    """Replace `--recipe NAME` and `--config FILE` by their tokens, in this order, before all flags."""
    rest: list[str] = []
    recipe: list[str] = []
    config: list[str] = []
    tokens = iter(argv)
    for token in tokens:
        name, has_value, value = token.partition("=")
        if name not in ("--recipe", "--config"):
            rest.append(token)
            continue
        if not has_value:
            value = next(tokens, "")
        if not value:
            raise UserError(f"{name} needs a value; see: hf-cifar recipes")
        if name == "--recipe":
            recipe += yaml_tokens(read_recipe(value), f"recipe {value}")
        else:
            path = Path(value)
            if not path.is_file():
                raise UserError(f"--config: no file {value}; see also: hf-cifar recipes")
            config += yaml_tokens(path.read_bytes(), value)
    return recipe + config + rest

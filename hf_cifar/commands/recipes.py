"""`hf-cifar recipes`."""

from __future__ import annotations

from collections.abc import Sequence

from hf_cifar.commands.command import Command
from hf_cifar.config.command_line import wants_help
from hf_cifar.config.recipes import read_recipe, recipe_names
from hf_cifar.errors import UserError


def recipes(argv: Sequence[str]) -> int:
    """Print a line for each packaged recipe, or the text of one."""
    if wants_help(argv):
        print("usage: hf-cifar recipes [NAME]\n\nList the packaged recipes, or show one.")
        return 0
    if len(argv) > 1:
        raise UserError(f"recipes takes the name of one recipe, not {len(argv)}")
    if argv:
        print(read_recipe(argv[0]), end="")
        return 0
    width = max(map(len, recipe_names()))
    for name in recipe_names():
        print(f"{name:<{width}}  {read_recipe(name).splitlines()[0].removeprefix('# ')}")
    return 0


COMMAND = Command("list the packaged recipes, or show one", recipes)

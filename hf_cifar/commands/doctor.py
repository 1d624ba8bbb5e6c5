"""`hf-cifar doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_cifar.commands.command import Command
from hf_cifar.config.command_line import parse, unexpected_argument
from hf_cifar.config.doctor import DoctorConfig
from hf_cifar.config.recipes import expand_tokens
from hf_cifar.config.run import CONFIGS as RUN_CONFIGS
from hf_cifar.config.run import RunConfig
from hf_cifar.errors import UserError
from hf_cifar.logs import quieten
from hf_cifar.runs.folder import require_writable, write_json, write_text
from hf_cifar.runs.resume import with_restarts

CONFIGS = (DoctorConfig, *RUN_CONFIGS)
USAGE = "hf-cifar doctor DATA [options of hf-cifar finetune]"
DESCRIPTION = (
    "Examine a data set and a recipe before training. DATA is --dataset_name. The options are those below "
    "and those of hf-cifar finetune, with its recipes and config files. The exit status is 0 if training "
    "would start, 1 if it would be refused, and 2 for a mistake in the command itself."
)


def doctor(argv: Sequence[str]) -> int:
    """Examine the data and the recipe; exit status 1 if training would be refused."""
    config, run = read_options(argv)
    for name in ("json", "output"):
        if getattr(config, name):
            require_writable(Path(getattr(config, name)).parent, f"--{name}")

    quieten(True)
    from hf_cifar.doctor.examine import examine
    from hf_cifar.doctor.page import render_page, render_text

    found = examine(run)
    if config.json:
        Path(config.json).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(config.json), found.facts)
    if config.output:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        title = Path(found.facts["dataset_name"]).name
        write_text(Path(config.output), render_page(found, title))
    print(render_text(found))
    if not config.output:
        print("--output FILE.html writes a page with the images of each finding")
    return 1 if found.refused else 0


def read_options(argv: Sequence[str]) -> tuple[DoctorConfig, RunConfig]:
    """Read the command line. Raises: UserError for a mistake in it."""
    config, *_, words = parse(
        CONFIGS, expand_tokens(argv), "hf-cifar doctor", usage=USAGE, description=DESCRIPTION,
        paths_follow=True,
    )  # fmt: skip
    _, rest = parse([DoctorConfig], expand_tokens(argv), "hf-cifar doctor", paths_follow=True)
    if words and not words[0].startswith("-"):
        if any(token.partition("=")[0] == "--dataset_name" for token in argv):
            raise UserError(f"{words[0]} and --dataset_name both name the data; leave one out")
        if words[1:] and not words[1].startswith("-"):
            raise unexpected_argument(words[1])
        rest.remove(words[0])
        rest += ["--dataset_name", words[0]]
    return config, with_restarts(RunConfig.parse(rest, "hf-cifar doctor"))


COMMAND = Command(
    "examine data and recipe before training: what is wrong, and what to do", doctor, (),
    "DATA", DESCRIPTION,
)  # fmt: skip

"""The `Command` value, and the checks that subcommands share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_cifar.config.command_line import parse, refuse_options
from hf_cifar.config.data import DataConfig
from hf_cifar.config.deployment import PredictConfig
from hf_cifar.config.evaluation import EvaluateConfig
from hf_cifar.config.model import BUNDLED, SCRATCH, is_exported
from hf_cifar.errors import UserError
from hf_cifar.logs import show_notes
from hf_cifar.models.names import check_model_name
from hf_cifar.runs.processes import is_main_process

if TYPE_CHECKING:
    from hf_cifar.data.splits import DataSource


@dataclass(frozen=True)
class Command:
    """A subcommand.

    summary: one line for the list of commands. run: called with an instance of each of `configs` and the
    remaining arguments, or, without configs, with the complete command line; returns the exit status.
    arguments: names of the remaining arguments for the usage line.
    """

    summary: str
    run: Callable[..., int]
    configs: tuple[type, ...] = ()
    arguments: str = ""
    description: str | None = None

    def __call__(self, name: str, argv: Sequence[str]) -> int:
        """Parse the command line of the subcommand `name`, and run it."""
        if not self.configs:
            return self.run(argv)
        prog = f"hf-cifar {name}"
        *configs, arguments = parse(
            self.configs, argv, prog, usage=f"{prog} [options] {self.arguments}",
            description=self.description, paths_follow=True,
        )  # fmt: skip
        refuse_options(arguments, self.configs)
        return self.run(*configs, arguments)


def one_run(command: str, folders: Sequence[str]) -> Path:
    """Return the run folder that a command was given. Raises: UserError unless it is exactly one folder."""
    if len(folders) != 1:
        raise UserError(f"{command} takes the folder of one run, not {len(folders)}")
    folder = Path(folders[0])
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; pass the --output_dir of a run")
    return folder


def require_model(config: EvaluateConfig | PredictConfig) -> None:
    """Raises: UserError unless the options name an existing fine-tuned model."""
    name = config.model_name_or_path
    if not name:
        raise UserError("--model_name_or_path is missing; pass the folder of a run, or a Hub id")
    if name.startswith((SCRATCH, BUNDLED)):
        raise UserError(f"{name} is not fine-tuned yet; pass the folder of a run, or a Hub id")
    if is_exported(name):
        if not Path(name).expanduser().is_file():
            raise UserError(f"no file {name}; pass the --output of hf-cifar export")
        return
    check_model_name(
        name,
        config.model_revision,
        trust_remote_code=config.trust_remote_code,
        purpose="the folder of a run",
    )


def open_source(data: DataConfig, splits: Sequence[str]) -> DataSource:
    """Open the data and make the splits that a command needs, so that mistakes are found before a model
    is."""
    from hf_cifar.data.splits import DataSource

    show_notes(is_main_process())
    source = DataSource(data)
    for name in splits:
        _ = source.test_split if name == "test" else getattr(source.splits, name)
    return source

"""`hf-cifar update`."""

from __future__ import annotations

from collections.abc import Sequence

from hf_cifar.commands.command import Command, one_run
from hf_cifar.config.command_line import parse, wants_help
from hf_cifar.config.run import CONFIGS as RUN_CONFIGS
from hf_cifar.config.run import split_options
from hf_cifar.config.studies import UpdateConfig
from hf_cifar.errors import UserError
from hf_cifar.logs import quieten
from hf_cifar.runs.folder import RunFolder
from hf_cifar.runs.processes import is_main_process

CONFIGS = (UpdateConfig, *RUN_CONFIGS)
USAGE = "hf-cifar update RUN --dataset_name NEW --output_dir DIR [--replay N] [options of hf-cifar finetune]"
DESCRIPTION = (
    "Continue a finished run with new rows and new classes. The run's options are the defaults; those given "
    "here replace them. The same command continues after an interruption."
)


def update(argv: Sequence[str]) -> int:
    """Update a run. Mistakes in options are found before torch is imported."""
    if wants_help(argv):
        parse(CONFIGS, ["--help"], "hf-cifar update", usage=USAGE, description=DESCRIPTION)
    if not argv or argv[0].startswith("-"):
        raise UserError(f"the run comes first: {USAGE}")
    from hf_cifar.studies.update import update_run
    from hf_cifar.studies.update_options import config_of_update

    run = RunFolder(one_run("update", argv[:1]))
    own, rest = split_options([UpdateConfig], argv[1:], "hf-cifar update")
    config = config_of_update(run, rest)
    quieten(is_main_process())
    summary = update_run(run.path, config, own)
    if is_main_process():
        from hf_cifar.report.update import render_update

        folder = RunFolder(config.train.output_dir)
        print(render_update(summary, str(folder.path), str(folder.update_page_path)))
    return 0


COMMAND = Command(
    "continue a run with new rows and new classes, and measure what it forgets", update
)

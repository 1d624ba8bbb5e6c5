"""`hf-cifar reproduce`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_cifar.commands.command import Command, one_run
from hf_cifar.config.studies import ReproduceConfig
from hf_cifar.logs import quieten
from hf_cifar.runs.folder import RunFolder
from hf_cifar.runs.processes import is_main_process


def reproduce(config: ReproduceConfig, folders: Sequence[str]) -> int:
    """Rerun, and print the differences; exit status 1 if the weights differ."""
    folder = one_run("reproduce", folders)
    RunFolder(folder).require_finished()
    output_dir = Path(
        config.output_dir or f"{folder if folder.name else folder.resolve()}-reproduced"
    )
    if is_main_process():
        RunFolder(output_dir).refuse_occupied()

    from hf_cifar.studies.reproduce import render_reproduction, reproduce_run

    quieten(is_main_process())
    comparison = reproduce_run(folder, output_dir, other_data=config.other_data)
    if is_main_process():
        print(render_reproduction(comparison))
    return 0 if comparison["weights"]["identical"] else 1


COMMAND = Command(
    "rerun a finished run, and report differences", reproduce, (ReproduceConfig,), "RUN",
    "The exit status is 0 if the weights are bit-identical, and 1 if they differ.",
)  # fmt: skip

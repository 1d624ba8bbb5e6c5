"""`hf-cifar drift`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_cifar.commands.command import Command, one_run
from hf_cifar.config.model import is_exported
from hf_cifar.config.studies import DriftConfig
from hf_cifar.errors import UserError
from hf_cifar.logs import quieten
from hf_cifar.runs.folder import DRIFT_FILES, RunFolder, refuse_other_files


def drift(config: DriftConfig, arguments: Sequence[str]) -> int:
    """Compare images with those of a run; exit status 1 if there is drift."""
    if len(arguments) != 2:
        raise UserError(
            f"drift takes two arguments, the folder of a run and the images, not {len(arguments)}"
        )
    name, data = arguments
    if is_exported(name):
        raise UserError(
            f"{name} has neither features nor a record of its data; pass the folder of the run that was "
            "exported"
        )
    run = one_run("drift", [name])
    RunFolder(run).require_finished()
    if config.output_dir is not None:
        refuse_other_files(Path(config.output_dir), DRIFT_FILES)

    from hf_cifar.report.drift import render_summary
    from hf_cifar.studies.drift import detect_drift

    quieten(True)
    facts = detect_drift(run, data, config)
    print(render_summary(facts))
    if config.output_dir is not None:
        print(Path(config.output_dir) / DRIFT_FILES[1])
    return 1 if facts["drift"] else 0


COMMAND = Command(
    "test whether images are like those that a run was trained on", drift, (DriftConfig,),
    "RUN DATA", "Exit status: 0 if no drift is found, 1 if it is, 2 for a mistake.",
)  # fmt: skip

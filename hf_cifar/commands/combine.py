"""`hf-cifar combine`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from hf_cifar.commands.command import Command
from hf_cifar.config.studies import CombineConfig
from hf_cifar.errors import UserError
from hf_cifar.logs import quieten
from hf_cifar.runs.folder import RunFolder, refuse_other_files


def combine(config: CombineConfig, folders: Sequence[str]) -> int:
    """Combine finished runs into one, and print how it compares with them."""
    if not folders:
        raise UserError("combine takes the folders of finished runs; see hf-cifar runs")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("combine works in one process; run hf-cifar combine without a launcher")
    for folder in folders:
        RunFolder(folder).require_finished()
    refuse_other_files(Path(config.output_dir))

    from hf_cifar.studies.combine import combine_runs, render_combined

    quieten(True)
    print(render_combined(combine_runs(folders, config)))
    return 0


COMMAND = Command(
    "combine runs into an ensemble or a soup, or average over views", combine, (CombineConfig,),
    "RUN [RUN ...] --output_dir DIR",
)  # fmt: skip

"""`hf-cifar compare`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_cifar.commands.command import Command
from hf_cifar.config.evaluation import CompareConfig
from hf_cifar.errors import UserError


def compare(config: CompareConfig, folders: Sequence[str]) -> int:
    """Compare two runs, with tests of significance."""
    if len(folders) != 2:
        raise UserError(f"compare takes the folders of two runs, not {len(folders)}")
    missing = [folder for folder in folders if not Path(folder).is_dir()]
    if missing:
        raise UserError(f"no folder {missing[0]}; pass the output folders of two runs")

    from hf_cifar.evaluation.comparison import compare_runs, render_comparison

    print(render_comparison(compare_runs(folders, config.split), folders))
    return 0


COMMAND = Command(
    "compare two runs' predictions of the same images", compare, (CompareConfig,), "RUN RUN"
)

"""`hf-cifar runs`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from hf_cifar.commands.command import Command
from hf_cifar.config.studies import ListConfig
from hf_cifar.errors import UserError
from hf_cifar.runs.listing import list_runs, render_runs


def runs(config: ListConfig, folders: Sequence[str]) -> int:
    """Print a table of the runs, or one JSON record for each."""
    if not folders:
        raise UserError("runs takes folders that contain runs, for example: hf-cifar runs outputs")
    records = list_runs(folders)
    if config.json:
        for record in records:
            print(json.dumps(record, ensure_ascii=False))
    elif records:
        print(render_runs(records))
    else:
        print(f"no runs in {', '.join(folders)}", file=sys.stderr)
    return 0


COMMAND = Command(
    "list the runs in folders", runs, (ListConfig,), "FOLDER ...",
    "List the runs in and below the folders, grouped by data set, the best on validation first. "
    "Accuracies come with their 95% interval; dates are in UTC.",
)  # fmt: skip

"""`hf-cifar runs`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from hf_cifar.commands.command import wants_help
from hf_cifar.config.command_line import check_option_names
from hf_cifar.errors import UserError
from hf_cifar.runs.listing import list_runs, render_runs


def runs(argv: Sequence[str]) -> int:
    """list the runs in folders"""
    if wants_help(argv):
        print(
            "usage: hf-cifar runs [--json] FOLDER ...\n\nList the runs in and below the folders: by "
            "data, the best on validation first.\nAccuracies come with their 95% interval; dates are UTC.\n\n"
            "  --json  one JSON record a line instead of a table"
        )
        return 0
    check_option_names(argv, ["json"])
    folders = [token for token in argv if not token.startswith("--")]
    if not folders:
        raise UserError("runs takes folders with runs in them, for example: hf-cifar runs outputs")

    records = list_runs(folders)
    if "--json" in argv:
        for record in records:
            print(json.dumps(record, ensure_ascii=False))
    elif records:
        print(render_runs(records))
    else:
        print(f"no runs in {', '.join(folders)}", file=sys.stderr)
    return 0

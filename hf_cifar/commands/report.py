"""`hf-cifar report`."""

from __future__ import annotations

from collections.abc import Sequence

from hf_cifar.commands.command import Command, one_run
from hf_cifar.config.evaluation import ReportConfig
from hf_cifar.logs import quieten


def report(config: ReportConfig, folders: Sequence[str]) -> int:
    """Write the report and print its path."""
    folder = one_run("report", folders)

    from hf_cifar.report.page import write_report

    if config.explain:  # loads the model
        quieten(True)
    print(write_report(folder, config))
    return 0


COMMAND = Command("write a run's report.html and report.json", report, (ReportConfig,), "RUN")

"""`hf-cifar report`."""

from __future__ import annotations

from collections.abc import Sequence

from hf_cifar.commands.command import one_run, wants_help
from hf_cifar.config.command_line import check_option_names, parse_dataclasses
from hf_cifar.config.evaluation import ReportConfig
from hf_cifar.config.fields import field_names
from hf_cifar.errors import UserError


def report(argv: Sequence[str]) -> int:
    """write a run's report.html and report.json"""
    if not wants_help(argv):
        check_option_names(argv, field_names(ReportConfig))
    config, folders = parse_dataclasses(
        [ReportConfig], argv, "hf-cifar report", usage="hf-cifar report [options] RUN"
    )
    folder = one_run("report", folders)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; pass the output folder of a run")

    from hf_cifar.report.page import write_report

    print(write_report(folder, config))
    return 0

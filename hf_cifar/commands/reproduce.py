"""`hf-cifar reproduce`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_cifar.commands.command import is_main_process, one_run, quieten, wants_help
from hf_cifar.config.command_line import check_option_names, parse_dataclasses
from hf_cifar.config.fields import field_names
from hf_cifar.config.studies import ReproduceConfig
from hf_cifar.runs.folder import refuse_occupied, require_finished


def reproduce(argv: Sequence[str]) -> int:
    """make a run again from what it left, and say what differs"""
    if not wants_help(argv):
        check_option_names(argv, field_names(ReproduceConfig))
    config, folders = parse_dataclasses(
        [ReproduceConfig],
        argv,
        "hf-cifar reproduce",
        usage="hf-cifar reproduce [options] RUN",
        description="The exit status is 0 if the weights are bit-identical, and 1 if they differ.",
    )
    folder = one_run("reproduce", folders)
    require_finished(folder)
    output_dir = Path(
        config.output_dir or f"{folder if folder.name else folder.resolve()}-reproduced"
    )
    if is_main_process():
        refuse_occupied(output_dir)

    from hf_cifar.studies.reproduce import render_reproduction, reproduce_run

    quieten(is_main_process())
    comparison = reproduce_run(folder, output_dir, other_data=config.other_data)
    if is_main_process():
        print(render_reproduction(comparison))
    return 0 if comparison["weights"]["identical"] else 1

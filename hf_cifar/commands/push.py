"""`hf-cifar push`."""

from __future__ import annotations

from collections.abc import Sequence

from hf_cifar.commands.command import one_run, wants_help
from hf_cifar.config.command_line import check_option_names, parse_dataclasses
from hf_cifar.config.deployment import PushConfig
from hf_cifar.config.fields import field_names
from hf_cifar.errors import UserError


def push(argv: Sequence[str]) -> int:
    """upload a finished run to the Hub, or see what that would do"""
    if not wants_help(argv):
        check_option_names(argv, field_names(PushConfig))
    config, folders = parse_dataclasses(
        [PushConfig], argv, "hf-cifar push", usage="hf-cifar push RUN --repo_id NAME [options]"
    )
    folder = one_run("push", folders)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; pass the --output_dir of a run")

    from hf_cifar.hub.push import Target, plan_push, push_planned, render_plan
    from hf_cifar.report.card import card_for

    target = Target(config.repo_id, config.private, config.revision)
    plan = plan_push(folder, target, card_for)
    print(render_plan(plan), flush=True)
    if config.dry_run:
        print("nothing was uploaded: leave out --dry_run to push")
    else:
        print(f"pushed to {push_planned(plan)}")
    return 0

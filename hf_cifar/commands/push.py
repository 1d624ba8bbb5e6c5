"""`hf-cifar push`."""

from __future__ import annotations

from collections.abc import Sequence

from hf_cifar.commands.command import Command, one_run
from hf_cifar.config.deployment import PushConfig


def push(config: PushConfig, folders: Sequence[str]) -> int:
    """Print what would be uploaded, and upload it unless --dry_run is set."""
    folder = one_run("push", folders)

    from hf_cifar.hub.endpoint import endpoint_files
    from hf_cifar.hub.push import Target, plan_push, push_planned, render_plan
    from hf_cifar.report.card import card_for
    from hf_cifar.runs.folder import write_bytes

    target = Target(config.repo_id, config.private, config.revision)
    added = endpoint_files(folder) if config.handler else {}
    plan = plan_push(folder, target, card_for, added)
    print(render_plan(plan), flush=True)
    if config.dry_run:
        print("nothing was uploaded: leave out --dry_run to push")
    else:
        for name, content in added.items():
            write_bytes(folder / name, content)
        print(f"pushed to {push_planned(plan)}")
    return 0


COMMAND = Command(
    "push a finished run to the Hub, or list what would be uploaded", push, (PushConfig,),
    "RUN --repo_id NAME",
)  # fmt: skip

"""`hf-cifar prune`."""

from __future__ import annotations

from collections.abc import Sequence

from hf_cifar.commands.command import Command, one_run
from hf_cifar.config.deployment import PruneConfig
from hf_cifar.deploy.preflight import check_prune
from hf_cifar.logs import quieten


def prune(config: PruneConfig, folders: Sequence[str]) -> int:
    """Prune the network of a run, fine-tune it, and print where it is."""
    run = one_run("prune", folders)
    check_prune(run, config)

    from hf_cifar.deploy.prune import prune_run

    quieten(True)
    print(prune_run(run, config))
    return 0


COMMAND = Command(
    "make a run's network smaller, and fine-tune it", prune, (PruneConfig,), "RUN --output_dir DIR"
)

"""`hf-cifar compress`."""

from __future__ import annotations

from collections.abc import Sequence

from hf_cifar.commands.command import Command, one_run
from hf_cifar.config.deployment import CompressConfig
from hf_cifar.deploy.preflight import check_compress
from hf_cifar.logs import quieten


def compress(config: CompressConfig, folders: Sequence[str]) -> int:
    """Make smaller versions of a run, compare them with it, and say which one to use."""
    run = one_run("compress", folders)
    check_compress(run, config)

    from hf_cifar.deploy.compress import compress_run, render_comparison

    quieten(True)
    print(render_comparison(compress_run(run, config)))
    return 0


COMMAND = Command(
    "compare a run with pruned, 8-bit and 16-bit versions of it", compress, (CompressConfig,),
    "RUN --output_dir DIR",
)  # fmt: skip

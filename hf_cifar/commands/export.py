"""`hf-cifar export`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hf_cifar.commands.command import Command, one_run
from hf_cifar.config.deployment import ExportConfig
from hf_cifar.deploy.preflight import check_export
from hf_cifar.logs import quieten


def export(config: ExportConfig, folders: Sequence[str]) -> int:
    """Write the model of a run in another format, and say how well it agrees with the model; exit status 1 if
    it does not."""
    run = one_run("export", folders)
    check_export(run, config)

    from hf_cifar.deploy.export import export_run
    from hf_cifar.deploy.parity import verdict

    quieten(True)
    report = export_run(run, config)
    print(config.output)
    if report is None:
        print("hf-cifar: --parity_images 0: not compared with the model", file=sys.stderr)
    return 0 if report is None or verdict(report)[1] else 1


COMMAND = Command(
    "export a run as ONNX, torch.export or OpenVINO, or for a model server", export, (ExportConfig,),
    "RUN --output FILE",
)  # fmt: skip

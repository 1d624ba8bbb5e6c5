"""`hf-cifar quantize`."""

from __future__ import annotations

from collections.abc import Sequence

from hf_cifar.commands.command import Command, one_run
from hf_cifar.config.deployment import QuantizeConfig
from hf_cifar.deploy.preflight import check_quantize
from hf_cifar.logs import quieten


def quantize(config: QuantizeConfig, folders: Sequence[str]) -> int:
    """Quantise a run to 8-bit integers; the exit status is 1 if no scheme is as good and faster."""
    run = one_run("quantize", folders)
    check_quantize(run, config)

    from hf_cifar.deploy.quantize import quantize_run

    quieten(True)
    report = quantize_run(run, config)
    if report["chosen"] is None:
        return 1
    print(config.output)
    return 0


COMMAND = Command(
    "make an ONNX file with 8-bit integers of a run, if it is as good and faster", quantize,
    (QuantizeConfig,), "RUN --output FILE",
)  # fmt: skip

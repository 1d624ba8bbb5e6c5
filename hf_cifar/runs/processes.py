"""The processes of a run, and the device of this one."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from hf_cifar.config.run import RunConfig

logger = logging.getLogger(__name__)


def is_main_process() -> bool:
    """Return True in the first process, by the launcher's environment. Imports no torch."""
    return os.environ.get("RANK", "0") == "0"


def launcher_restarts() -> bool:
    """Return True if the launcher starts processes again that have failed: torchrun --max-restarts."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def share_of_launcher() -> tuple[int, int]:
    """Return the number of this process and the number of processes, by the launcher's environment."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def local_gpu() -> int:
    """Return the number of this process's GPU, by the launcher's environment."""
    import torch

    return int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()


@dataclass(frozen=True)
class Processes:
    """The processes of a run.

    index: number of this process, from 0. count: number of processes. device: of this process. num_devices:
    GPUs that this process uses, if no launcher started one process for each."""

    index: int
    count: int
    device: torch.device
    num_devices: int = 1

    @property
    def is_main(self) -> bool:
        """Return True in the first process."""
        return self.index == 0

    def wait_for_all(self) -> None:
        """Wait for all processes to reach this point."""
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def start_processes(config: RunConfig) -> Processes:
    """Join the other processes of the run, if a launcher started any, and pick this one's device.

    TrainingArguments later reuses the process group started here.
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    if launcher_restarts() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # The store of the agents outlives a restart, with the addresses of the processes before it.
        logger.warning(
            "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun, or processes that it restarts may wait "
            "for those before them"
        )

    options: dict[str, Any] = {"cpu": True} if computes_on_cpu(config.train.use_cpu) else {}
    if "ddp_backend" in config.trainer:
        options["backend"] = config.trainer["ddp_backend"]
    if "ddp_timeout" in config.trainer:
        options["timeout"] = timedelta(seconds=config.trainer["ddp_timeout"])
    state = PartialState(**options)
    alone = state.distributed_type == DistributedType.NO and state.device.type == "cuda"
    num_devices = torch.cuda.device_count() if alone else 1
    return Processes(state.process_index, state.num_processes, state.device, num_devices)


def computes_on_cpu(requested: bool) -> bool:
    """Return True if the CPU is requested, or the only device.

    Passed to TrainingArguments, because otherwise multiple processes on a CPU would each train alone.
    """
    import torch
    from accelerate.utils import parse_flag_from_env

    on_cpu = requested or parse_flag_from_env("ACCELERATE_USE_CPU")
    return on_cpu or not torch.accelerator.is_available()


def is_sharded() -> bool:
    """Return True if the launcher requests FSDP or DeepSpeed."""
    return "true" in [os.environ.get(f"ACCELERATE_USE_{name}") for name in ("FSDP", "DEEPSPEED")]

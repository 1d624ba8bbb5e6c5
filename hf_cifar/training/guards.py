"""Guards of training: losses that are not finite, too little memory, signals, dead loader workers."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput

from hf_cifar.errors import UserError
from hf_cifar.runs.signals import StopRequest, deferred_signals
from hf_cifar.text import listed, one_line

logger = logging.getLogger(__name__)


class WatchedLoss(NamedTuple):
    """The loss of a micro-batch and its step (from 1), with the logits [B, K] and row ids [B] needed to name
    the bad rows.

    arrived: recorded after the copy of `loss` from a GPU to the CPU; None for a loss on the CPU.
    """

    step: int
    loss: Tensor
    logits: Tensor
    row_ids: Tensor | None
    arrived: torch.cuda.Event | None = None


class FiniteLoss(TrainerCallback):
    """Ends training at the first loss that is not finite.

    A loss on a GPU is copied to the CPU without waiting, and checked in the next step: reading it at once
    would wait for all queued kernels in every step.
    """

    def __init__(self, learning_rate: float) -> None:
        self.learning_rate = learning_rate
        self._pending: WatchedLoss | None = None

    def watch(self, step: int, loss: Tensor, logits: Tensor, row_ids: Tensor | None) -> None:
        """Check a loss; on a GPU, the previous one. Raises: UserError if it is not finite."""
        watched = WatchedLoss(step, loss.detach(), logits.detach(), row_ids)
        if loss.device.type != "cuda":
            self._require_finite(watched)
            return
        copy = watched.loss.to("cpu", non_blocking=True)  # into pinned memory
        arrived = torch.cuda.Event()
        arrived.record()
        self._check_pending()
        self._pending = watched._replace(loss=copy, arrived=arrived)

    def on_train_begin(self, args, state, control, **kwargs):
        self._pending = None

    def on_train_end(self, args, state, control, **kwargs):
        self._check_pending()

    def _check_pending(self) -> None:
        watched, self._pending = self._pending, None
        if watched is not None and watched.arrived is not None:
            watched.arrived.synchronize()
            self._require_finite(watched)

    def _require_finite(self, watched: WatchedLoss) -> None:
        """Raises: UserError that names step and rows, if the loss is not finite."""
        if math.isfinite(watched.loss):
            return
        rows, advice = "", ""
        if watched.row_ids is not None:
            bad = ~torch.isfinite(watched.logits).all(dim=1)
            bad = bad.to(watched.row_ids.device) if bad.any() else ...
            rows = f" in rows {listed(watched.row_ids[bad].tolist(), 10)} of train"
            advice = "check these images, or "
        raise UserError(
            f"training diverged: the loss is {watched.loss.item()} at step {watched.step}{rows}; {advice}"
            f"start again with a lower --learning_rate than {self.learning_rate:g}"
        )


class FittingBatch(TrainerCallback):
    """Restarts training that runs out of memory with smaller steps, accumulated to the same batch."""

    def __init__(self) -> None:
        self._in_step = False  # not in an evaluation, where a smaller training batch would not help

    def on_step_begin(self, args, state, control, **kwargs):
        self._in_step = True

    def on_step_end(self, args, state, control, **kwargs):
        self._in_step = False

    def train(self, trainer: Trainer, train: Callable[[], TrainOutput]) -> TrainOutput:
        """Call `train`; restart it with smaller steps as long as they do not fit into memory.

        Raises: UserError if one image at a time does not fit.
        """
        args, model = trainer.args, trainer.model
        begin = {name: value.cpu().clone() for name, value in model.state_dict().items()}
        random_state = torch.get_rng_state()
        while True:
            self._in_step = False
            try:
                return train()
            except Exception as error:
                if not (self._in_step and should_reduce_batch_size(error)):
                    raise
                reason = one_line(error)
            size = args.per_device_train_batch_size
            if size == 1:
                raise UserError(f"out of memory with one image per step: {reason}")
            parts = next(n for n in range(2, size + 1) if size % n == 0)
            args.per_device_train_batch_size = trainer._train_batch_size = size // parts
            args.gradient_accumulation_steps *= parts
            logger.warning(
                "out of memory with %d images at a time; restarting with %d, accumulated %d times per step",
                size, size // parts, args.gradient_accumulation_steps,
            )  # fmt: skip
            trainer.model = trainer.model_wrapped = trainer.accelerator.unwrap_model(
                model, keep_torch_compile=False
            )
            model.zero_grad()
            model.load_state_dict(begin)
            torch.set_rng_state(random_state)
            trainer.optimizer = None


class StopSignals(TrainerCallback):
    """Stops all processes after the same step or evaluation batch if one of them received a signal."""

    def __init__(self) -> None:
        self.request = StopRequest()
        self._deferring = False

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Record signals until the block ends; they are raised between steps.

        Raises: Stopped.
        """
        with deferred_signals() as self.request:
            self._deferring = True
            try:
                yield
            finally:
                self._deferring = False

    def on_step_end(self, args, state, control, **kwargs):
        self._raise_if_requested(args.world_size)

    def on_prediction_step(self, args, state, control, **kwargs):
        if self._deferring:
            self._raise_if_requested(args.world_size)

    def _raise_if_requested(self, world_size: int) -> None:
        if world_size > 1:
            number = torch.tensor(self.request.number)
            dist.all_reduce(number, dist.ReduceOp.MAX, group=self._cpu_group)
            self.request.number = int(number)
        self.request.raise_if_requested()

    @functools.cached_property
    def _cpu_group(self) -> dist.ProcessGroup:
        """Return a group of all processes connected through their CPUs, so that GPUs need not wait."""
        return dist.new_group(backend="gloo")


@contextlib.contextmanager
def worker_errors() -> Iterator[None]:
    """Turn the ConnectionError or EOFError of a dead DataLoader worker into a clear message.

    torch reports most dead workers itself, but not one that dies while it hands over a batch.
    """
    try:
        yield
    except (ConnectionError, EOFError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if not any("torch/utils/data" in Path(frame.filename).as_posix() for frame in frames):
            raise
        raise RuntimeError(f"DataLoader worker died: {error}") from error

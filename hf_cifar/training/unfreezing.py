"""Gradual unfreezing: the head trains first, then one more block at a time."""

from __future__ import annotations

import logging
import math

from torch import nn
from transformers import TrainerCallback

from hf_cifar.models.blocks import backbone_blocks, block_depths
from hf_cifar.models.heads import head_parameter_names

logger = logging.getLogger(__name__)


class GradualUnfreezing(TrainerCallback):
    """Trains the head alone for `epochs`, then adds one more block per `epochs`, from the last block to the
    first, and finally the layers before the blocks.

    epochs: the interval, may be a fraction; with 0, nothing is frozen. Layers between the blocks and the
    head (a final norm, a pooler) start with the last block. What trains depends only on the current epoch,
    so that a resumed run is identical. The optimiser has all parameters, and skips those without gradients.

    Source: Howard and Ruder, Universal Language Model Fine-tuning for Text Classification, 2018.
    """

    def __init__(self, epochs: float) -> None:
        self.epochs = epochs
        self._turns: dict[nn.Parameter, int] = {}
        self._num_blocks = 0
        self._current = -1

    def start(self, model: nn.Module) -> None:
        """Unfreeze all parameters that will train at some time, for the optimiser that is created next."""
        if not self.epochs:
            return
        if not self._turns:
            self._turns = {p: turn for p, turn in turns_of(model).items() if p.requires_grad}
            self._num_blocks = len(backbone_blocks(model))
        for parameter in self._turns:
            parameter.requires_grad_(True)
        self._current = -1

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if not self.epochs:
            return
        steps = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
        logger.info(
            "gradual unfreezing: the head trains first, then one more of %d blocks every %g epochs",
            self._num_blocks, self.epochs,
        )  # fmt: skip
        last, turns = self._turn((state.max_steps - 1) / steps), max(self._turns.values())
        if last < turns:
            logger.warning(
                "gradual unfreezing: only %s will train, because the run has %.3g epochs; the first layers "
                "would train after %g",
                self._blocks(last), state.max_steps / steps, turns * self.epochs,
            )  # fmt: skip
        self._freeze(state.epoch or 0.0)

    def on_train_end(self, args, state, control, **kwargs):
        if self.epochs:
            logger.info("gradual unfreezing: %s trained", self._blocks(self._current))

    def _blocks(self, turn: int) -> str:
        return f"the last {min(turn, self._num_blocks)} of {self._num_blocks} blocks"

    def on_step_begin(self, args, state, control, **kwargs):
        if self.epochs:
            self._freeze(state.epoch or 0.0)

    def _turn(self, epoch: float) -> int:
        return math.floor(epoch / self.epochs + 1e-9)  # 0.3 / 0.1 is below 3

    def _freeze(self, epoch: float) -> None:
        turn = self._turn(epoch)
        if turn == self._current:
            return
        self._current = turn
        for parameter, own in self._turns.items():
            parameter.requires_grad_(own <= turn)


def turns_of(model: nn.Module) -> dict[nn.Parameter, int]:
    """Return the interval in which each parameter starts to train: 0 for the head, 1 for the last block and
    the layers after it, one more for each earlier block, and the highest for the layers before the blocks.

    Raises: UserError for an architecture without blocks.
    """
    head, depths = head_parameter_names(model), block_depths(model)
    return {
        parameter: 0 if name in head else max(1, depths[name])
        for name, parameter in model.named_parameters()
    }

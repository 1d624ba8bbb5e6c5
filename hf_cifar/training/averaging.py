"""An exponential moving average of the weights, evaluated and saved in their place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from timm.utils import ModelEmaV3
from torch import nn
from transformers import TrainerCallback

from hf_cifar.training.checkpoints import load_state, save_state

# File of the trained weights in a checkpoint; its model file has their average.
TRAINED_FILE = "trained_weights.safetensors"
# The weight of early steps in the average shrinks during training (timm.utils.ModelEmaV3, for short runs).
WARMUP_POWER = 0.75


class WeightAverage(TrainerCallback):
    """Averages the weights after each step; training ends with the average, or with the best checkpoint.

    decay: share of itself that the average keeps in each step; with 0, nothing is averaged and the methods do
    nothing. checkpoint: folder that the run resumes from.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.checkpoint: str | None = None
        self._average: ModelEmaV3 | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not self.decay:
            return
        # A resumed run has loaded the checkpoint's model file before, which is the average.
        self._average = ModelEmaV3(
            model, decay=self.decay, use_warmup=True, warmup_power=WARMUP_POWER
        )
        if self.checkpoint is not None:
            model.load_state_dict(load_state(Path(self.checkpoint) / TRAINED_FILE))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self._average is not None:
            self._average.update(model, step=state.global_step)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        average, self._average = self._average, None
        best = args.load_best_model_at_end and state.best_model_checkpoint
        if average is not None and not best:
            model.load_state_dict(average.module.state_dict())

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Give a model in training the averaged weights until the block ends."""
        if self._average is None:
            yield
            return
        trained = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(self._average.module.state_dict())
        try:
            yield
        finally:
            model.load_state_dict(trained)

    def save_trained(self, model: nn.Module, folder: Path) -> None:
        """Write the trained weights, which are not averaged, into a checkpoint."""
        if self._average is not None:
            save_state(folder / TRAINED_FILE, model.state_dict())

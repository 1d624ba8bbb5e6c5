"""Progress of training as a bar or lines, and its end if the loss diverges."""

from __future__ import annotations

import math

from transformers import ProgressCallback, TrainerCallback

from hf_cifar.config.metrics import training_metrics, words
from hf_cifar.errors import UserError
from hf_cifar.progress import Progress, in_notebook


def evaluation_line(epoch: float | None, logs: dict[str, float], best: str | None) -> str:
    """Return one line for an evaluation, from the Trainer's log record.

    best: the metric that chooses the best checkpoint, which is shown too.
    """
    names = [*training_metrics(), (best or "").removeprefix("eval_")]
    shown = [
        f"{words(name)} {logs[f'eval_{name}']:.4f}"
        for name in dict.fromkeys(names)
        if f"eval_{name}" in logs
    ]
    return f"epoch {epoch or 0:.2f}: validation {', '.join(shown)}"


def nothing_left(step: int) -> str:
    """Return the message of a resumed run without steps left."""
    return f"all {step} steps are done; raise --num_train_epochs to train longer"


class StopAtNaN(TrainerCallback):
    """Ends a run whose validation loss is no longer a number: no later step can fix it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        value = (logs or {}).get("eval_cross_entropy", 0.0)
        if not math.isfinite(value):
            raise UserError(
                f"training diverged: eval_cross_entropy is {value} at step {state.global_step}; start again "
                f"with a lower --learning_rate than {args.learning_rate:g}"
            )


class EvaluationProgress(TrainerCallback):
    """Progress of an evaluation or prediction, which names the split."""

    def __init__(self) -> None:
        self._shown: Progress | None = None

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if not state.is_world_process_zero or eval_dataloader is None:
            return
        if self._shown is None:
            name = getattr(eval_dataloader.dataset, "name", "")
            work = f"evaluating {name}".rstrip()
            self._shown = Progress(work, len(eval_dataloader), "batches")
        self._shown.update()

    def on_evaluate(self, args, state, control, **kwargs):
        if self._shown is not None:
            self._shown.close()
        self._shown = None

    on_predict = on_evaluate


class TrainingProgress(ProgressCallback):
    """A bar with the running loss, and one line for each evaluation."""

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        """Do nothing: see `EvaluationProgress`."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if state.is_world_process_zero and state.global_step >= state.max_steps:
            self.training_bar.write(nothing_left(state.global_step))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        if "eval_accuracy" in logs:
            self.training_bar.write(
                evaluation_line(logs.get("epoch"), logs, args.metric_for_best_model)
            )
        elif "loss" in logs:
            self.training_bar.set_postfix(
                loss=f"{logs['loss']:.3f}", lr=f"{logs['learning_rate']:.1e}"
            )


def training_progress(*, bars: bool) -> TrainerCallback:
    """Return the callback that shows a training: as a bar, in a notebook with a table, or as lines."""
    if not bars:
        return TrainingLines()
    if not in_notebook():
        return TrainingProgress()
    from hf_cifar.training.notebook import NotebookProgress  # needs IPython

    return NotebookProgress()


class TrainingLines(TrainerCallback):
    """One line for each logged loss and each evaluation, and at least every ten seconds, for logs and
    pipes."""

    def __init__(self) -> None:
        self._shown: Progress | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and state.global_step >= state.max_steps:
            print(nothing_left(state.global_step), flush=True)
        if state.is_world_process_zero:
            left = state.max_steps - state.global_step
            self._shown = Progress("training", left, "steps", bar=False)

    def on_step_end(self, args, state, control, **kwargs):
        if self._shown is not None:
            self._shown.update()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        if "eval_accuracy" in logs:
            print(evaluation_line(logs.get("epoch"), logs, args.metric_for_best_model), flush=True)
        elif "loss" in logs:
            rate = logs["learning_rate"]
            step = f"step {state.global_step}/{state.max_steps}"
            print(f"{step}: loss {logs['loss']:.3f}, learning rate {rate:.1e}", flush=True)

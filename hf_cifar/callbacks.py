"""What a run shows while it trains."""

from __future__ import annotations

from transformers import ProgressCallback, TrainerCallback


def evaluation_line(epoch: float | None, logs: dict[str, float]) -> str:
    """One line for an evaluation, from the Trainer's log record."""
    accuracy, loss = logs["eval_accuracy"], logs["eval_cross_entropy"]
    return f"epoch {epoch or 0:.2f}: validation accuracy {accuracy:.4f}, cross-entropy {loss:.4f}"


class TrainingProgress(ProgressCallback):
    """A bar with the running loss, and one line for each evaluation."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        if "eval_accuracy" in logs:
            self.training_bar.write(evaluation_line(logs.get("epoch"), logs))
        elif "loss" in logs:
            self.training_bar.set_postfix(
                loss=f"{logs['loss']:.3f}", lr=f"{logs['learning_rate']:.1e}"
            )


class TrainingLines(TrainerCallback):
    """The same without bars, for logs and pipes."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        if "eval_accuracy" in logs:
            print(evaluation_line(logs.get("epoch"), logs), flush=True)
        elif "loss" in logs:
            rate = logs["learning_rate"]
            step = f"step {state.global_step}/{state.max_steps}"
            print(f"{step}: loss {logs['loss']:.3f}, learning rate {rate:.1e}", flush=True)

"""Progress of training in a notebook: a bar, and a table of the evaluations."""

from __future__ import annotations

from transformers.utils.notebook import NotebookProgressCallback


class NotebookProgress(NotebookProgressCallback):
    """The Trainer's own bar and table; see `EvaluationProgress` for evaluations."""

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        """Do nothing: see `EvaluationProgress`."""

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        # The parent removes the times from the metrics, which `evaluate` returns.
        super().on_evaluate(args, state, control, metrics=dict(metrics or {}), **kwargs)

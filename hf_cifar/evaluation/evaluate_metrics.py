"""The metrics of the table as `evaluate.Metric` classes, which need no network."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np

from hf_cifar.config.metrics import METRICS, metrics_of
from hf_cifar.errors import UserError
from hf_cifar.evaluation.metrics import COUNT_METRICS
from hf_cifar.evaluation.predictions import outcome_of
from hf_cifar.text import nearest_hint

_CLASS_ID = datasets.Value("int64")
_LOGITS = datasets.Sequence(datasets.Value("float64"))


class TableMetric(evaluate.Metric):
    """A metric of the table, kept in memory. Subclasses: see `evaluate_metric`."""

    name: str
    multi_label: bool

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"keep_in_memory": True, **kwargs})

    def _info(self) -> evaluate.MetricInfo:
        row = METRICS[self.name]
        labels = datasets.Sequence(datasets.Value("int64")) if self.multi_label else _CLASS_ID
        predictions = _CLASS_ID if takes_class_ids(self.name, self.multi_label) else _LOGITS
        return evaluate.MetricInfo(
            description=f"{row.words}, {row.unit}",
            citation="",
            features=datasets.Features({"predictions": predictions, "references": labels}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float | None]:
        logits, labels = np.asarray(predictions), np.asarray(references)
        if logits.ndim == 1:  # class ids become one-hot logits
            logits = np.eye(max(logits.max(), labels.max()) + 1)[logits]
        return {self.name: outcome_of(logits, labels).metric(self.name)}


def evaluate_metric(name: str, *, multi_label: bool = False) -> type[TableMetric]:
    """Make the `evaluate.Metric` class of a metric, without a download; its result has the metric's name.

    Predictions are class ids [N] for metrics of the predicted classes only, such as accuracy or F1, and
    logits [N, K] for the others and for all multi-label metrics, where classes are predicted from a
    probability of 0.5. References are class ids [N], or [N, K] of 0 and 1.

    Raises: UserError for a metric that does not exist for such data.
    """
    names = metrics_of(multi_label=multi_label)
    if name not in names:
        hint = nearest_hint(name, names) or f"; known: {', '.join(names)}"
        raise UserError(f"unknown metric {name!r}{hint}")
    return type(name, (TableMetric,), {"name": name, "multi_label": multi_label})


def takes_class_ids(name: str, multi_label: bool) -> bool:
    """True for metrics of one class per image."""
    return not multi_label and (name == "accuracy" or name in COUNT_METRICS)


def compute_training_metrics(prediction: Any) -> dict[str, float]:
    """Compute the metrics of an evaluation during training, exactly for any number of processes."""
    outcome = outcome_of(prediction.predictions, prediction.label_ids)
    metrics: dict[str, float] = {}
    for name in metrics_of(multi_label=outcome.multi_label, place="best"):
        if takes_class_ids(name, outcome.multi_label):
            metric = evaluate_metric(name)()
            metrics |= metric.compute(predictions=outcome.predicted, references=outcome.labels)
        else:
            # Without `evaluate`, which takes seconds to store millions of logits. If no image has a class,
            # mean average precision is undefined, and all models are equally good.
            metrics[name] = outcome.metric(name) or 0.0
    return metrics

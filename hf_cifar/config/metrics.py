"""Every metric: its name, its words, which direction is better, and where it is shown.

The values are computed in `evaluation/`; this table imports nothing, so that an option can name a metric.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

# best: computed at every evaluation during training, and a choice of --metric_for_best_model. training: also
# shown at every evaluation, and drawn in the report. headline: the summary of a run, of seeds and of a
# reproduction, the model card, and the top of the report. comparison: `hf-cifar compare`. All of them are in
# metrics.json, in the output of `hf-cifar evaluate` and in the report's table.
Place = Literal["best", "training", "headline", "comparison"]
EVERYWHERE: tuple[Place, ...] = ("best", "training", "headline", "comparison")


@dataclass(frozen=True)
class Metric:
    """One number that is computed for a split.

    name: its key in metrics.json. words: its name for people. unit: its range, or the unit without one.
    single_label, multi_label: the places that show it, for data with one label per image and for data with
    any number of labels; None where such data do not have it. min_classes: the classes that it needs.
    """

    name: str
    words: str
    unit: str = "0..1"
    single_label: tuple[Place, ...] | None = ()
    multi_label: tuple[Place, ...] | None = ()
    larger_is_better: bool = True
    min_classes: int = 1

    def places(self, *, multi_label: bool) -> tuple[Place, ...] | None:
        """The places that show it for one kind of data; None if such data do not have it."""
        return self.multi_label if multi_label else self.single_label


_ROWS = (
    Metric("accuracy", "accuracy", single_label=EVERYWHERE, multi_label=EVERYWHERE),
    Metric("top_5_accuracy", "top-5 accuracy", multi_label=None, min_classes=6),
    Metric(
        "balanced_accuracy", "balanced accuracy", single_label=("best", "comparison"), multi_label=None
    ),
    Metric("matthews", "Matthews correlation", "-1..1", multi_label=None),
    Metric("precision_micro", "micro precision", single_label=None),
    Metric("recall_micro", "micro recall", single_label=None),
    Metric("f1_micro", "micro F1", single_label=None, multi_label=("headline", "comparison")),
    Metric("precision_macro", "macro precision"),
    Metric("precision_weighted", "weighted precision"),
    Metric("recall_macro", "macro recall"),
    Metric("recall_weighted", "weighted recall"),
    Metric(
        "f1_macro", "macro F1", single_label=("headline", "comparison"), multi_label=EVERYWHERE
    ),
    Metric("f1_weighted", "weighted F1"),
    Metric("roc_auc_macro", "macro ROC AUC", single_label=("headline",)),
    Metric(
        "average_precision_macro", "mean average precision (mAP)", multi_label=EVERYWHERE
    ),
    Metric(
        "cross_entropy", "cross-entropy", "nats", single_label=EVERYWHERE, multi_label=EVERYWHERE,
        larger_is_better=False,
    ),
    Metric(
        "brier", "Brier score", "0..2", single_label=("comparison",), multi_label=None,
        larger_is_better=False,
    ),
    Metric(
        "ece", "calibration error (ECE)", single_label=("headline", "comparison"), multi_label=None,
        larger_is_better=False,
    ),
    Metric(
        "ece_equal_mass", "ECE, bins of equal mass", multi_label=None, larger_is_better=False
    ),
)  # fmt: skip
METRICS = {row.name: row for row in _ROWS}

LOSS = "loss"  # computed by the Trainer at every evaluation, smaller is better
UNCALIBRATED = "_uncalibrated"  # after a metric's name: its value before calibration
# Metrics of a single class, and the classes' other columns, whose words are not the name.
_CLASS_WORDS = {"num_images": "images", "f1": "F1", "roc_auc": "ROC AUC"}
# Metrics of a model that rejects images.
_KEPT_WORDS = {
    "kept": "share of images that keep their label",
    "accuracy_kept": "accuracy of these",
}


def words(name: str) -> str:
    """Return the name of a metric, or of a class's metric, in words."""
    if name.endswith(UNCALIBRATED):
        return f"{words(name.removesuffix(UNCALIBRATED))} before calibration"
    if name in METRICS:
        return METRICS[name].words
    return (_CLASS_WORDS | _KEPT_WORDS).get(name, name.replace("_", " "))


def metrics_of(
    *, multi_label: bool, place: Place | None = None, num_labels: int | None = None
) -> list[str]:
    """Names of the metrics that one kind of data has; those that a place shows, or that many classes have."""
    found = ((row, row.places(multi_label=multi_label)) for row in METRICS.values())
    return [
        row.name
        for row, places in found
        if places is not None
        and (place is None or place in places)
        and (num_labels is None or num_labels >= row.min_classes)
    ]


def training_metrics() -> list[str]:
    """Metrics of the evaluations during training, of either kind of data."""
    kinds = (metrics_of(multi_label=kind, place="training") for kind in (False, True))
    chosen = {name for kind in kinds for name in kind}
    return [name for name in METRICS if name in chosen]


def is_multi_label(names: Collection[str]) -> bool:
    """True if a split with these metrics has images with any number of labels."""
    return any(row.single_label is None and row.name in names for row in METRICS.values())


def shown(place: Place, names: Collection[str]) -> list[str]:
    """The metrics that a place shows of a split's, whose names are given."""
    chosen = metrics_of(multi_label=is_multi_label(names), place=place)
    return [name for name in chosen if name in names]


def best_metrics(*, multi_label: bool) -> dict[str, bool]:
    """Metrics that may choose the best checkpoint, each with True if larger is better."""
    names = metrics_of(multi_label=multi_label, place="best")
    return {name: METRICS[name].larger_is_better for name in names} | {LOSS: False}


# Of either kind of data, for a check before the data are known.
BEST_METRICS = best_metrics(multi_label=False) | best_metrics(multi_label=True)

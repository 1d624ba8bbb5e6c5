"""A set of predictions, stored as a file, and every metric of it."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet

from hf_cifar.data.labels import class_label, holds_lists, indicators
from hf_cifar.errors import UserError
from hf_cifar.evaluation.multi_label import MultiLabel
from hf_cifar.evaluation.outcome import DRAWS, Outcome
from hf_cifar.evaluation.rejection import kept_intervals, kept_metrics
from hf_cifar.evaluation.single_label import SingleLabel
from hf_cifar.models.rejection import Rejection, rejection_in
from hf_cifar.runs.folder import RunFolder
from hf_cifar.text import one_line

# Keys in the metadata of the file.
TEMPERATURE, THRESHOLDS, SKIPPED = "temperature", "thresholds", "skipped_rows"
REJECT = "reject"


def outcome_of(
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    temperature: float = 1.0,
    thresholds: np.ndarray | None = None,
) -> Outcome:
    """Make the outcome of single-label data, labels [N], or of multi-label data, labels [N, K]."""
    if np.ndim(labels) == 2:
        return MultiLabel(logits, labels, thresholds=thresholds)
    return SingleLabel(logits, labels, temperature=temperature)


def compute_metrics(
    logits: np.ndarray,
    labels: np.ndarray,
    id2label: Mapping[int, str],
    thresholds: np.ndarray | None = None,
) -> dict[str, Any]:
    """Compute every metric of a final evaluation, as plain JSON values.

    logits [N, K]; labels [N], or [N, K] of 0 and 1. thresholds [K]: probabilities from which a class is
    predicted, for labels [N, K]; 0.5 if not given. `per_class` is keyed by class name; the rows of
    `confusion_matrix` are true classes. An undefined area is None.
    """
    return outcome_of(logits, labels, thresholds=thresholds).compute(id2label)


def metric_intervals(
    logits: np.ndarray,
    labels: np.ndarray,
    id2label: Mapping[int, str],
    thresholds: np.ndarray | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Any]:
    """Compute the 95% interval [low, high] of every metric of `compute_metrics`, by the same names.

    The interval of an undefined metric is None. draws: number of bootstrap samples.
    """
    return outcome_of(logits, labels, thresholds=thresholds).intervals(id2label, draws, seed)


@dataclass(frozen=True, eq=False)
class Predictions:
    """A model's logits for the images of one split.

    split: "validation", "test" or, for a cross-validation, "out_of_fold". row_ids, labels [N]; logits [N, K].
    Row ids are row numbers in the data set's own split: train, for a validation split taken from it.
    temperature: the number by which calibration has divided the logits, 1 for none. post_hoc: True if the
    biases were first corrected for the class frequencies; runs record it in run.json.
    For multi-label data, labels are [N, K], 0 or 1, and a class is predicted if its probability reaches
    thresholds [K], or 0.5 without thresholds. skipped_rows: ids of the rows that were left out because
    their images cannot be read. distances [N], rejection: distances and thresholds of a model that rejects
    images.
    saved_metrics: the split's part of metrics.json, if loaded from a folder.
    """

    split: str
    row_ids: np.ndarray
    labels: np.ndarray
    logits: np.ndarray
    id2label: dict[int, str]
    temperature: float = 1.0
    post_hoc: bool = False
    thresholds: np.ndarray | None = None
    skipped_rows: tuple[int, ...] = ()
    distances: np.ndarray | None = None
    rejection: Rejection | None = None
    saved_metrics: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def outcome(self) -> Outcome:
        """Logits and labels with their metrics, single-label or multi-label."""
        return outcome_of(
            self.logits, self.labels, temperature=self.temperature, thresholds=self.thresholds
        )

    @property
    def multi_label(self) -> bool:
        """True if an image may have multiple labels, or none."""
        return self.outcome.multi_label

    @property
    def probabilities(self) -> np.ndarray:
        """Probability of each class [N, K], 0..1; independent of the other classes for multi-label data."""
        return self.outcome.probabilities

    @property
    def predicted(self) -> np.ndarray:
        """The most likely class [N] of each image, or True where a class is predicted [N, K]."""
        return self.outcome.predicted

    def probabilities_of(self, labels: np.ndarray) -> np.ndarray:
        """Probability [N], 0..1, of a class [N] for each image, or of exactly these classes [N, K], taken as
        independent."""
        return self.outcome.probabilities_of(labels)

    @property
    def correct(self) -> np.ndarray:
        """True for each image [N] whose predicted labels are all of its labels and no others."""
        return self.outcome.correct

    @property
    def confidences(self) -> np.ndarray:
        """Probability [N] of the predicted class, or classes, of each image."""
        return self.probabilities_of(self.predicted)

    @functools.cached_property
    def kept(self) -> np.ndarray | None:
        """True for each image [N] that keeps its label; None for a model that does not reject images."""
        if self.rejection is None or self.distances is None:
            return None
        return ~self.rejection.rejects(self.confidences, self.distances)

    @functools.cached_property
    def metrics(self) -> dict[str, Any]:
        """Every metric, see `compute_metrics`; under "intervals" the 95% interval of each; with a
        temperature, also two metrics without it; the rows that were left out, if any; with rejection, the
        share of images that keep their label, and the accuracy of these.

        Intervals take seconds, so those of `saved_metrics` are reused if all metrics there are the same.
        """
        metrics = self.outcome.compute(self.id2label)
        if self.skipped_rows:
            metrics[SKIPPED] = list(self.skipped_rows)
        if self.kept is not None:
            metrics |= kept_metrics(self.kept, self.correct)
        saved = dict(self.saved_metrics)
        intervals = saved.pop("intervals", None)
        if intervals is None or saved != metrics:
            intervals = self.outcome.intervals(self.id2label)
            if self.kept is not None:
                intervals |= kept_intervals(self.kept, self.correct)
        return {**metrics, "intervals": intervals}

    def save(self, folder: str | Path) -> None:
        """Write predictions/SPLIT.parquet, and this split's metrics to metrics.json."""
        path = RunFolder(folder).predictions_path(self.split)
        path.parent.mkdir(parents=True, exist_ok=True)
        label: Any = datasets.ClassLabel(names=list(self.id2label.values()))
        labels: Any = self.labels
        note = {TEMPERATURE: str(self.temperature), SKIPPED: json.dumps(self.skipped_rows)}
        if self.outcome.thresholds is not None:
            label, labels = datasets.List(label), [np.flatnonzero(row) for row in labels]
            note[THRESHOLDS] = json.dumps(self.outcome.thresholds.tolist())
        columns = {"row_id": self.row_ids, "label": labels, "logits": list(self.logits)}
        kinds = {
            "row_id": datasets.Value("int64"),
            "label": label,
            "logits": datasets.Sequence(datasets.Value("float32")),
        }
        if self.distances is not None and self.rejection is not None:
            columns["distance"], kinds["distance"] = self.distances, datasets.Value("float32")
            note[REJECT] = json.dumps(self.rejection.to_dict())
        table = pyarrow.table(columns, schema=datasets.Features(kinds).arrow_schema)
        table = table.replace_schema_metadata({**table.schema.metadata, **note})
        temporary = path.with_name(f".{path.name}.tmp")
        pyarrow.parquet.write_table(table, temporary)
        os.replace(temporary, path)
        RunFolder(folder).save_metrics(self.split, self.metrics)

    @classmethod
    def load(cls, folder: str | Path, split: str) -> Predictions:
        """Load predictions written by `save`. Raises: UserError if the file is missing or damaged."""
        path = RunFolder(folder).predictions_path(split)
        if not path.is_file():
            raise UserError(
                f"no predictions in {path}; run: hf-cifar evaluate --model_name_or_path {folder} "
                f"--split {split}"
            )
        saved = RunFolder(folder).metrics().get(split)
        try:
            table = pyarrow.parquet.read_table(path)
            label = datasets.Features.from_arrow_schema(table.schema)["label"]
            names, multi_label = class_label(label).names, holds_lists(label)
            note, labels = table.schema.metadata, table["label"]
            reject = json.loads(note.get(REJECT.encode(), "null"))
            return cls(
                split=split,
                row_ids=table["row_id"].to_numpy(),
                labels=indicators(labels, len(names)) if multi_label else labels.to_numpy(),
                logits=np.stack(table["logits"].to_numpy()),
                id2label=dict(enumerate(names)),
                temperature=float(note.get(TEMPERATURE.encode(), 1)),
                thresholds=np.array(json.loads(note[THRESHOLDS.encode()])) if multi_label else None,
                skipped_rows=tuple(json.loads(note.get(SKIPPED.encode(), "[]"))),
                distances=table["distance"].to_numpy() if reject else None,
                rejection=rejection_in({REJECT: reject}),
                saved_metrics=saved if isinstance(saved, dict) else {},
            )
        except (KeyError, AttributeError, ValueError, OSError) as error:
            raise UserError(
                f"{path} does not contain predictions ({type(error).__name__}: "
                f"{one_line(error, 200)}); run hf-cifar evaluate again"
            ) from None


def saved_splits(folder: str | Path) -> list[str]:
    """List the splits with predictions in a folder."""
    return [
        split
        for split in ("validation", "test", "out_of_fold")
        if RunFolder(folder).predictions_path(split).is_file()
    ]

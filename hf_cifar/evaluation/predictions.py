"""One set of predictions, kept as a file, and every figure from it."""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet

from hf_cifar.data.columns import class_label, holds_lists, indicators
from hf_cifar.errors import UserError
from hf_cifar.evaluation.calibration import calibration_error
from hf_cifar.evaluation.intervals import figure_intervals, multi_label_intervals
from hf_cifar.evaluation.metrics import compute_metrics, cross_entropy, softmax
from hf_cifar.evaluation.multi_label import THRESHOLD, decide, multi_label_metrics, sigmoid
from hf_cifar.runs.folder import METRICS_FILE, PREDICTIONS_FOLDER, read_json, write_json
from hf_cifar.text import one_line

TEMPERATURE, THRESHOLDS, SKIPPED = (
    "temperature",
    "thresholds",
    "skipped_rows",
)  # in the metadata of the file


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model said about the images of one split.

    split: "validation" or "test". row_ids, labels [N]; logits [N, K]. Row ids count in
    the data set's own split that a row comes from: train, for a validation split cut out of it.
    temperature: what calibration has divided the logits by, 1 for none.
    Of multi-label data, labels are [N, K], 0 or 1, and a class is given from its score in thresholds [K] on;
    without thresholds, from 0.5. skipped_rows: ids of the rows that were left out, because their images
    cannot be read.
    """

    split: str
    row_ids: np.ndarray
    labels: np.ndarray
    logits: np.ndarray
    id2label: dict[int, str]
    temperature: float = 1.0
    thresholds: np.ndarray | None = None
    skipped_rows: tuple[int, ...] = ()

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several labels, or none."""
        return self.labels.ndim == 2

    @functools.cached_property
    def probabilities(self) -> np.ndarray:
        """Of each class [N, K], 0..1: one of them, or each by itself."""
        return (sigmoid if self.multi_label else softmax)(self.logits)

    @property
    def answers(self) -> np.ndarray:
        """The most likely class [N] of each image, or whether it was given each class [N, K]."""
        if self.multi_label:
            return decide(self.probabilities, self._thresholds)
        return self.logits.argmax(axis=1)

    def probabilities_of(self, answers: np.ndarray) -> np.ndarray:
        """What the model gives an answer for each image, 0..1 [N]: a class [N], or just these classes
        [N, K] and no other, as if each were decided by itself."""
        if self.multi_label:
            return np.where(answers, self.probabilities, 1 - self.probabilities).prod(axis=1)
        return self.probabilities[np.arange(len(answers)), answers]

    @property
    def right(self) -> np.ndarray:
        """Whether each image [N] was given its label, or all of its labels and no other."""
        same = self.answers == self.labels
        return same.all(axis=1) if self.multi_label else same

    @property
    def _thresholds(self) -> np.ndarray:
        if self.thresholds is None:
            return np.full(len(self.id2label), THRESHOLD)
        return self.thresholds

    @functools.cached_property
    def metrics(self) -> dict[str, Any]:
        """Every figure, see `compute_metrics` or `multi_label_metrics`; under "intervals" the 95% interval
        of each; with a temperature, also what two were without; the rows that were left out, if any."""
        skipped = {SKIPPED: list(self.skipped_rows)} if self.skipped_rows else {}
        if self.multi_label:
            seen = (self.logits, self.labels, self.id2label, self._thresholds)
            figures = multi_label_metrics(*seen) | skipped
            return figures | {"intervals": multi_label_intervals(*seen)}
        figures = compute_metrics(self.logits, self.labels, self.id2label) | skipped
        if self.temperature != 1:
            before = softmax(self.logits * self.temperature)
            figures |= {
                "temperature": self.temperature,
                "cross_entropy_uncalibrated": cross_entropy(before, self.labels),
                "ece_uncalibrated": calibration_error(before, self.labels),
            }
        return figures | {"intervals": figure_intervals(self.logits, self.labels, self.id2label)}

    def save(self, folder: str | Path) -> None:
        """Write predictions/SPLIT.parquet, and this split's figures into metrics.json."""
        path = _path(folder, self.split)
        path.parent.mkdir(parents=True, exist_ok=True)
        label, labels = datasets.ClassLabel(names=list(self.id2label.values())), self.labels
        note = {TEMPERATURE: str(self.temperature), SKIPPED: json.dumps(self.skipped_rows)}
        if self.multi_label:
            label, labels = datasets.List(label), [np.flatnonzero(row) for row in labels]
            note[THRESHOLDS] = json.dumps(self._thresholds.tolist())
        features = datasets.Features(
            {
                "row_id": datasets.Value("int64"),
                "label": label,
                "logits": datasets.Sequence(datasets.Value("float32")),
            }
        )
        table = pyarrow.table(
            {"row_id": self.row_ids, "label": labels, "logits": list(self.logits)},
            schema=features.arrow_schema,
        )
        table = table.replace_schema_metadata({**table.schema.metadata, **note})
        temporary = path.with_name(f".{path.name}.tmp")
        pyarrow.parquet.write_table(table, temporary)
        os.replace(temporary, path)
        path = Path(folder) / METRICS_FILE
        write_json(path, {**read_json(path), self.split: self.metrics})

    @classmethod
    def load(cls, folder: str | Path, split: str) -> Predictions:
        """Read what `save` wrote. Raises: UserError if there is no such file, or it holds something else."""
        path = _path(folder, split)
        if not path.is_file():
            raise UserError(
                f"no predictions in {path}; run: hf-cifar evaluate --model_name_or_path {folder} "
                f"--split {split}"
            )
        try:
            table = pyarrow.parquet.read_table(path)
            label = datasets.Features.from_arrow_schema(table.schema)["label"]
            names, several = class_label(label).names, holds_lists(label)
            note, labels = table.schema.metadata, table["label"]
            return cls(
                split=split,
                row_ids=table["row_id"].to_numpy(),
                labels=indicators(labels, len(names)) if several else labels.to_numpy(),
                logits=np.stack(table["logits"].to_numpy()),
                id2label=dict(enumerate(names)),
                temperature=float(note.get(TEMPERATURE.encode(), 1)),
                thresholds=np.array(json.loads(note[THRESHOLDS.encode()])) if several else None,
                skipped_rows=tuple(json.loads(note.get(SKIPPED.encode(), "[]"))),
            )
        except (KeyError, AttributeError, ValueError, OSError) as error:
            raise UserError(
                f"{path} does not hold predictions ({type(error).__name__}: "
                f"{one_line(error, 200)}); run hf-cifar evaluate again"
            ) from None


def saved_splits(folder: str | Path) -> list[str]:
    """The splits of which a folder holds predictions."""
    return [split for split in ("validation", "test") if _path(folder, split).is_file()]


def _path(folder: str | Path, split: str) -> Path:
    return Path(folder) / PREDICTIONS_FOLDER / f"{split}.parquet"

"""One set of predictions, and every figure from it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from hf_cifar.data.sources import quiet_datasets
from hf_cifar.data.splits import Split
from hf_cifar.data.store import CPU, build_store
from hf_cifar.evaluation.metrics import compute_metrics, render_figure
from hf_cifar.trainer import ImageClassificationTrainer

METRICS_FILE = "metrics.json"
PREDICTIONS_FOLDER = "predictions"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a model said about the images of one split.

    split: "validation" or "test". row_ids, labels [N]; logits [N, K]. Row ids count in
    the data set's own split that a row comes from: train, for a validation split cut out of it.
    """

    split: str
    row_ids: np.ndarray
    labels: np.ndarray
    logits: np.ndarray
    id2label: dict[int, str]
    metrics: dict[str, Any]

    def save(self, folder: str | Path) -> None:
        """Write predictions/SPLIT.parquet, and this split's figures into metrics.json."""
        folder = Path(folder)
        (folder / PREDICTIONS_FOLDER).mkdir(parents=True, exist_ok=True)
        table = datasets.Dataset.from_dict(
            {"row_id": self.row_ids, "label": self.labels, "logits": list(self.logits)},
            features=datasets.Features(
                {
                    "row_id": datasets.Value("int64"),
                    "label": datasets.ClassLabel(names=list(self.id2label.values())),
                    "logits": datasets.Sequence(datasets.Value("float32")),
                }
            ),
        )
        with quiet_datasets():
            table.to_parquet(folder / PREDICTIONS_FOLDER / f"{self.split}.parquet")
        path = folder / METRICS_FILE
        figures = json.loads(path.read_text()) if path.exists() else {}
        write_json(path, {**figures, self.split: self.metrics})


def evaluate_classifier(
    trainer: ImageClassificationTrainer, split: Split, pixel_store: str = "auto"
) -> Evaluation:
    """Predict every image of a split once; on all processes, each row counted once.

    pixel_store: auto, resident or streamed.
    """
    device = trainer.args.device if trainer.args.dataloader_num_workers == 0 else CPU
    store = build_store(
        split, trainer.preprocessing, augmented=False, kind=pixel_store, device=device
    )
    output = trainer.predict(store)
    logits = np.asarray(output.predictions, dtype=np.float32)
    return Evaluation(
        split=split.name,
        row_ids=split.row_ids,
        labels=split.labels,
        logits=logits,
        id2label=split.id2label,
        metrics=compute_metrics(logits, split.labels, split.id2label),
    )


def render_figures(metrics: dict[str, dict[str, Any]], keys: Sequence[str]) -> str:
    """The named figures as a table of text: a row each, a column for each split."""
    width = max(map(len, keys))
    lines = [" " * width + "".join(f"  {name:>10}" for name in metrics)]
    for key in keys:
        cells = (render_figure(figures.get(key)) for figures in metrics.values())
        lines.append(f"{key:<{width}}" + "".join(f"  {cell:>10}" for cell in cells))
    return "\n".join(lines)


def render_metrics(metrics: dict[str, dict[str, Any]]) -> str:
    """All figures of one or more splits as a table of text, and the per-class figures of the last."""
    names = list(metrics)
    single = [k for k, v in metrics[names[0]].items() if not isinstance(v, (dict, list))]
    lines = [render_figures(metrics, single)]
    per_class = metrics[names[-1]]["per_class"]
    columns = list(next(iter(per_class.values())))
    width = max(len(f"{names[-1]}, per class"), *(len(label) for label in per_class))
    lines += ["", f"{names[-1] + ', per class':<{width}}" + "".join(f"  {c:>10}" for c in columns)]
    for label, values in per_class.items():
        lines.append(
            f"{label:<{width}}" + "".join(f"  {render_figure(values[c]):>10}" for c in columns)
        )
    return "\n".join(lines)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file in one step: a reader sees the old one or the new one, never half."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)

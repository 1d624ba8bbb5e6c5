"""Collect the facts of a report (report.json) and its pictures from the files in a run's folder.

This needs neither the model nor torch, unless mistakes are explained. Pictures are read from the run's data
set, if it is still available.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hf_cifar.audit.duplicates import find_duplicates
from hf_cifar.audit.labels import suspected_labels
from hf_cifar.audit.properties import image_properties
from hf_cifar.config.evaluation import ReportConfig
from hf_cifar.config.objects import MEMORY
from hf_cifar.data.split import Split, trained_rows, without_rows
from hf_cifar.data.splits import OUT_OF_FOLD, DataSource
from hf_cifar.errors import UserError
from hf_cifar.evaluation.calibration import NUM_BINS, reliability
from hf_cifar.evaluation.intervals import wilson
from hf_cifar.evaluation.mistakes import (
    confused_pairs,
    least_confident_hits,
    slices,
    worst_errors,
)
from hf_cifar.evaluation.predictions import Predictions, saved_splits
from hf_cifar.evaluation.rejection import risk_coverage
from hf_cifar.hub.origin import public_name
from hf_cifar.progress import progress
from hf_cifar.report.public import public_options
from hf_cifar.report.wording import role_of
from hf_cifar.runs.folder import RunFolder
from hf_cifar.text import listed

logger = logging.getLogger(__name__)
DEFAULTS = ReportConfig()
# The split that a report is about: the first of these with predictions.
SHOWN_FIRST = (OUT_OF_FOLD, "test", "validation")


@dataclass(frozen=True, eq=False)
class Report:
    """A report. facts: the content of report.json. pictures: uint8 [H, W, 3], by their names in the facts."""

    facts: dict[str, Any]
    pictures: dict[str, np.ndarray] = field(default_factory=dict)


def build_report(
    folder: str | Path, config: ReportConfig = DEFAULTS, dataset: Any = None
) -> Report:
    """Collect all facts from the files of a run.

    dataset: the data of a run with a data set in memory, which has no name to open it by; without it, the
    report has no pictures.
    Raises: UserError if the folder has no predictions, a file is damaged, or the run had other data.
    """
    folder = Path(folder)
    found = saved_splits(folder)
    if not found and not RunFolder(folder).model_config_path.is_file():
        runs = sorted(path.parent.name for path in folder.glob("*/config.json"))
        inside = f"; models are in its folders {listed(runs, 3)}" if runs else ""
        raise UserError(
            f"{folder} is not the folder of a run{inside}; pass the --output_dir of one"
        )
    if not found:
        raise UserError(
            f"no predictions in {folder}; run: hf-cifar evaluate --model_name_or_path {folder}"
        )
    predictions = {split: Predictions.load(folder, split) for split in found}
    run = RunFolder(folder).facts()
    evaluated = predictions[next(split for split in SHOWN_FIRST if split in found)]
    metrics = {split: each.metrics for split, each in predictions.items()}
    facts = {
        "title": public_name(str(folder.resolve())),
        "split": evaluated.split,
        "multi_label": evaluated.multi_label,
        "metrics": metrics,
        **(
            {} if evaluated.multi_label else single_label_facts(evaluated, metrics[evaluated.split])
        ),
        "folds": RunFolder(folder).folds() or None,
        "corruptions": RunFolder(folder).corruptions().get(evaluated.split),
        **run_facts(folder, run),
        **galleries(evaluated, config.gallery_size),
        "explained_errors": None,
    }
    facts["role"] = (
        role_of(evaluated.split, metrics[evaluated.split], facts["options"], run)
        if run or facts["folds"]
        else ""
    )
    source = None if dataset is None else given_source(folder, dataset)
    try:
        source = source or DataSource(RunFolder(folder).data())
        split = matching_split(source, evaluated)
    except UserError as error:
        # Only logged: the reason may contain a local path, which must not be in a report.
        logger.warning("the report has no pictures, slices or duplicates: %s", error)
        if config.explain:
            raise UserError("--explain needs the images, which are not available") from None
        return Report({**facts, "slices": None, "duplicates": None, "pictures": False})
    facts |= {
        "slices": property_slices(split, evaluated.correct),
        "duplicates": None,
        "pictures": True,
    }
    name_files(split, facts)
    pictures = dict(named_pictures(split, facts))
    if config.explain:
        facts["explained_errors"], maps = explained_errors(
            folder, evaluated, facts["worst_errors"][: config.explain], pictures
        )
        pictures |= maps
    if config.check_duplicates and evaluated.split != OUT_OF_FOLD:
        train = source.splits.train
        if isinstance(train, Split):
            facts["duplicates"], of_pairs = duplicates_of(
                evaluated, split, trained_rows(train, run), config.gallery_size
            )
            pictures |= of_pairs
    return Report(facts, pictures)


def given_source(folder: Path, dataset: Any) -> DataSource:
    """Return an object as the data of a run. Raises: UserError if the run had another object."""
    data = RunFolder(folder).data()
    given = dataclasses.replace(data, dataset_name=dataset)
    if data.dataset_name.startswith(MEMORY) and str(given.dataset_name) != data.dataset_name:
        raise UserError(
            f"{folder} was made with {data.dataset_name}, and dataset is {given.dataset_name}; pass the "
            "same object"
        )
    return DataSource(given)


def run_facts(folder: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Data, options, duration and machine of the run, without local paths; empty without a run."""
    options = RunFolder(folder).options()
    if not options:
        return {"dataset": None, "model": None, "options": {}, "run": {}, "history": []}
    run = dict(run)
    history = run.pop("history", [])
    return {
        "dataset": public_name(options["dataset_name"]),
        "model": public_name(options["model_name_or_path"]),
        "options": public_options(options),
        "run": run,
        "history": history,
    }


def single_label_facts(evaluated: Predictions, metrics: dict[str, Any]) -> dict[str, Any]:
    """Facts for single-label data only: reliability, and the most confused classes."""
    names = list(evaluated.id2label.values())
    return {
        "reliability": reliability_bins(evaluated.probabilities, evaluated.labels),
        "rejection": rejection_facts(evaluated),
        "confused_pairs": confused_pairs(metrics["confusion_matrix"], names),
    }


def rejection_facts(evaluated: Predictions) -> dict[str, Any] | None:
    """Thresholds, and accuracy by the share of images kept; None for a model that does not reject images."""
    if evaluated.rejection is None:
        return None
    curve = risk_coverage(evaluated.confidences, evaluated.correct)
    return {**evaluated.rejection.to_dict(), "risk_coverage": curve}


def reliability_bins(probabilities: np.ndarray, labels: np.ndarray) -> list[dict[str, float]]:
    """The non-empty bins of equal width: low, high, num_images, accuracy, confidence, interval."""
    table = reliability(probabilities, labels)
    return [
        {
            "low": number / NUM_BINS,
            "high": (number + 1) / NUM_BINS,
            "num_images": int(count),
            "accuracy": float(hits / count),
            "confidence": float(confidence / count),
            "interval": wilson(hits, count).tolist(),
        }
        for number, (count, hits, confidence) in enumerate(
            zip(table["num_images"], table["hits"], table["confidence"], strict=True)
        )
        if count
    ]


def galleries(evaluated: Predictions, size: int) -> dict[str, Any]:
    """Images worth a look: most confident errors, least confident hits, labels that may be wrong."""
    predicted, hits = evaluated.predicted, evaluated.correct
    confidences = evaluated.probabilities_of(predicted)
    label_probabilities = evaluated.probabilities_of(evaluated.labels)

    def rows(positions: Iterable[int]) -> list[dict[str, Any]]:
        return [
            {
                "row_id": int(evaluated.row_ids[position]),
                "picture": f"{evaluated.split}/{evaluated.row_ids[position]}",
                "truth": label_names(evaluated.labels[position], evaluated.id2label),
                "prediction": label_names(predicted[position], evaluated.id2label),
                "confidence": float(confidences[position]),
                "label_probability": float(label_probabilities[position]),
            }
            for position in positions
        ]

    count, suspects = suspected_labels(evaluated.probabilities, evaluated.labels)
    return {
        "worst_errors": rows(worst_errors(confidences, hits, size)),
        "least_confident_hits": rows(least_confident_hits(confidences, hits, size)),
        "label_suspects": {
            "num_images": count,
            "images": rows(suspects[: min(count, size)]),
        },
    }


def label_names(labels: np.ndarray, id2label: dict[int, str]) -> str:
    """The name of a class id [], or the names of the classes that are 1 in [K]."""
    if labels.ndim == 0:
        return id2label[int(labels)]
    return ", ".join(id2label[int(label)] for label in np.flatnonzero(labels)) or "no label"


def matching_split(source: DataSource, evaluated: Predictions) -> Split:
    """Load the split of the predictions again.

    Raises: UserError if it cannot be read or has changed.
    """
    if evaluated.split == OUT_OF_FOLD:
        split = source.folded_split
    else:
        split = source.test_split if evaluated.split == "test" else source.splits.validation
    split = without_rows(split, evaluated.skipped_rows)
    same = np.array_equal(split.row_ids, evaluated.row_ids)
    if not same or not np.array_equal(split.labels, evaluated.labels):
        raise UserError(
            f"the {evaluated.split} images of {source.config.dataset_name} have changed since the predictions"
        )
    return split


def gallery_rows(split: Split, facts: dict[str, Any]) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the entries of all galleries, with their positions in the split."""
    position_of = {row_id: position for position, row_id in enumerate(split.row_ids.tolist())}
    suspects = facts["label_suspects"]["images"]
    for row in [*facts["worst_errors"], *facts["least_confident_hits"], *suspects]:
        yield row, position_of[row["row_id"]]


def name_files(split: Split, facts: dict[str, Any]) -> None:
    """Add the file of each image in the galleries, as FOLDER/NAME: a local path must not be in a report."""
    for row, position in gallery_rows(split, facts):
        if path := split.path_of(position):
            row["file"] = "/".join(Path(path).parts[-2:])


def named_pictures(split: Split, facts: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the pictures (name, [H, W, 3] uint8) of all galleries."""
    for row, position in gallery_rows(split, facts):
        yield row["picture"], split.decode(position)


def explained_errors(
    folder: Path,
    evaluated: Predictions,
    errors: list[dict[str, Any]],
    pictures: dict[str, np.ndarray],
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Explain mistakes by Grad-CAM: entries of a gallery with the names of their maps, and the pictures. One
    map is for the predicted class, and another for the true class.

    Of multi-label data, it is for the class whose probability is furthest from its label.
    Imports torch. Raises: UserError without a saved model, or one without feature maps.
    """
    from hf_cifar.explain.explainer import Explainer
    from hf_cifar.models.build import load_classifier

    explainer = Explainer(load_classifier(str(folder)), ["grad_cam"], check=False)
    position_of = {row_id: position for position, row_id in enumerate(evaluated.row_ids.tolist())}
    rows: list[dict[str, Any]] = []
    drawn: dict[str, np.ndarray] = {}
    for row in progress(errors, "explaining mistakes"):
        position = position_of[row["row_id"]]
        label, probabilities = evaluated.labels[position], evaluated.probabilities[position]
        if evaluated.multi_label:
            classes = [int(np.abs(probabilities - label).argmax())]
        else:
            classes = [int(probabilities.argmax()), int(label)]
        maps = []
        for class_id in classes:
            found = explainer.explain(pictures[row["picture"]], class_id)
            name = f"{row['picture']}/{class_id}"
            drawn[name] = found.pictures["grad_cam"]
            maps.append({"label": found.explained, "picture": name})
        drawn[f"{row['picture']}/input"] = found.pictures["input"]
        rows.append({**row, "picture": f"{row['picture']}/input", "maps": maps})
    return rows, drawn


def property_slices(split: Split, hits: np.ndarray) -> dict[str, Any]:
    """Accuracy by quarters of brightness, contrast and sharpness. hits [N]: True for a correct prediction."""
    images = split.pictures(f"examining {split.name}")
    return {name: slices(values, hits) for name, values in image_properties(images).items()}


def duplicates_of(
    evaluated: Predictions, split: Split, train: Split, limit: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Find evaluated images that are also in train, and the accuracy on the others."""
    pairs = find_duplicates(
        split.pictures(f"comparing {split.name}"), train.pictures(f"comparing {train.name}")
    )
    hits = evaluated.correct
    clean = np.ones(len(hits), bool)
    clean[[pair.first for pair in pairs]] = False
    shown = []
    pictures: dict[str, np.ndarray] = {}
    for pair in pairs[:limit]:
        names = (
            f"{split.name}/{split.row_ids[pair.first]}",
            f"{train.name}/{train.row_ids[pair.second]}",
        )
        pictures |= {names[0]: split.decode(pair.first), names[1]: train.decode(pair.second)}
        shown.append(
            {
                "pictures": names,
                "row_ids": [int(split.row_ids[pair.first]), int(train.row_ids[pair.second])],
                "exact": pair.exact,
                "difference": pair.difference,
                "labels": [
                    label_names(evaluated.labels[pair.first], evaluated.id2label),
                    label_names(train.labels[pair.second], train.id2label),
                ],
            }
        )
    return {
        "num_train": len(train),
        "num_pairs": len(pairs),
        "num_exact": sum(pair.exact for pair in pairs),
        "num_images": int((~clean).sum()),
        "accuracy_without_duplicates": float(hits[clean].mean()) if clean.any() else None,
        "interval_without_duplicates": wilson(hits[clean].sum(), clean.sum()).tolist()
        if clean.any()
        else None,
        "pairs": shown,
    }, pictures

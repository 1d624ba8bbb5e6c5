"""What an update of a run learnt and forgot: accuracies on old and new rows, before and after."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_cifar.config.run import RunConfig
from hf_cifar.config.studies import UpdateConfig
from hf_cifar.data.labels import class_counts, label_array
from hf_cifar.data.stored import StoredRows
from hf_cifar.evaluation.comparison import compare_predictions
from hf_cifar.evaluation.predictions import Predictions, saved_splits
from hf_cifar.hub.origin import public_name
from hf_cifar.runs.folder import RunFolder
from hf_cifar.studies.replay import classes_of, stored_offset
from hf_cifar.studies.update_options import ANEW

logger = logging.getLogger(__name__)
LOGIT_OF_UNKNOWN = -1e4  # of a class that the old model does not know: probability 0


def trained_on(facts: dict[str, Any], stored: StoredRows) -> np.ndarray:
    """Return which stored training rows an update was trained on, [N] of booleans, by its run.json: all but
    the unreadable and doubted ones."""
    ids = stored_offset(facts, "train", stored) + np.arange(len(stored.of("train")))
    doubted = (facts.get("doubted_rows") or {"row_ids": []})["row_ids"]
    return ~np.isin(ids, [*facts.get("skipped_rows", {}).get("train", []), *doubted])


def parts_of(split: str, run: RunFolder, stored: StoredRows) -> dict[str, Predictions]:
    """Divide an updated run's predictions of a split into those of new rows and of old, stored ones.

    New rows keep their row ids; those of old rows become their numbers among the stored rows of the split.
    """
    predictions = Predictions.load(run.path, split)
    offset = stored_offset(run.facts(), split, stored)
    is_old = predictions.row_ids >= offset
    return {
        "old": selected(predictions, is_old, predictions.row_ids - offset),
        "new": selected(predictions, ~is_old, predictions.row_ids),
    }


def selected(predictions: Predictions, rows: np.ndarray, row_ids: np.ndarray) -> Predictions:
    """Return the predictions of the rows of a mask [N], with new ids."""
    return dataclasses.replace(
        predictions, row_ids=row_ids[rows], labels=predictions.labels[rows],
        logits=predictions.logits[rows], skipped_rows=(), saved_metrics={},
        distances=None, rejection=None,
    )  # fmt: skip


def predictions_before(
    run: RunFolder, split: str, stored: StoredRows, id2label: dict[int, str]
) -> Predictions | None:
    """Return the old model's own predictions of the stored rows of a split, with the classes of the update;
    None if the run has none."""
    if split not in saved_splits(run.path):
        return None
    before = Predictions.load(run.path, split)
    number = {row: i for i, row in enumerate(stored.row_ids(split).tolist())}
    ids = np.array([number.get(row, -1) for row in before.row_ids.tolist()])
    before = selected(before, ids >= 0, ids)
    place = {name: i for i, name in before.id2label.items()}
    logits = np.full((len(before.logits), len(id2label)), LOGIT_OF_UNKNOWN, np.float32)
    for i, name in id2label.items():
        if name in place:
            logits[:, i] = before.logits[:, place[name]]
    labels, thresholds = before.labels, before.thresholds
    names = list(id2label.values())
    if labels.ndim == 2:
        wide = np.zeros((len(labels), len(names)), labels.dtype)
        limits = np.full(len(names), 0.5)
        for name, i in place.items():
            wide[:, names.index(name)] = labels[:, i]
            limits[names.index(name)] = 0.5 if thresholds is None else thresholds[i]
        labels, thresholds = wide, limits
    else:
        labels = np.array([names.index(before.id2label[i]) for i in labels.tolist()], np.int64)
    return dataclasses.replace(
        before, labels=labels, logits=logits, id2label=id2label, thresholds=thresholds
    )


def accuracy_of(predictions: Predictions) -> dict[str, Any]:
    """Return the accuracy with its interval."""
    metrics = predictions.metrics
    return {"value": metrics["accuracy"], "interval": metrics["intervals"]["accuracy"]}


def difference(first: Predictions, second: Predictions) -> dict[str, Any]:
    """Return the accuracy of the second minus that of the first on the same images, with paired interval."""
    found = compare_predictions(first, second)
    return {
        "value": found["accuracy_difference"],
        "interval": found["accuracy_difference_interval"],
        "p": found["mcnemar_p"],
    }


def negative(found: dict[str, Any]) -> dict[str, Any]:
    """Return the same difference in the other direction."""
    low, high = found["interval"]
    return found | {"value": 0.0 - found["value"], "interval": [0.0 - high, 0.0 - low]}


def joint(parts: dict[str, Predictions]) -> Predictions:
    """Return the predictions of both parts together; the ids of old rows follow those of the new ones."""
    new, old = parts["new"], parts["old"]
    first = 1 + max(new.row_ids.tolist(), default=-1)
    return dataclasses.replace(
        new,
        row_ids=np.concatenate([new.row_ids, old.row_ids + first]),
        labels=np.concatenate([new.labels, old.labels]),
        logits=np.concatenate([new.logits, old.logits]),
    )


def summarise_update(run: RunFolder, config: RunConfig, own: UpdateConfig) -> dict[str, Any]:
    """Return what an update learnt and forgot, as plain values.

    `splits` holds, by split and part (old rows, new rows, all), the accuracy `after` the update, `before` it,
    the accuracy `anew` if trained anew, and differences with paired intervals: `forgetting` (before minus
    after) and `gain_anew` (anew minus after).
    """
    folder = RunFolder(config.train.output_dir)
    anew = RunFolder(folder.path / ANEW) if own.compare_anew else None
    stored = [StoredRows.load(each.stored_path) for each in (folder, anew) if each is not None]
    facts, names, known = folder.facts(), classes_of(folder), classes_of(run)
    train, num_known = stored[0].of("train").with_format(None), len(known)
    stored_counts = np.zeros(len(names), int)
    if len(train):
        kept = trained_on(facts, stored[0])
        stored_counts[:num_known] = class_counts(label_array(train)[kept], num_known)
    counts = facts["label_counts"]["train"]
    summary: dict[str, Any] = {
        "run": public_name(str(run.path)),
        "updated": public_name(str(folder.path)),
        "data": public_name(str(config.data.dataset_name)),
        "replay": own.replay,
        "num_stored": len(train),
        "classes": [
            {
                "name": name, "is_new": name not in known, "num_stored": int(kept),
                "num_new": counts[name] - int(kept),
            }
            for name, kept in zip(names, stored_counts, strict=True)
        ],
        "num_train": {"update": facts["num_train"]},
        "seconds": {"update": facts["train_seconds"]},
        "splits": {},
    }  # fmt: skip
    if anew is not None:
        found = anew.facts()
        summary["num_train"]["anew"] = found["num_train"]
        summary["seconds"]["anew"] = found["train_seconds"]
    for split in ("validation", "test"):
        if split in saved_splits(folder.path):
            summary["splits"][split] = summarise_split(split, run, folder, anew, stored)
    return summary


def summarise_split(
    split: str,
    run: RunFolder,
    folder: RunFolder,
    anew: RunFolder | None,
    stored: Sequence[StoredRows],
) -> dict[str, Any]:
    """Return the accuracies and differences of a split, by part, and the recalls before and after.

    stored: the stored rows of the update, and of the run that was trained anew.
    """
    after = parts_of(split, folder, stored[0])
    before = None
    if len(after["old"].row_ids):
        before = predictions_before(run, split, stored[0], after["old"].id2label)
    else:
        logger.warning("%s: no old rows to evaluate", split)
    other = None if anew is None else parts_of(split, anew, stored[1])
    after["all"] = joint(after)
    if other is not None:
        other["all"] = joint(other)
    found: dict[str, Any] = {}
    for part, predictions in after.items():
        if not len(predictions.row_ids):
            continue
        found[part] = {"num_images": len(predictions.row_ids), "after": accuracy_of(predictions)}
        if part == "old" and before is not None:
            found[part]["before"] = accuracy_of(before)
            found[part]["forgetting"] = negative(difference(before, predictions))
        if other is not None:
            found[part]["anew"] = accuracy_of(other[part])
            found[part]["gain_anew"] = difference(predictions, other[part])
    return {"parts": found, "recalls": recalls(before, after["all"])}


def recalls(before: Predictions | None, after: Predictions) -> list[dict[str, Any]]:
    """Return the recall of each class that has images, after the update and before it."""
    found, own = [], {} if before is None else before.metrics["per_class"]
    intervals = after.metrics["intervals"]["per_class"]
    for name, values in after.metrics["per_class"].items():
        if not values["num_images"]:
            continue
        earlier = own.get(name, {"num_images": 0})
        found.append(
            {
                "name": name, "num_images": values["num_images"],
                "after": {"value": values["recall"], "interval": intervals[name]["recall"]},
                "before": {
                    "value": earlier["recall"],
                    "interval": before.metrics["intervals"]["per_class"][name]["recall"],
                } if before is not None and earlier["num_images"] else None,
            }
        )  # fmt: skip
    return found

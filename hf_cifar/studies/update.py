"""Continue a finished run with new rows and classes: old rows are replayed, and what it forgets is measured.

Source: Chaudhry et al., On Tiny Episodic Memories in Continual Learning, 2019.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from hf_cifar.config.command_line import parse
from hf_cifar.config.data import DataConfig
from hf_cifar.config.objects import require_object
from hf_cifar.config.recipes import expand_tokens, yaml_tokens
from hf_cifar.config.run import RunConfig
from hf_cifar.config.studies import UpdateConfig
from hf_cifar.config.training import TrainingConfig
from hf_cifar.data.labels import class_counts, label_array
from hf_cifar.data.split import Split
from hf_cifar.data.splits import DataSource
from hf_cifar.data.stored import StoredRows
from hf_cifar.errors import UserError
from hf_cifar.evaluation.comparison import compare_predictions
from hf_cifar.evaluation.predictions import Predictions, saved_splits
from hf_cifar.hub.origin import public_name
from hf_cifar.report.update import render_page
from hf_cifar.runs.folder import RunFolder, write_json, write_text
from hf_cifar.runs.processes import is_main_process, start_processes
from hf_cifar.runs.resume import EVALUATION
from hf_cifar.studies.replay import (
    class_names,
    count_copies,
    counts_of,
    describe_rows,
    store_rows,
    stored_offset,
)
from hf_cifar.studies.series import check_same
from hf_cifar.text import listed

logger = logging.getLogger(__name__)
# Options of the run that say how data are read, whichever they are. The others select data, and stay behind.
DATA_KEPT = {
    "train_val_split", "split_seed", "pixel_store", "check_images", "on_bad_image", "max_image_pixels",
    "value_range",
}  # fmt: skip
# Options of the run that belong to its output, its machine or its weights.
LEFT_OPEN = {
    "model_name_or_path", "model_revision", "grow_head", "output_dir", "run_name", "seeds", "do_predict",
    "check_leakage", "push_to_hub", "precision", "memory_format", "attention", "torch_compile",
    "dataloader_num_workers", "freeze_batch_norm", "metric_for_best_model",
}  # fmt: skip
SET_HERE = (
    "model_name_or_path",
    "grow_head",
    "stored_rows",
    "seeds",
    "resume_from_checkpoint",
    "push_to_hub",
)
ANEW = "anew"  # the folder of the run that is trained anew
LOGIT_OF_UNKNOWN = -1e4  # of a class that the old model does not have: probability 0


def config_of_update(run: RunFolder, argv: Sequence[str]) -> RunConfig:
    """Return the options of an update: those of the run, replaced by the given ones.

    Raises: UserError for a run that cannot be continued, or an option that the update sets itself.
    """
    run.require_finished()
    given = expand_tokens(argv)
    flags = {
        token.partition("=")[0].removeprefix("--") for token in given if token.startswith("--")
    }
    for name in SET_HERE:
        if name in flags:
            raise UserError(f"--{name} does not work with hf-cifar update; leave it out")
    for name, what in (
        ("dataset_name", "the new data"),
        ("output_dir", "a new folder for the updated run"),
    ):
        if name not in flags:
            raise UserError(f"--{name} is missing; pass {what}")
    if "ensemble" in run.model_config().get("model_type", ""):
        raise UserError(
            f"{run.path} is an ensemble, which cannot be trained on; update one of its runs"
        )
    before = run.load_config()
    data = {each.name for each in dataclasses.fields(DataConfig)}
    # When to evaluate and save belongs together.
    left_open = LEFT_OPEN | (set() if flags.isdisjoint(EVALUATION) else EVALUATION)
    kept = {
        name: value
        for name, value in before.options().items()
        if name not in left_open and (name in DATA_KEPT or name not in data)
    }
    if kept["class_balance"] == "none" and not _has_many_labels(run):
        # Each old class has fewer rows than a new one.
        kept["class_balance"] = "post_hoc"
    values = run.facts().get("value_range")
    if values is not None:
        kept["value_range"] = ",".join(map(str, values))
    folder = _folder_of(given)
    if folder.resolve() == run.path.resolve():
        raise UserError(f"--output_dir {folder} is the run itself; pass a new folder")
    return RunConfig.parse(
        [
            *yaml_tokens(yaml.safe_dump(kept), str(run.config_path)), *given,
            "--model_name_or_path", str(run.path), "--grow_head", "true",
            "--stored_rows", str(RunFolder(folder).stored_path), "--resume_from_checkpoint", "last",
        ],
        "hf-cifar update",
    )  # fmt: skip


def _has_many_labels(run: RunFolder) -> bool:
    return run.model_config().get("problem_type") == "multi_label_classification"


def _folder_of(tokens: Sequence[str]) -> Path:
    train, *_ = parse([TrainingConfig], tokens, "hf-cifar update")
    return Path(train.output_dir)


def config_anew(run: RunFolder, config: RunConfig) -> RunConfig:
    """Return the options of the same training from the model that the run, or the first one of its chain,
    started from."""
    before = run.load_config()
    while before.model.grow_head:
        run = RunFolder(str(before.model.model_name_or_path))
        before = run.load_config()
    require_object(before.model.model_name_or_path, "model")
    folder = RunFolder(Path(config.train.output_dir) / ANEW)
    model = dataclasses.replace(
        config.model,
        model_name_or_path=before.model.model_name_or_path,
        model_revision=before.model.model_revision,
        grow_head=False,
    )
    data = dataclasses.replace(config.data, stored_rows=str(folder.stored_path))
    return dataclasses.replace(
        config.with_training(
            output_dir=str(folder.path),
            teacher=before.train.teacher,
            feature_hint=before.train.feature_hint,
        ),
        model=model,
        data=data,
    )


def update_run(run: str | Path, config: RunConfig, own: UpdateConfig) -> dict[str, Any]:
    """Continue a run with new data, in a folder of its own; the same call continues after an interruption.

    config: as `config_of_update` returns it. Returns the content of update.json, see
    `summarise_update`; {} in a process that is not the first.

    Raises: UserError before training for data that cannot be read, or a folder that holds another run.
    """
    from hf_cifar.studies.execution import alone_in, run_series  # imports torch

    files, configs = RunFolder(run), [config]
    if own.compare_anew:
        configs.append(config_anew(files, config))
    check_same(configs)
    processes = start_processes(config)
    if is_main_process():
        for each in configs:
            store_rows(files, each, own, anew=each is not config)
    processes.wait_for_all()
    sources = open_sources(configs)
    if is_main_process():
        announce(files, sources[0], own)
    for each, source in zip(configs, sources, strict=True):
        run_series([each], source)
    summary: dict[str, Any] = {}
    if is_main_process():
        summary = summarise_update(files, config, own)
        folder = RunFolder(config.train.output_dir)
        with alone_in(folder.path):
            write_json(folder.update_path, summary)
            write_text(folder.update_page_path, render_page(summary))
    return summary


def open_sources(configs: Sequence[RunConfig]) -> list[DataSource]:
    """Open the data of each run. If they cannot be used, nothing is left of a run that has not begun."""
    try:
        sources = [DataSource(config.data) for config in configs]
        for source in sources:
            _ = source.splits
        return sources
    except UserError:
        for folder in (RunFolder(config.train.output_dir) for config in reversed(configs)):
            if is_main_process() and not folder.has_run:
                folder.stored_path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # it has other files
                    folder.path.rmdir()
        raise


def announce(run: RunFolder, source: DataSource, own: UpdateConfig) -> None:
    """State which classes are new, and how many training rows each class has, new and stored."""
    names, known = list(source.splits.id2label.values()), set(class_names(run))
    train = source.splits.train
    assert isinstance(train, Split)  # stored rows are not combined with a stream
    counts = counts_of(train)
    is_new = np.array([name not in known for name in names])
    new = [name for name in names if name not in known]
    logger.info(
        "%s new class%s%s; training rows of the others: %s",
        f"{len(new):,}" if new else "no", "" if len(new) == 1 else "es",
        f": {describe_rows(new, counts[is_new])}" if new else "",
        describe_rows([name for name in names if name in known], counts[~is_new]),
    )  # fmt: skip
    if not own.replay:
        logger.warning(
            "--replay 0: no old row is trained on, and the model forgets what the new data do not show"
        )
    stored = StoredRows.load(str(source.config.stored_rows))
    if copies := count_copies(train, stored):
        logger.warning(
            "%s new training images are also validation or test images of the run, whose accuracy is then "
            "too high; remove them from %s", f"{copies:,}", source.config.dataset_name,
        )  # fmt: skip
    absent = [name for name, count in zip(names, counts, strict=True) if not count]
    if absent and own.replay:
        logger.warning("no training rows of %s", listed(absent))


def parts_of(predictions: Predictions, run: RunFolder) -> dict[str, Predictions]:
    """Divide the predictions of an update into those of new rows and of stored, old ones.

    Row ids of the new rows stay; those of old rows become their number among the stored rows of the split.
    """
    stored = StoredRows.load(run.stored_path)
    offset = stored_offset(run.facts(), predictions.split, stored)
    is_old = predictions.row_ids >= offset
    return {
        "old": selected(predictions, is_old, predictions.row_ids - offset),
        "new": selected(predictions, ~is_old, predictions.row_ids),
    }


def selected(predictions: Predictions, rows: np.ndarray, row_ids: np.ndarray) -> Predictions:
    """Return the predictions of some rows, a mask [N], with other ids."""
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
    """Return the predictions of both parts together; old rows have ids after those of the new ones."""
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
    `anew` if trained anew, and differences with paired intervals: `forgetting` (before minus after) and
    `gain_anew` (anew minus after).
    """
    folder = RunFolder(config.train.output_dir)
    stored, facts = StoredRows.load(folder.stored_path), folder.facts()
    names, known = class_names(folder), class_names(run)
    anew = RunFolder(folder.path / ANEW) if own.compare_anew else None
    stored_counts = np.zeros(len(names), int)
    train = stored.of("train").with_format(None)
    if len(train):
        stored_counts[: len(known)] = class_counts(label_array(train), len(known))
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
    split: str, run: RunFolder, folder: RunFolder, anew: RunFolder | None, stored: StoredRows
) -> dict[str, Any]:
    """Return the accuracies and differences of a split, by part, and the recalls before and after."""
    after = parts_of(Predictions.load(folder.path, split), folder)
    before = None
    if len(after["old"].row_ids):
        before = predictions_before(run, split, stored, after["old"].id2label)
    else:
        logger.warning("%s: no old rows to evaluate", split)
    other = None if anew is None else parts_of(Predictions.load(anew.path, split), anew)
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

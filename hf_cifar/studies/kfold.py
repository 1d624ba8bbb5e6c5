"""k-fold cross-validation: a complete run for each fold, and the predictions of all of them together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_cifar.config.run import RunConfig
from hf_cifar.data.splits import OUT_OF_FOLD, DataSource
from hf_cifar.errors import UserError
from hf_cifar.evaluation.predictions import Predictions
from hf_cifar.evaluation.tables import render_number
from hf_cifar.report.page import write_report
from hf_cifar.runs.folder import RunFolder, write_json
from hf_cifar.runs.processes import is_main_process, start_processes
from hf_cifar.studies.series import check_same, check_series, metrics_of, run_of, spread
from hf_cifar.studies.student import ENSEMBLE, STUDENT, distil, require_one_process
from hf_cifar.text import render_table


def cross_validate(
    config: RunConfig,
    folds: int,
    source: DataSource | None = None,
    student: RunConfig | None = None,
) -> dict[str, Any]:
    """Train a complete run for each fold, in output_dir/fold-NUMBER, and collect their predictions.

    Each image of train is predicted once, by the run that was not trained on it: these predictions are in
    predictions/out_of_fold.parquet, their metrics in metrics.json, and report.html shows them. The same
    call continues after an interruption, and other processes may make it at the same time; see `run_series`.
    student: the options of a model that learns from the ensemble of all runs, see `student_of`.
    Returns the content of folds.json, see `summarise_folds`. `together` has the metrics on test of the
    ensemble and of its student, and is empty without a student or --do_predict.

    Raises: UserError before the first run, for options that do not fit or folders that hold other runs.
    """
    from hf_cifar.studies.execution import alone_in, run_series  # imports torch

    configs = runs_of_folds(config, folds)
    if student is not None:
        require_one_process()
    source = source or DataSource(configs[0].data)
    check_same(configs if student is None else [*configs, student])
    start_processes(config).wait_for_all()  # none may write before all have checked the folders
    run_series(configs, source)
    if student is not None:
        distil(configs, student, source)
    folder, summary = RunFolder(config.train.output_dir), summarise_folds(configs)
    has_test = student is not None and config.train.do_predict
    names = list(summary["metrics"]["test"]) if has_test else []
    summary["together"] = metrics_together(folder, names) if has_test else {}
    if is_main_process():
        with alone_in(folder.path):
            write_json(folder.folds_path, summary)
            folder.save_config(shared_options(config, folds))
            out_of_fold(configs).save(folder.path)
            write_report(folder.path)
    return summary


def runs_of_folds(config: RunConfig, folds: int) -> list[RunConfig]:
    """Return the options of each run: those of a single run that validates on one of the folds.

    Raises: UserError for options of a single run, or a folder that holds other runs.
    """
    data, train = config.data, config.train
    for name, value, default in (
        ("--seeds", train.seeds, 1), ("--num_folds", data.num_folds, None), ("--fold", data.fold, None),
        ("--streaming", data.streaming, False),
    ):  # fmt: skip
        if value != default:
            raise UserError(f"{name} does not work with hf-cifar kfold; leave it out")
    check_series(config, "hf-cifar kfold")
    return [
        dataclasses.replace(
            run_of(config, f"fold-{fold}", resume_from_checkpoint="last"),
            data=dataclasses.replace(data, num_folds=folds, fold=fold),
        )
        for fold in range(1, folds + 1)
    ]


def shared_options(config: RunConfig, folds: int) -> RunConfig:
    """Return the options that the runs of all folds share."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, num_folds=folds))


def out_of_fold(configs: Sequence[RunConfig]) -> Predictions:
    """Join the validation predictions of all folds, by row.

    Each run has calibrated its own logits. For multi-label data, the thresholds are the means over the runs.
    """
    parts = [Predictions.load(config.train.output_dir, "validation") for config in configs]
    row_ids = np.concatenate([part.row_ids for part in parts])
    order = np.argsort(row_ids)
    thresholds = [part.thresholds for part in parts if part.thresholds is not None]
    return Predictions(
        split=OUT_OF_FOLD,
        row_ids=row_ids[order],
        labels=np.concatenate([part.labels for part in parts])[order],
        logits=np.concatenate([part.logits for part in parts])[order],
        id2label=parts[0].id2label,
        thresholds=np.mean(thresholds, axis=0) if thresholds else None,
        skipped_rows=tuple(sorted(row for part in parts for row in part.skipped_rows)),
    )


def summarise_folds(configs: Sequence[RunConfig]) -> dict[str, Any]:
    """Return the spread of the headline metrics over the folds, as plain values.

    `metrics` holds, by split and metric, `values` in the order of the folds, their `mean`, and their standard
    deviation `std` (of a sample: n - 1). There is no interval of the mean: the runs share most of their
    training images, so their metrics are not independent. `accuracy_intervals` are those of the folds.
    """
    folders = [RunFolder(config.train.output_dir) for config in configs]
    own = [folder.metrics()["validation"] for folder in folders]
    return {
        "runs": [folder.path.name for folder in folders],
        "num_images": [metrics["num_images"] for metrics in own],
        "accuracy_intervals": [metrics["intervals"]["accuracy"] for metrics in own],
        "metrics": {
            split: {name: spread(values) for name, values in found.items()}
            for split, found in metrics_of(configs).items()
        },
    }


def metrics_together(folder: RunFolder, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the metrics on test of the ensemble of all folds and of its student."""
    found = {}
    for name in (ENSEMBLE, STUDENT):
        metrics = RunFolder(folder.path / name).metrics()["test"]
        found[name] = {each: metrics[each] for each in names}
    return found


def render_folds(folder: str | Path) -> str:
    """Render a text table of the metrics: of all predictions together, and their spread over the folds."""
    summary, pooled = RunFolder(folder).folds(), RunFolder(folder).metrics()[OUT_OF_FOLD]
    intervals = pooled["intervals"]
    rows = [
        [
            name,
            render_number(pooled[name]),
            "[{:.4f}, {:.4f}]".format(*intervals[name]) if intervals.get(name) else "-",
            render_number(found["mean"]),
            render_number(found["std"]),
            render_number(min(found["values"])),
            render_number(max(found["values"])),
        ]
        for name, found in summary["metrics"]["validation"].items()
    ]
    num_folds = len(summary["runs"])
    title = f"out of fold, {pooled['num_images']:,} images"
    header = [
        title,
        "all",
        "95% interval",
        f"mean of {num_folds} folds",
        "std",
        "lowest",
        "highest",
    ]
    parts = [render_table(header, rows)]
    if "test" in summary["metrics"]:
        together = summary["together"]
        rows = [
            [
                name,
                *(render_number(each) for each in (found["mean"], found["std"])),
                *(render_number(metrics[name]) for metrics in together.values()),
            ]
            for name, found in summary["metrics"]["test"].items()
        ]
        header = ["test", f"mean of {num_folds} runs", "std", *together]
        parts.append(render_table(header, rows))
    places = [f"report: {RunFolder(folder).page_path}"]
    if RunFolder(Path(folder) / STUDENT).facts():
        places.append(f"student: {Path(folder) / STUDENT}")
    return "\n\n".join([*parts, "\n".join(places)])

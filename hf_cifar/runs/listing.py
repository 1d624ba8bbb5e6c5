"""A table of the runs in folders, read from their files. Imports neither torch nor transformers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hf_cifar.errors import UserError
from hf_cifar.hub.reach import looks_like_path
from hf_cifar.runs.folder import RunFolder
from hf_cifar.text import render_table

COLUMNS = ("run", "model", "data", "epochs", "seed", "validation", "test", "state", "date")
SPLITS = ("validation", "test")


def list_runs(folders: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Return one record for each run in or below the folders, by data, the best on validation first.

    Keys: `run` (its folder), `model`, `data`, `epochs`, `seed`, `validation` and `test` (None, or accuracy
    and its 95% interval), `state` and `date` (ISO 8601, UTC). A damaged run has None for what cannot be read,
    and a state that names the damage.

    Raises: UserError if a folder is missing.
    """
    missing = [folder for folder in folders if not Path(folder).is_dir()]
    if missing:
        raise UserError(f"no folder {missing[0]}; pass folders that contain runs")
    found = {path: None for folder in folders for path in find_runs(folder)}
    return sorted((read_run(path) for path in found), key=_order)


def find_runs(folder: str | Path) -> Iterator[Path]:
    """Yield the run folders in or below a folder."""
    for path, below, _ in os.walk(folder):
        below[:] = [name for name in below if not name.startswith((".", "checkpoint-"))]
        if RunFolder(path).has_run:
            yield Path(path)


def read_run(path: Path) -> dict[str, Any]:
    """Return the record of one run, see `list_runs`."""
    folder = RunFolder(path)
    record: dict[str, Any] = {"run": str(path)} | dict.fromkeys(COLUMNS[1:])
    finished = folder.facts_path.exists()
    dated = folder.facts_path if finished else folder.config_path
    date = datetime.fromtimestamp(dated.stat().st_mtime, UTC)
    record["date"] = date.isoformat(timespec="seconds")
    record["state"] = "finished"
    try:
        options = folder.options()
        record |= {
            "model": str(options["model_name_or_path"]),
            "data": str(options["dataset_name"]),
            "epochs": float(options["num_train_epochs"]),
            "seed": options["seed"],
        }
        if not finished:
            return record | {"state": _unfinished(folder)}
        facts, metrics = folder.facts(), folder.metrics()
        if combined := facts.get("combined"):
            kind, count = combined["method"].replace("_", " "), len(combined["runs"])
            record["model"] = f"{kind} of {count} run{'s' if count > 1 else ''}"
        if not metrics:
            raise UserError(f"{folder.metrics_path.name} is missing")
        record["epochs"] = float(facts["epochs"])
        record["date"] = str(facts.get("finished", record["date"]))
        record |= {split: _score(metrics[split]) for split in SPLITS if split in metrics}
    except UserError as error:
        record["state"] = str(error).removeprefix(f"{path}/").partition(";")[0]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        record["state"] = f"damaged: {type(error).__name__} {error}"
    return record


def render_runs(records: Sequence[dict[str, Any]]) -> str:
    """Render the records of `list_runs` as a text table."""
    return render_table(COLUMNS, [_cells(record) for record in records], left=3)


def _cells(record: dict[str, Any]) -> list[str]:
    cells = {name: "-" if value is None else str(value) for name, value in record.items()}
    for name in ("model", "data"):
        if record[name] is not None and looks_like_path(record[name]):
            cells[name] = Path(record[name]).name
    for split in SPLITS:
        if record[split] is not None:
            interval = record[split]["interval"]
            cells[split] = f"{record[split]['accuracy']:.4f}"
            cells[split] += f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""
    if record["epochs"] is not None:
        cells["epochs"] = f"{record['epochs']:g}"
    cells["date"] = record["date"][:16].replace("T", " ")
    return [cells[name] for name in COLUMNS]


def _order(record: dict[str, Any]) -> tuple:
    accuracy = record["validation"]["accuracy"] if record["validation"] else -1.0
    return record["data"] is None, record["data"] or "", -accuracy, record["run"]


def _score(metrics: dict[str, Any]) -> dict[str, Any]:
    interval = metrics.get("intervals", {}).get("accuracy")
    return {
        "accuracy": float(metrics["accuracy"]),
        "interval": interval and [float(end) for end in interval],
    }


def _unfinished(folder: RunFolder) -> str:
    """Return the state of an unfinished run; it may still be running."""
    checkpoints, state = folder.checkpoints(), folder.trial().get("state")
    if state in ("pruned", "failed"):  # trials of a search
        return str(state)
    if not checkpoints:
        return "unfinished, no checkpoint"
    return f"unfinished at step {checkpoints[0].name.partition('-')[2]}"

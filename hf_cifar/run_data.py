"""The data of a finished run, opened again: the same rows, or an error."""

from __future__ import annotations

import dataclasses

from hf_cifar.config.objects import require_object
from hf_cifar.data.split import trained_rows, without_rows
from hf_cifar.data.splits import DataSource, Splits
from hf_cifar.data.streams import Stream
from hf_cifar.errors import UserError
from hf_cifar.runs.folder import RunFolder


def open_data(
    run: RunFolder, dataset_name: str | None = None, flag: str = "--dataset_name"
) -> DataSource:
    """Open the data of a run. dataset_name: where they are now, if they have moved. flag: its option.

    Raises: UserError for data that are missing, were a Python object, or have changed (validation could then
    have images that the run was trained on).
    """
    require_held_out(run)
    data = run.data()
    if dataset_name is not None:
        data = dataclasses.replace(data, dataset_name=dataset_name)
    require_object(data.dataset_name, "data set")
    source, recorded = DataSource(data), run.facts().get("split_hash")
    try:
        found = source.splits.hash
    except UserError as error:
        if dataset_name is not None:
            raise
        raise UserError(f"{error}; if the data has moved, pass its location as {flag}") from None
    if recorded is not None and found != recorded:
        raise UserError(
            f"{data.dataset_name} does not hold the data of {run.path}, or the data has changed; "
            f"restore it, or pass the folder where the data is now as {flag}"
        )
    return source


def require_held_out(run: RunFolder) -> None:
    """Raises: UserError for a combination of runs that were trained on each other's validation images."""
    if not run.facts().get("combined", {}).get("has_validation", True):
        raise UserError(
            f"{run.path} combines runs that were trained on each other's validation images, so none was held "
            "out; evaluate it on test, or on other images"
        )


def used_splits(run: RunFolder, source: DataSource) -> Splits:
    """Return the splits of a run without the rows that it left out, which are unreadable or doubted."""
    facts, splits = run.facts(), source.splits
    skipped = facts.get("skipped_rows", {}).get("validation", [])
    validation = without_rows(splits.validation, skipped)
    if isinstance(splits.train, Stream):
        return dataclasses.replace(splits, validation=validation)
    return dataclasses.replace(
        splits, train=trained_rows(splits.train, facts), validation=validation
    )

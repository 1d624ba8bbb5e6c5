"""`hf-cifar predict`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_cifar.commands.command import Command, quieten, require_model
from hf_cifar.config.deployment import BatchPredictionConfig, PredictConfig
from hf_cifar.errors import UserError
from hf_cifar.runs.processes import is_main_process


def predict(config: PredictConfig, batch: BatchPredictionConfig, paths: Sequence[str]) -> int:
    """Classify files, or a data set; exit status 1 if a file could not be read."""
    require_model(config)
    if batch.dataset_name is None:
        return _predict_files(config, paths)
    if paths:
        raise UserError(f"pass --dataset_name {batch.dataset_name} or {paths[0]}, not both")

    from hf_cifar.deploy.batch_prediction import predict_dataset

    quieten(is_main_process())
    manifest = predict_dataset(config, batch)
    if manifest is not None:  # the last process to end
        failed = manifest["num_errors"]
        print(
            f"{batch.output}: {manifest['num_rows']:,} rows in {manifest['parts']:,} Parquet files; "
            f"{failed:,} image{'' if failed == 1 else 's'} could not be read"
        )
    return 0


def _predict_files(config: PredictConfig, paths: Sequence[str]) -> int:
    """Print one JSON record for each image."""
    missing = [path for path in paths if not Path(path).expanduser().exists()]
    if not paths or len(missing) == len(paths):
        raise UserError(
            f"no such file or folder: {missing[0]}"
            if missing
            else "no image to predict; pass files or folders, or --dataset_name"
        )

    from hf_cifar.predict import predict_files

    quieten(True)
    failed = 0
    for record in predict_files(config, paths):
        # A path that is not valid Unicode can only be printed with escapes.
        plain = record["path"].isprintable()
        print(json.dumps(record, ensure_ascii=not plain), flush=True)
        failed += "error" in record
    if failed:
        print(f"hf-cifar: {failed} image(s) could not be read", file=sys.stderr)
    return 1 if failed else 0


COMMAND = Command(
    "classify images with a saved model: files as JSON lines, a data set as Parquet", predict,
    (PredictConfig, BatchPredictionConfig), "FILE_OR_FOLDER ...",
)  # fmt: skip

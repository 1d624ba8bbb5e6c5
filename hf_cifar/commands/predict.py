"""`hf-cifar predict`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_cifar.commands.command import Command, quieten, require_model
from hf_cifar.config.deployment import PredictConfig
from hf_cifar.errors import UserError


def predict(config: PredictConfig, paths: Sequence[str]) -> int:
    """Print one JSON record for each image; exit status 1 if one could not be read."""
    require_model(config)
    missing = [path for path in paths if not Path(path).expanduser().exists()]
    if not paths or len(missing) == len(paths):
        raise UserError(
            f"no such file or folder: {missing[0]}"
            if missing
            else "no image to predict; pass files or folders"
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
    "classify image files with a saved model, as JSON lines", predict, (PredictConfig,),
    "FILE_OR_FOLDER ...",
)  # fmt: skip

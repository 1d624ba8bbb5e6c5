"""`hf-cifar predict`."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_cifar.commands.command import quieten, require_model, wants_help
from hf_cifar.config.command_line import check_option_names, parse_dataclasses
from hf_cifar.config.deployment import PredictConfig
from hf_cifar.config.fields import field_names
from hf_cifar.errors import UserError


def predict(argv: Sequence[str]) -> int:
    """classify image files with a saved model, as JSON lines"""
    if not wants_help(argv):
        check_option_names(argv, field_names(PredictConfig))
    config, paths = parse_dataclasses(
        [PredictConfig],
        argv,
        "hf-cifar predict",
        usage="hf-cifar predict [options] FILE_OR_FOLDER ...",
    )
    require_model(config)
    missing = [path for path in paths if not Path(path).exists()]
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
        try:
            print(json.dumps(record, ensure_ascii=False), flush=True)
        except (
            BrokenPipeError
        ):  # who reads has seen enough, as `head`; what is left must not go there at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        failed += "error" in record
    if failed:
        print(f"hf-cifar: {failed} image(s) could not be read", file=sys.stderr)
    return 1 if failed else 0

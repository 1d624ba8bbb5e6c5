"""`hf-cifar serve`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from hf_cifar.commands.command import Command, require_model
from hf_cifar.config.deployment import PredictConfig
from hf_cifar.config.serving import ServeConfig
from hf_cifar.errors import UserError
from hf_cifar.extras import require
from hf_cifar.logs import show_notes


def serve(predict: PredictConfig, config: ServeConfig, arguments: Sequence[str]) -> int:
    """Serve a model over HTTP until a signal ends it."""
    if len(arguments) > 1 or (arguments and predict.model_name_or_path):
        raise UserError(f"serve takes one model; leave out {arguments[-1]}")
    if arguments:
        predict = dataclasses.replace(predict, model_name_or_path=arguments[0])
    require_model(predict)
    for module in ("fastapi", "uvicorn", "httptools", "python_multipart", "prometheus_client"):
        require(module, extra="serve")

    from hf_cifar.serve import server

    show_notes(True)
    server.serve(predict, config)
    return 0


COMMAND = Command(
    "answer requests over HTTP with a saved model, and show a page to try it", serve,
    (PredictConfig, ServeConfig), "RUN_OR_ONNX",
)  # fmt: skip

"""The formats of an exported model: how each is written, and run again."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.export import Dim

from hf_cifar.deploy.graph import ClassifierGraph
from hf_cifar.errors import UserError
from hf_cifar.extras import require
from hf_cifar.models.exported import (
    DISTANCES,
    LOGITS,
    METADATA,
    PROBABILITIES,
    session_of,
)

OUTPUTS = [LOGITS, PROBABILITIES]
NOTES = f"{METADATA}.json"  # our metadata inside a file of torch.export
EXAMPLE = (
    2,
    40,
    50,
    3,
)  # the shape of images; all sizes differ, so that the exporter does not equate two of them
MAX_BYTES = 2**31  # of a protobuf message

# The input of a model -> logits [N, K] and probabilities [N, K].
Runner = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class Format(NamedTuple):
    """How to write a graph with its metadata to a file, and how to run that file on the CPU.

    packages: (module, extra) that both need.
    """

    write: Callable[[ClassifierGraph, dict[str, Any], Path], None]
    open: Callable[[Path], Runner]
    packages: tuple[tuple[str, str], ...] = ()


def _example(graph: ClassifierGraph, size: list[int]) -> tuple[Tensor, dict[int, Any]]:
    """An input of a graph, and its dynamic sizes. size: [height, width] of pixel_values."""
    if graph.pixels is None:
        return torch.zeros(2, 3, *size), {0: Dim("batch")}
    sizes = {0: Dim("batch"), 1: Dim("height"), 2: Dim("width")}
    return torch.zeros(EXAMPLE, dtype=torch.uint8), sizes


def onnx_program(graph: ClassifierGraph, metadata: dict[str, Any]) -> Any:
    """Make an onnx.ModelProto of a graph, with its metadata as JSON.

    Raises: UserError for a model of more than 2 GB.
    """
    num_bytes = sum(each.numel() * each.element_size() for each in graph.parameters())
    if num_bytes >= MAX_BYTES:
        raise UserError(
            f"the model has {num_bytes / 1e9:.1f} GB of weights, and an ONNX file holds less than 2 GB; pass "
            "--format torch_export"
        )
    example, sizes = _example(graph, metadata["input_size"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the exporter's own code
        program = torch.onnx.export(
            graph, (example,), dynamo=True, dynamic_shapes=(sizes,), external_data=False,
            input_names=[metadata["input"]], verbose=False,
            output_names=[*OUTPUTS, DISTANCES] if graph.rejects else OUTPUTS,
        )  # fmt: skip
    model = program.model_proto
    require("onnx", extra="deploy").helper.set_model_props(
        model, {METADATA: json.dumps(metadata, ensure_ascii=False)}
    )
    return model


def write_onnx(graph: ClassifierGraph, metadata: dict[str, Any], path: Path) -> None:
    path.write_bytes(onnx_program(graph, metadata).SerializeToString())


def open_onnx(path: Path) -> Runner:
    session = session_of(path.read_bytes(), torch.get_num_threads())
    (given,) = session.get_inputs()
    return lambda images: session.run(OUTPUTS, {given.name: images})


def write_torch_export(graph: ClassifierGraph, metadata: dict[str, Any], path: Path) -> None:
    example, sizes = _example(graph, metadata["input_size"])
    program = torch.export.export(graph, (example,), dynamic_shapes=(sizes,))
    notes = {NOTES: json.dumps(metadata, ensure_ascii=False)}
    torch.export.save(program, path, extra_files=notes)


def open_torch_export(path: Path) -> Runner:
    module = torch.export.load(path).module()

    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode():
            logits, probabilities, *_ = module(torch.from_numpy(images))
        return logits.numpy(), probabilities.numpy()

    return run


def write_openvino(graph: ClassifierGraph, metadata: dict[str, Any], path: Path) -> None:
    """Write PATH and its weights, with the ending .bin."""
    openvino = require("openvino", extra="openvino")
    source = path.with_suffix(".onnx")
    write_onnx(graph, metadata, source)
    model = openvino.Core().read_model(source)  # convert_model would send telemetry
    model.set_rt_info(json.dumps(metadata, ensure_ascii=False), METADATA)
    openvino.save_model(model, path, compress_to_fp16=False)
    source.unlink()


def open_openvino(path: Path) -> Runner:
    openvino = require("openvino", extra="openvino")
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(path, "CPU", options)

    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = compiled(images)
        return found[LOGITS], found[PROBABILITIES]

    return run


ONNX_PACKAGES = (("onnx", "deploy"), ("onnxscript", "deploy"), ("onnxruntime", "deploy"))
FORMATS = {
    "onnx": Format(write_onnx, open_onnx, ONNX_PACKAGES),
    "torch_export": Format(write_torch_export, open_torch_export),
    "openvino": Format(write_openvino, open_openvino, (*ONNX_PACKAGES, ("openvino", "openvino"))),
}
FORMATS["server"] = FORMATS["onnx"]


def require_format(name: str) -> None:
    """Raises: UserError if a package that a format needs is missing."""
    for package, extra in FORMATS[name].packages:
        require(package, extra=extra)

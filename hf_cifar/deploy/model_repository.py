"""The folder from which Triton and OpenVINO Model Server load a model: config.pbtxt and 1/model.onnx."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from hf_cifar.deploy.preflight import SERVER_CONFIG
from hf_cifar.models.exported import DISTANCES, IMAGES, LOGITS, PIXEL_VALUES, PROBABILITIES

VERSION, MODEL_FILE, LABELS_FILE = "1", "model.onnx", "labels.txt"
MAX_BATCH_SIZE = 64


def write_server_files(
    folder: Path,
    name: str,
    labels: Sequence[str],
    size: tuple[int, int] | None,
    *,
    rejects: bool = False,
) -> None:
    """Write the configuration and the labels of a model, whose file is in VERSION below the folder.

    name: of the folder, once it is in its place. size: (height, width) of `pixel_values`; None for a model
    that takes images of any size. rejects: the model also returns distances.
    """
    config = server_config(name, len(labels), size, rejects=rejects)
    (folder / SERVER_CONFIG).write_text(config, encoding="utf-8")
    # One label a line; Triton returns them for its classification extension.
    lines = "".join(f"{' '.join(label.split())}\n" for label in labels)
    (folder / LABELS_FILE).write_text(lines, encoding="utf-8")


def server_config(
    name: str, num_labels: int, size: tuple[int, int] | None, *, rejects: bool = False
) -> str:
    """Render config.pbtxt: inputs and outputs without the batch dimension; the server batches requests.

    Source: https://github.com/triton-inference-server/common, protobuf/model_config.proto.
    """
    if size is None:
        model_input = f'name: "{IMAGES}", data_type: TYPE_UINT8, dims: [ -1, -1, 3 ]'
    else:
        dims = f"[ 3, {size[0]}, {size[1]} ]"
        model_input = f'name: "{PIXEL_VALUES}", data_type: TYPE_FP32, dims: {dims}'
    outputs = [
        f'name: "{LOGITS}", data_type: TYPE_FP32, dims: [ {num_labels} ]',
        f'name: "{PROBABILITIES}", data_type: TYPE_FP32, dims: [ {num_labels} ], '
        f'label_filename: "{LABELS_FILE}"',
    ]
    if rejects:  # one number for each image; the batch is the only dimension
        outputs.append(
            f'name: "{DISTANCES}", data_type: TYPE_FP32, dims: [ 1 ], reshape: {{ shape: [ ] }}'
        )
    lines = [
        f"name: {json.dumps(name)}",
        'platform: "onnxruntime_onnx"',
        f"max_batch_size: {MAX_BATCH_SIZE}",
        f"input [ {{ {model_input} }} ]",
        f"output [ {', '.join(f'{{ {each} }}' for each in outputs)} ]",
        "dynamic_batching { }",
    ]
    return "\n".join(lines) + "\n"

"""Correct the biases of a quantised network: rounding the weights shifts the mean of each channel, and a bias
can shift it back.

Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, 2019.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np

from hf_cifar.models.exported import PIXEL_VALUES, session_of

BATCH = 50
MAX_STEPS = 2**24
LAYERS = ("Conv", "Gemm")  # whose bias is an input; their channels are axis 1 of the output


class Bias(NamedTuple):
    """A bias of a layer in integers [C]: its tensor in the graph, and its quantisation scale, [C] or [1]."""

    tensor: Any
    step: np.ndarray


def correct_biases(
    content: bytes, prepared: bytes, pixel_values: np.ndarray, num_threads: int
) -> bytes:
    """Return a quantised model with biases that give each channel the mean that it has in the float model.

    content: ONNX with integers as DequantizeLinear nodes; prepared: the float model that it was made of;
    pixel_values [N, 3, h, w]: of training images. Layers are corrected in order, because each changes the
    means after it.
    """
    import onnx
    from onnx import numpy_helper

    program = onnx.load_model_from_string(content)
    biases = biases_of(program)
    wanted = channel_means(
        onnx.load_model_from_string(prepared), list(biases), pixel_values, num_threads
    )
    for layer, (tensor, step) in biases.items():
        found = channel_means(program, [layer], pixel_values, num_threads)[layer]
        with np.errstate(divide="ignore", invalid="ignore"):
            steps = np.round((wanted[layer] - found) / step)
        # If all weights of a channel are nearly zero, its scale is too small for a correction.
        steps = np.where(np.abs(steps) < MAX_STEPS, steps, 0).astype(np.int32)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + steps, tensor.name))
    return program.SerializeToString()


def biases_of(program: Any) -> dict[str, Bias]:
    """Find the integer biases of a quantised model, by the names of their layers, in their order."""
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in program.graph.initializer}
    made = {name: node for node in program.graph.node for name in node.output}
    found = {}
    for node in program.graph.node:
        if node.op_type not in LAYERS or len(node.input) < 3 or node.input[2] not in made:
            continue
        bias, step = (tensors[name] for name in made[node.input[2]].input[:2])
        found[node.name] = Bias(bias, numpy_helper.to_array(step).reshape(-1))
    return found


def channel_means(
    program: Any, layers: Collection[str], pixel_values: np.ndarray, num_threads: int
) -> dict[str, np.ndarray]:
    """Return the mean of each channel [C] of the outputs of layers, by their names."""
    import onnx

    outputs = {node.output[0]: node.name for node in program.graph.node if node.name in layers}
    traced = onnx.ModelProto()
    traced.CopyFrom(program)
    del traced.graph.output[:]
    traced.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs
    )
    session = session_of(traced.SerializeToString(), num_threads)
    sums: dict[str, Any] = dict.fromkeys(layers, 0.0)
    for batch in np.array_split(pixel_values, max(1, len(pixel_values) // BATCH)):
        found = session.run(list(outputs), {PIXEL_VALUES: batch})
        for name, each in zip(outputs.values(), found, strict=True):
            places = each.reshape(*each.shape[:2], -1).astype(np.float64)
            sums[name] = sums[name] + places.mean(axis=2).sum(axis=0)
    return {name: total / len(pixel_values) for name, total in sums.items()}

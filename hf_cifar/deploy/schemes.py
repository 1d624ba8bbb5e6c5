"""Static quantisation to 8-bit integers, in the scheme that keeps the answers and is fastest here.

Processors differ: without VNNI, products of signed weights saturate; with it, unsigned weights have no fast
code. So every scheme is tried, judged on validation images, and timed. If none keeps the answers, biases are
corrected; and if that is not enough, the layers with the largest error stay in float.

Source: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference, 2018.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_cifar.deploy.biases import correct_biases
from hf_cifar.deploy.inputs import Inputs
from hf_cifar.deploy.latency import is_faster, latencies
from hf_cifar.evaluation.intervals import LEVEL, mcnemar
from hf_cifar.extras import require
from hf_cifar.models.exported import LOGITS, PIXEL_VALUES, session_of
from hf_cifar.progress import progress

logger = logging.getLogger(__name__)
CALIBRATION_BATCH, JUDGING_BATCH = 10, 50
CORRECTION_IMAGES = 100  # of calibration; the means of channels need fewer than their ranges
KEPT_IN_FLOAT = (1, 2, 4, 8, 16)  # layers, in turn, until the answers are kept


@dataclass(frozen=True)
class Scheme:
    """How numbers become integers. weights: QInt8 or QUInt8; activations are always QUInt8, and weights have
    a scale for each output channel. calibration: MinMax covers all activations, Percentile 99.999% of them.
    corrected: see `correct_biases`. in_float: names of the nodes that are not quantised."""

    weights: str
    calibration: str
    corrected: bool = False
    in_float: tuple[str, ...] = ()

    def __str__(self) -> str:
        kind = {"QInt8": "signed", "QUInt8": "unsigned"}[self.weights]
        corrected = ", corrected biases" if self.corrected else ""
        kept = f", {len(self.in_float)} layers in float" if self.in_float else ""
        return f"{kind} weights, {self.calibration} ranges{corrected}{kept}"


SCHEMES = [
    Scheme(weights, calibration)
    for weights in ("QInt8", "QUInt8")
    for calibration in ("MinMax", "Percentile")
]


@dataclass
class Quantised:
    """A quantised model. correct: bool [N] on the judging images; milliseconds: see `latencies`."""

    scheme: Scheme
    content: bytes
    correct: np.ndarray
    same_top1: float  # share of the images, 0..1
    milliseconds: dict[str, dict[str, float]] = field(default_factory=dict)

    def p_value(self, correct: np.ndarray) -> float:
        """McNemar's p against a model that is right where `correct`; 1 if this one is right as often."""
        if self.correct.sum() >= correct.sum():
            return 1.0
        return mcnemar(int((correct & ~self.correct).sum()), int((self.correct & ~correct).sum()))

    def facts(self, correct: np.ndarray) -> dict[str, Any]:
        """Describe it in plain values, beside a float model that is right where `correct`."""
        return {
            "scheme": str(self.scheme), "in_float": list(self.scheme.in_float),
            "accuracy": float(self.correct.mean()), "same_top1": self.same_top1,
            "p_value": self.p_value(correct), "bytes": len(self.content), "milliseconds": self.milliseconds,
        }  # fmt: skip


def quantize(
    content: bytes, calibration: np.ndarray, judging: Inputs
) -> tuple[Quantised | None, dict[str, Any]]:
    """Quantise an exported ONNX model, and return the fastest result whose answers are not worse, with a
    report of all that were tried; None if none is both as good and faster than the float model.

    calibration: inputs [N, 3, h, w] of training images, which set the ranges of activations. judging:
    validation images.
    """
    with _prepared(content) as (prepared, folder):
        float_logits = logits_of(content, judging.pixel_values)
        correct = float_logits.argmax(axis=1) == judging.labels
        tried = [
            judge(quantised(prepared, scheme, calibration, folder), scheme, float_logits, judging)
            for scheme in progress(SCHEMES, "quantising", unit="schemes")
        ]
        if not any(_keeps_answers(each, correct) for each in tried):
            best = max(tried, key=lambda each: each.same_top1)
            scheme = dataclasses.replace(best.scheme, corrected=True)
            made = quantised(prepared, scheme, calibration, folder)
            tried.append(judge(made, scheme, float_logits, judging))
        if not any(_keeps_answers(each, correct) for each in tried):
            best = max(tried, key=lambda each: each.same_top1)
            tried += _with_layers_in_float(
                prepared, best, calibration, folder, float_logits, judging
            )
    good = [each for each in tried if _keeps_answers(each, correct)]
    names = {"float": content, **{str(each.scheme): each.content for each in good}}
    times = latencies(
        {name: runner(each) for name, each in names.items()}, judging.pixel_values[:1]
    )
    for each in good:
        each.milliseconds = times[str(each.scheme)]
    faster = [each for each in good if is_faster(each.milliseconds, times["float"])]
    chosen = min(faster, key=lambda each: each.milliseconds["1"]["median"], default=None)
    report = {
        "float": {
            "accuracy": float(correct.mean()), "bytes": len(content), "milliseconds": times["float"],
        },
        "tried": [each.facts(correct) for each in tried],
        "chosen": str(chosen.scheme) if chosen else None,
        "num_images": len(correct), "num_calibration_images": len(calibration),
    }  # fmt: skip
    return chosen, report


def _keeps_answers(model: Quantised, correct: np.ndarray) -> bool:
    """Return True unless McNemar's test finds a model worse than one that is right where `correct`."""
    return model.p_value(correct) >= 1 - LEVEL


@contextmanager
def _prepared(content: bytes) -> Iterator[tuple[Path, Path]]:
    """Yield a file of the model with the shapes of its tensors, as the quantiser needs it, and a temporary
    folder."""
    require("onnx", extra="deploy")
    require("onnxruntime", extra="deploy")
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory(prefix="hf_cifar-quantize-") as folder:
        source, prepared = Path(folder, "float.onnx"), Path(folder, "prepared.onnx")
        source.write_bytes(content)
        with _quiet():
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
        yield prepared, Path(folder)


def quantised(model: Path, scheme: Scheme, calibration: np.ndarray, folder: Path) -> bytes:
    """Return a prepared model in a scheme."""
    from onnxruntime.quantization import (
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    target = folder / "int8.onnx"
    with _quiet():
        quantize_static(
            model, target, reader(calibration),
            quant_format=QuantFormat.QDQ, per_channel=True, activation_type=QuantType.QUInt8,
            weight_type=QuantType[scheme.weights], nodes_to_exclude=list(scheme.in_float),
            calibrate_method=CalibrationMethod[scheme.calibration],
            # Ranges after each batch: else the activations of all images would be in memory at once.
            extra_options={"CalibStridedMinMax": 1},
        )  # fmt: skip
    content = target.read_bytes()
    if scheme.corrected:
        images = calibration[:CORRECTION_IMAGES]
        content = correct_biases(content, model.read_bytes(), images, torch.get_num_threads())
    return content


def reader(pixel_values: np.ndarray) -> Any:
    """Return the inputs in batches, in the form that ONNX Runtime's quantiser takes."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.set_range(0, len(self))

        def __len__(self) -> int:
            return math.ceil(len(pixel_values) / CALIBRATION_BATCH)

        def set_range(self, start_index: int, end_index: int) -> None:
            """Continue with these batches."""
            batches = range(
                start_index * CALIBRATION_BATCH, end_index * CALIBRATION_BATCH, CALIBRATION_BATCH
            )
            self.batches = (pixel_values[start : start + CALIBRATION_BATCH] for start in batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {PIXEL_VALUES: batch}

    return Reader()


def judge(content: bytes, scheme: Scheme, float_logits: np.ndarray, judging: Inputs) -> Quantised:
    """Compare a quantised model with the float one on the judging images."""
    found = logits_of(content, judging.pixel_values).argmax(axis=1)
    same = float((found == float_logits.argmax(axis=1)).mean())
    return Quantised(scheme, content, found == judging.labels, same)


def _with_layers_in_float(
    model: Path,
    best: Quantised,
    calibration: np.ndarray,
    folder: Path,
    float_logits: np.ndarray,
    judging: Inputs,
) -> list[Quantised]:
    """Return versions of a quantised model with more and more layers in float, those of the largest error
    first."""
    layers = sensitive_layers(model, best.content, calibration, folder)
    correct, found = float_logits.argmax(axis=1) == judging.labels, []
    for count in KEPT_IN_FLOAT:
        if count > len(layers):
            break
        scheme = dataclasses.replace(best.scheme, in_float=tuple(layers[:count]))
        made = quantised(model, scheme, calibration, folder)
        found.append(judge(made, scheme, float_logits, judging))
        if _keeps_answers(found[-1], correct):
            break
    return found


def sensitive_layers(
    model: Path, content: bytes, calibration: np.ndarray, folder: Path
) -> list[str]:
    """Return the names of the nodes with weights, the largest error of their outputs first: the noise that
    quantising all layers adds, relative to the signal."""
    import onnx
    from onnxruntime.quantization import qdq_loss_debug as debug

    integer = folder / "int8.onnx"
    integer.write_bytes(content)
    inputs, outputs = calibration[: 2 * CALIBRATION_BATCH], []
    with _quiet():
        for name, file in (("float", model), ("int8", integer)):
            traced = folder / f"{name}-traced.onnx"
            debug.modify_model_output_intermediate_tensors(file, traced)
            outputs.append(debug.collect_activations(str(traced), reader(inputs)))
        matched = debug.create_activation_matching(outputs[1], outputs[0])
        errors = debug.compute_activation_error(matched)  # in dB: lower is noisier
    noise = {tensor: each["xmodel_err"] for tensor, each in errors.items() if "xmodel_err" in each}
    nodes = onnx.load(str(model)).graph.node
    # An activation is fused with the layer before it, so the error is that of its output.
    after = {name: node.output[0] for node in nodes for name in node.input[:1]}
    found = {}
    for node in nodes:
        outputs = [name for name in (node.output[0], after.get(node.output[0])) if name in noise]
        if node.op_type in ("Conv", "Gemm", "MatMul") and outputs:
            found[node.name] = noise[outputs[0]]
    return sorted(found, key=lambda name: found[name])


def runner(content: bytes) -> Any:
    """Return a function from inputs [N, 3, h, w] to logits [N, K]."""
    session = session_of(content, torch.get_num_threads())
    return lambda pixel_values: session.run([LOGITS], {PIXEL_VALUES: pixel_values})[0]


def logits_of(content: bytes, pixel_values: np.ndarray) -> np.ndarray:
    """Compute the logits [N, K] of all inputs."""
    run, starts = runner(content), range(0, len(pixel_values), JUDGING_BATCH)
    return np.concatenate([run(pixel_values[start : start + JUDGING_BATCH]) for start in starts])


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the quantiser's advice and printing."""
    import contextlib
    import io

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

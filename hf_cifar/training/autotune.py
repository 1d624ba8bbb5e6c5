"""Precision, memory format, attention and compilation, chosen by timing real training steps of the model.

Whether bfloat16 is faster on a CPU depends on its instructions and on the model's layers, so no rule by
device or family would be correct.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_cifar.models.kernels import (
    fuse_attention,
    has_fused_attention,
    restore_kernels,
    use_float32_depthwise,
)
from hf_cifar.training.losses import LOSSES
from hf_cifar.training.memory import keep_freed_memory

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MEMORY_FORMATS = {
    "auto": torch.channels_last,  # where nothing was measured
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}
# Each setting is timed this many times. More rounds are less sensitive to other programs.
MIN_ROUNDS, MAX_ROUNDS = 3, 10
# A setting replaces the first one only if it is this much faster; smaller differences are noise.
MIN_SPEEDUP = 1.05
# A setting is unsound if its loss differs from the one in fp32 by more than this share.
TOLERANCE = 0.05
# Images of the first, rough estimate of the speed.
ESTIMATE_IMAGES = 4
# A measured step on a CPU: target length, and smallest number of images.
STEP_SECONDS, MIN_IMAGES = 0.5, 8
# Eager attention may keep at most this many times the memory of the fused kernel for the backward pass: its
# matrices grow with the square of the number of patches.
MAX_MEMORY_RATIO = 1.5
MEMORY_PROBE_IMAGES = 2  # images used to measure that
# Share of a run's time that measuring may take, and expected time of a compilation.
MEASURING_SHARE = 0.05
COMPILE_SECONDS = 60.0


class Setting(NamedTuple):
    """A way to compute a model; the maths is the same in each."""

    precision: str = "fp32"
    memory_format: str = "channels_last"
    attention: str = "fused"
    compiled: bool = False

    def __str__(self) -> str:
        eager, compiled = self.attention == "eager", self.compiled
        return f"{self.precision} {self.memory_format}{' eager' * eager}{' compiled' * compiled}"


class Timing(NamedTuple):
    """Time of one training step.

    seconds: of the forward and backward pass, the fastest of all rounds. loss: of the batch.
    """

    seconds: float
    loss: float


@contextlib.contextmanager
def computing_as(setting: Setting, model: PreTrainedModel) -> Iterator[None]:
    """Let a model compute in a setting's memory format and attention until the block ends.

    In bfloat16 on a CPU, kernels that are slow there are avoided as well. Afterwards the model has its own
    kernels again; its weights stay in the memory format.
    """
    model.to(memory_format=MEMORY_FORMATS[setting.memory_format])
    fuse_attention(model, setting.attention != "eager")
    if (next(model.parameters()).device.type, setting.precision) == ("cpu", "bf16"):
        use_float32_depthwise(model)
    try:
        yield
    finally:
        restore_kernels(model)


def candidates(
    model: PreTrainedModel,
    device: torch.device,
    memory_format: str = "auto",
    attention: str = "auto",
) -> list[Setting]:
    """List the settings to compare, within the requested memory format and attention.

    The first is the default, which is kept if no other is clearly faster.
    """
    # fp16 only where there is no bfloat16: its loss scaling waits for the GPU twice a step, which a bare step
    # does not show.
    lacks_bf16 = device.type == "cuda" and not torch.cuda.is_bf16_supported(
        including_emulation=False
    )
    precisions = ["fp32", "fp16" if lacks_bf16 else "bf16"]
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    # A ViT's only convolution extracts the patches; the layers after it have a fixed format.
    formats = ["channels_last", "contiguous"] if convolutions > 1 else ["channels_last"]
    formats = formats if memory_format == "auto" else [memory_format]
    attentions = ["fused"] if attention == "auto" else [attention]
    if (attention, device.type) == ("auto", "cpu") and has_fused_attention(model):
        attentions.append("eager")  # on a GPU the fused kernel is always faster
    return [Setting(*choice) for choice in itertools.product(precisions, formats, attentions)]


def measure(
    model: PreTrainedModel,
    pixel_values: Tensor,
    labels: Tensor,
    settings: Sequence[Setting],
    rounds: int = MIN_ROUNDS,
) -> dict[Setting, Timing]:
    """Time training steps (forward and backward) of all settings in turn, `rounds` times after a warm-up.

    pixel_values [N, C, h, w] and labels [N] are on the model's device. The model is restored: weights,
    gradients, norm statistics, mode, memory format, kernels; so is the state of the random generators.
    A setting that cannot run here (no compiler, no kernel) has no timing.
    """
    timings: dict[Setting, Timing] = {}
    failed: set[Setting] = set()
    with _restored(model):
        for _ in range(rounds + 1):
            for setting in settings:
                if setting in failed:
                    continue
                try:
                    found = _step(model, pixel_values, labels, setting)
                except Exception:  # compilers and kernels raise errors of many types
                    failed.add(setting)
                    timings.pop(setting, None)
                    continue
                # The first step of a setting also allocates, compiles and selects kernels.
                warm = setting in timings
                best = min(found.seconds, timings[setting].seconds) if warm else math.inf
                timings[setting] = Timing(best, found.loss)
    return timings


def choose(timings: dict[Setting, Timing]) -> Setting:
    """Return the fastest sound setting if it is clearly faster than the first, else the first.

    A setting is sound if its loss is close to that of the first setting that ran (fp32 if it runs here).
    """
    first, reference = next(iter(timings.items()))
    sound = {
        setting: timing
        for setting, timing in timings.items()
        if math.isclose(timing.loss, reference.loss, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    }
    if not sound:
        return first
    fastest = min(sound, key=lambda setting: sound[setting].seconds)
    return fastest if reference.seconds > MIN_SPEEDUP * sound[fastest].seconds else first


def pick_setting(
    model: PreTrainedModel,
    pixel_values: Tensor,
    labels: Tensor,
    num_steps: int,
    memory_format: str = "auto",
    attention: str = "auto",
    *,
    compiles: bool = True,
) -> tuple[Setting, str]:
    """Return the fastest sound setting for `num_steps` steps of this batch, and one line with the speeds.

    Measuring takes at most about a twentieth of the run; a run too short for that uses the first candidate.
    compiles: also try compilation, if the run is long enough for it.
    """
    on_cpu = pixel_values.device.type == "cpu"
    if on_cpu:
        keep_freed_memory()  # as the run will
    settings = candidates(model, pixel_values.device, memory_format, attention)
    first, batch = settings[0], len(labels)
    # Half of the batch is as informative, and keeps no more memory in fp32 than all of it in bf16.
    limit = max(1, batch // 2) if on_cpu else batch
    few = min(limit, ESTIMATE_IMAGES)
    estimate = measure(model, pixel_values[:few], labels[:few], [first], 1)
    if not estimate:
        return first, f"computing in {first}: a step of {few} images could not be measured"
    image_seconds = estimate[first].seconds / few
    # Images to measure in each setting within the allowed time, if all are as fast as the first.
    affordable = MEASURING_SHARE * batch * num_steps / len(settings)
    part = limit
    if on_cpu:  # fewer images if a step takes long or the run is short
        part = max(few, min(limit, int(STEP_SECONDS / image_seconds)))
        part = min(part, max(MIN_IMAGES, int(affordable / (MIN_ROUNDS + 1))))
    rounds = int(affordable / part) - 1  # minus the warm-up round
    if rounds < MIN_ROUNDS:
        whole = image_seconds * batch * num_steps
        return (
            first,
            f"computing in {first}: a run of {whole:.0f} s is too short to compare other settings",
        )
    pixel_values, labels = pixel_values[:part], labels[:part]
    rounds = min(rounds, MAX_ROUNDS)
    probe = pixel_values[:MEMORY_PROBE_IMAGES], labels[:MEMORY_PROBE_IMAGES]
    settings = drop_memory_hungry(model, *probe, settings)
    timings = measure(model, pixel_values, labels, settings, rounds)
    if not timings:
        return first, f"computing in {first}: a step of {part} images could not be measured"
    chosen = choose(timings)
    seconds = timings[chosen].seconds / part * batch * num_steps
    if compiles and MEASURING_SHARE * seconds > COMPILE_SECONDS:
        compiled = chosen._replace(compiled=True)
        timings |= measure(model, pixel_values, labels, [compiled], rounds)
        chosen = choose({chosen: timings[chosen], **timings})
    speeds = ", ".join(
        f"{setting} {part / timing.seconds:.0f}" for setting, timing in timings.items()
    )
    return chosen, f"computing in {chosen}; measured images/s: {speeds}"


def drop_memory_hungry(
    model: PreTrainedModel, pixel_values: Tensor, labels: Tensor, settings: list[Setting]
) -> list[Setting]:
    """Drop settings whose attention keeps far more memory for the backward pass than that of the first."""
    first = settings[0]
    modest = [setting for setting in settings if setting.attention == first.attention]
    others = [setting for setting in settings if setting not in modest]
    if not others:
        return settings
    try:
        kept = [_kept_bytes(model, pixel_values, labels, each) for each in (first, others[0])]
    except Exception:  # as in `measure`
        return modest
    return settings if kept[1] <= MAX_MEMORY_RATIO * kept[0] else modest


def _kept_bytes(
    model: PreTrainedModel, pixel_values: Tensor, labels: Tensor, setting: Setting
) -> int:
    """Return the bytes that a step keeps for its backward pass, without the weights."""
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with _restored(model), hooks:
        _step(model, pixel_values, labels, setting)
    return sum(kept.values())


def _step(model: PreTrainedModel, pixel_values: Tensor, labels: Tensor, setting: Setting) -> Timing:
    """Time one training step in a setting."""
    pixel_values = pixel_values.contiguous(memory_format=MEMORY_FORMATS[setting.memory_format])
    # Compiled like accelerate does for training: symbolic sizes would take minutes on some networks.
    network = torch.compile(model, dynamic=False) if setting.compiled else model
    device = pixel_values.device.type
    dtype = DTYPES[setting.precision]
    with computing_as(setting, model):
        torch.manual_seed(0)  # the same dropout in every setting
        _synchronize(device)
        start = time.perf_counter()
        with torch.autocast(device, dtype, enabled=dtype is not torch.float32):
            logits = network(pixel_values=pixel_values).logits
        loss = LOSSES["cross_entropy"](logits.float(), labels)
        loss.backward()
        _synchronize(device)
        seconds = time.perf_counter() - start
        model.zero_grad(set_to_none=True)
    return Timing(seconds, loss.item())


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def _restored(model: PreTrainedModel) -> Iterator[None]:
    """Put a model into training mode in the block, then restore it and the random generators."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    training = model.training
    strides = [parameter.stride() for parameter in model.parameters()]
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        model.train()
        try:
            yield
        finally:
            model.train(training)
            model.zero_grad(set_to_none=True)
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    buffer.copy_(buffers[name])
            for parameter, stride in zip(model.parameters(), strides, strict=True):
                if parameter.stride() != stride:
                    restored = torch.empty_strided(
                        parameter.shape, stride, dtype=parameter.dtype, device=parameter.device
                    )
                    parameter.data = restored.copy_(parameter.data)

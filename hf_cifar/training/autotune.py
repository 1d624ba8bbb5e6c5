"""Number format, memory format, attention and compilation: picked by timing real steps of this model here.

Whether bfloat16 wins on a CPU depends on its instructions and on the model's layers: no rule by device or
family would do.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_cifar.models.kernels import (
    as_it_came,
    fuse_attention,
    has_fused_attention,
    spare_depthwise_gradients,
    treat_depthwise_alike,
)
from hf_cifar.training.memory import keep_freed_memory

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MEMORY_FORMATS = {
    "auto": torch.channels_last,  # where nothing was measured
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}
# Fewest and most times that each setting is timed: the more, the less another program's turn counts.
ROUNDS, MOST_ROUNDS = 3, 10
# Another setting than the first must be faster by this much: what is left is noise.
CLEARLY = 1.05
# A loss further from the one in fp32 than this share of it is another computation.
TOLERANCE = 0.05
# Images that a first guess at the speed takes; seconds, and fewest images, of a measured step on a CPU.
FEW_IMAGES, STEP_SECONDS, LEAST_IMAGES = 4, 0.5, 8
# The most that eager attention may keep for the backward pass, relative to the one kernel: its matrices grow
# with the square of the number of patches.
MOST_MEMORY = 1.5
FEW_KEPT = 2  # images that this is found with
# Share of a run's time that measuring may take, and seconds that compiling is expected to take.
MEASURING_SHARE = 0.05
COMPILE_SECONDS = 60.0


class Setting(NamedTuple):
    """How a model computes; the same maths in each."""

    precision: str = "fp32"
    memory_format: str = "channels_last"
    attention: str = "fused"
    compiled: bool = False

    def __str__(self) -> str:
        eager, compiled = self.attention == "eager", self.compiled
        return f"{self.precision} {self.memory_format}{' eager' * eager}{' compiled' * compiled}"


class Timing(NamedTuple):
    """seconds: of one forward and backward pass, the fastest of several. loss: of the batch."""

    seconds: float
    loss: float


def arrange(model: PreTrainedModel, setting: Setting, device: torch.device) -> None:
    """Let the model compute in the setting's memory format and attention, and, in bfloat16 on a CPU, without
    the kernels that are slow there."""
    model.to(memory_format=MEMORY_FORMATS[setting.memory_format])
    fuse_attention(model, setting.attention != "eager")
    treat_depthwise_alike(model)
    if (device.type, setting.precision) == ("cpu", "bf16"):
        spare_depthwise_gradients(model)


def candidates(
    model: PreTrainedModel,
    device: torch.device,
    memory_format: str = "auto",
    attention: str = "auto",
) -> list[Setting]:
    """Settings to be compared, in the asked memory format and attention alone; the first is what a tie falls
    back to."""
    # fp16 where there is no bfloat16 alone: its loss scaling waits for the GPU twice a step, which a bare
    # step does not show.
    lacks_bf16 = device.type == "cuda" and not torch.cuda.is_bf16_supported(
        including_emulation=False
    )
    precisions = ["fp32", "fp16" if lacks_bf16 else "bf16"]
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    # The one convolution of a ViT cuts its patches out; the format of what follows is fixed.
    formats = ["channels_last", "contiguous"] if convolutions > 1 else ["channels_last"]
    formats = formats if memory_format == "auto" else [memory_format]
    attentions = ["fused"] if attention == "auto" else [attention]
    if (attention, device.type) == ("auto", "cpu") and has_fused_attention(model):
        attentions.append("eager")  # on a GPU the one kernel always wins
    return [Setting(*choice) for choice in itertools.product(precisions, formats, attentions)]


def measure(
    model: PreTrainedModel,
    pixel_values: Tensor,
    labels: Tensor,
    settings: Sequence[Setting],
    rounds: int = ROUNDS,
) -> dict[Setting, Timing]:
    """Time training steps (forward, backward) of every setting in turn, `rounds` times, after one to warm up.

    pixel_values [N, C, h, w] and labels [N] lie on the model's device. The model is left as it was:
    weights, gradients, statistics of its norms, mode, memory format, and the state of the generators; its
    kernels are those that it came with.
    A setting that cannot run here (no compiler, no kernel) has no timing.
    """
    timings: dict[Setting, Timing] = {}
    failed: set[Setting] = set()
    with _left_as_it_was(model):
        for _ in range(rounds + 1):
            for setting in settings:
                if setting in failed:
                    continue
                try:
                    found = _step(model, pixel_values, labels, setting)
                except Exception:  # compilers and kernels fail in many ways, each its own
                    failed.add(setting)
                    timings.pop(setting, None)
                    continue
                # The first step of each also allocates, compiles and picks kernels.
                warm = setting in timings
                best = min(found.seconds, timings[setting].seconds) if warm else math.inf
                timings[setting] = Timing(best, found.loss)
    return timings


def choose(timings: dict[Setting, Timing]) -> Setting:
    """The fastest sound setting, if it is clearly faster than the first, else the first.

    Sound: the loss is finite and near that of the first, in fp32 unless that does not run here.
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
    return fastest if reference.seconds > CLEARLY * sound[fastest].seconds else first


def pick_setting(
    model: PreTrainedModel,
    pixel_values: Tensor,
    labels: Tensor,
    num_steps: int,
    memory_format: str = "auto",
    attention: str = "auto",
) -> tuple[Setting, str]:
    """The fastest sound setting for `num_steps` such steps, and one line that says what was found.

    Measuring takes about a twentieth of the run at most; a run that is too short for it keeps the first
    candidate. Compiling is tried where it can pay.
    """
    on_cpu = pixel_values.device.type == "cpu"
    if on_cpu:
        keep_freed_memory()  # as the run will
    settings = candidates(model, pixel_values.device, memory_format, attention)
    first, batch = settings[0], len(labels)
    # Half of the batch tells as much, and in fp32 keeps no more memory than all of it in bf16.
    most = max(1, batch // 2) if on_cpu else batch
    few = min(most, FEW_IMAGES)
    guess = measure(model, pixel_values[:few], labels[:few], [first], 1)
    if not guess:
        return first, f"computing in {first}: a step of {few} images could not be measured"
    image_seconds = guess[first].seconds / few
    # Images that may be measured in each setting, if all are as fast as the first. One round more warms up.
    affordable = MEASURING_SHARE * batch * num_steps / len(settings)
    part = most
    if on_cpu:  # less does where a step takes long, or the run is short
        part = max(few, min(most, int(STEP_SECONDS / image_seconds)))
        part = min(part, max(LEAST_IMAGES, int(affordable / (ROUNDS + 1))))
    rounds = int(affordable / part) - 1
    if rounds < ROUNDS:
        whole = image_seconds * batch * num_steps
        return first, f"computing in {first}: a run of {whole:.0f} s is too short to compare others"
    pixel_values, labels = pixel_values[:part], labels[:part]
    rounds = min(rounds, MOST_ROUNDS)
    settings = _sparing(model, pixel_values[:FEW_KEPT], labels[:FEW_KEPT], settings)
    timings = measure(model, pixel_values, labels, settings, rounds)
    if not timings:
        return first, f"computing in {first}: a step of {part} images could not be measured"
    chosen = choose(timings)
    if MEASURING_SHARE * timings[chosen].seconds / part * batch * num_steps > COMPILE_SECONDS:
        compiled = chosen._replace(compiled=True)
        timings |= measure(model, pixel_values, labels, [compiled], rounds)
        chosen = choose({chosen: timings[chosen], **timings})
    speeds = ", ".join(
        f"{setting} {part / timing.seconds:.0f}" for setting, timing in timings.items()
    )
    return chosen, f"computing in {chosen}; measured images/s: {speeds}"


def is_sharded() -> bool:
    """Whether the launcher asks for FSDP or DeepSpeed."""
    return "true" in [os.environ.get(f"ACCELERATE_USE_{name}") for name in ("FSDP", "DEEPSPEED")]


def _sparing(
    model: PreTrainedModel, pixel_values: Tensor, labels: Tensor, settings: list[Setting]
) -> list[Setting]:
    """The settings, without those whose attention keeps far more for the backward pass than the first."""
    first = settings[0]
    sparing = [setting for setting in settings if setting.attention == first.attention]
    others = [setting for setting in settings if setting not in sparing]
    if not others:
        return settings
    try:
        kept = [_kept_bytes(model, pixel_values, labels, each) for each in (first, others[0])]
    except Exception:  # as in `measure`
        return sparing
    return settings if kept[1] <= MOST_MEMORY * kept[0] else sparing


def _kept_bytes(
    model: PreTrainedModel, pixel_values: Tensor, labels: Tensor, setting: Setting
) -> int:
    """What a step keeps for its backward pass, beside the weights."""
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with _left_as_it_was(model), hooks:
        _step(model, pixel_values, labels, setting)
    return sum(kept.values())


def _step(model: PreTrainedModel, pixel_values: Tensor, labels: Tensor, setting: Setting) -> Timing:
    arrange(model, setting, pixel_values.device)
    pixel_values = pixel_values.contiguous(memory_format=MEMORY_FORMATS[setting.memory_format])
    # As accelerate compiles what is trained: symbolic sizes would also take minutes on some networks.
    network = torch.compile(model, dynamic=False) if setting.compiled else model
    device = pixel_values.device.type
    dtype = DTYPES[setting.precision]
    torch.manual_seed(0)  # the same dropout for all
    _wait(device)
    start = time.perf_counter()
    with torch.autocast(device, dtype, enabled=dtype is not torch.float32):
        logits = network(pixel_values=pixel_values).logits
    loss = F.cross_entropy(logits.float(), labels)
    loss.backward()
    _wait(device)
    seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return Timing(seconds, loss.item())


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def _left_as_it_was(model: PreTrainedModel) -> Iterator[None]:
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    training = model.training
    strides = [parameter.stride() for parameter in model.parameters()]
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        model.train()
        try:
            yield
        finally:
            as_it_came(model)
            model.train(training)
            model.zero_grad(set_to_none=True)
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    buffer.copy_(buffers[name])
            for parameter, stride in zip(model.parameters(), strides, strict=True):
                if parameter.stride() != stride:
                    as_before = torch.empty_strided(
                        parameter.shape, stride, dtype=parameter.dtype, device=parameter.device
                    )
                    parameter.data = as_before.copy_(parameter.data)

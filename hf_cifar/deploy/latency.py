"""The time of a batch: networks take turns, so that a busy machine slows all of them alike."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_cifar.progress import progress

# Instructions that decide how fast a processor multiplies numbers of 8 and 16 bits.
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
BATCH_SIZES = (1, 32)
ROUNDS, SECONDS = 9, 0.1  # of each network in a round, or one batch if that takes longer

Network = Callable[[np.ndarray], Any]


def processor() -> str:
    """Return the name of the processor with its matrix instructions."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor() or platform.machine()
    lines = [line.partition(":") for line in info.read_text(encoding="utf-8").splitlines()]
    facts = {name.strip(): value.strip() for name, _, value in reversed(lines)}
    flags = set(facts.get("flags", "").split())
    found = [name for name in INSTRUCTIONS if name in flags]
    return f"{facts.get('model name', platform.machine())} ({', '.join(found) or 'no AVX2'})"


def latencies(
    networks: Mapping[str, Network],
    images: np.ndarray,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    rounds: int = ROUNDS,
) -> dict[str, dict[str, dict[str, float]]]:
    """Time networks in turns, in milliseconds per batch: by name and batch size, the median, lowest and
    highest of the rounds. images: at least one float [1, 3, h, w], which is repeated."""
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in networks}
    for size in batch_sizes:
        batch = np.resize(images, (size, *images.shape[1:]))
        times: dict[str, list[float]] = {name: [] for name in networks}
        for network in networks.values():
            network(batch)  # the first batch allocates memory
        names = list(networks)
        for number in progress(range(rounds), f"timing batches of {size}", unit="rounds"):
            shift = number % len(names)
            for name in [*names[shift:], *names[:shift]]:
                times[name].append(1000 * _seconds(networks[name], batch))
        for name, each in times.items():
            found[name][str(size)] = {
                "median": statistics.median(each), "low": min(each), "high": max(each)
            }  # fmt: skip
    return found


def is_faster(times: Mapping[str, Any], than: Mapping[str, Any]) -> bool:
    """Return True if the median time of one image is below the fastest round of another network."""
    return times["1"]["median"] < than["1"]["low"]


def _seconds(network: Network, batch: np.ndarray) -> float:
    """Return the mean time of a batch."""
    start, count = time.perf_counter(), 0
    while True:
        network(batch)
        count += 1
        seconds = time.perf_counter() - start
        if seconds > SECONDS:
            return seconds / count

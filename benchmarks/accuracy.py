"""Time to an accuracy: complete commands with more and more epochs until one reaches it. Hours on a CPU.

python -m benchmarks.accuracy --model_name_or_path MODEL --dataset_name DATA [--target 0.9] [--epochs 3]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import ROOT, conditions, write

# The stock Trainer with its defaults except the learning rate, on PIL images and the same training rows.
PLAIN = """
import sys, numpy
from torchvision import transforms
from transformers import Trainer, TrainingArguments
from benchmarks.peers import collate, with_pil_transform
from hf_cifar import DataConfig, ModelConfig, build_model, load_splits
from hf_cifar.transforms.preprocessing import Preprocessing
from hf_cifar.data.splits import load_test_split
model_name, data, size, epochs, rate, output = sys.argv[1:]
config = DataConfig(dataset_name=data)
splits = load_splits(config)
model, processor = build_model(ModelConfig(model_name_or_path=model_name, image_size=int(size)), splits.id2label)
view = Preprocessing.from_image_processor(processor)
args = TrainingArguments(
    output_dir=output, num_train_epochs=float(epochs), learning_rate=float(rate), save_strategy="no",
    per_device_train_batch_size=32, remove_unused_columns=False, report_to="none", disable_tqdm=True,
    label_names=["labels"],
)
trainer = Trainer(model=model, args=args, train_dataset=with_pil_transform(splits.train.rows, view), data_collator=collate)
trainer.train()
whole = transforms.Compose([
    transforms.Resize(view.size, 3), transforms.ToTensor(), transforms.Normalize(view.mean, view.std),
])
for rows in (splits.validation.rows, load_test_split(config).rows):
    output = trainer.predict(with_pil_transform(rows, view, whole))
    print(numpy.mean(output.predictions.argmax(1) == output.label_ids))
"""  # noqa: E501


def reach(
    name: str, run: Callable[[int], list[float]], target: float, epochs: int, most: int
) -> dict[str, float]:
    """Return the first run, from `epochs` epochs on, whose validation accuracy reaches the target, or the run
    of `most` epochs: its seconds from start to exit, and its test accuracy, which decides nothing."""
    for number in range(epochs, max(epochs, most) + 1):
        start = time.perf_counter()
        validation, test = run(number)
        seconds = time.perf_counter() - start
        print(
            f"{name}, {number} epochs: validation {validation:.4f}, test {test:.4f}, {seconds:.0f} s",
            flush=True,
        )
        if validation >= target:
            break
    return {
        "seconds": round(seconds, 1), "epochs": number, "validation": validation, "accuracy": test
    }  # fmt: skip


def record(ours: dict[str, float], plain: dict[str, float], target: float) -> dict:
    """Record both runs. A plain recipe that does not reach the target is named so: the ratio is then a lower
    bound."""
    name = "plain"
    if plain["validation"] < target:
        name = f"plain, at {plain['validation']:.4f} after {plain['epochs']} epochs"
    found = {"ours": ours, name: plain}
    ratio = round(plain["seconds"] / ours["seconds"], 3)
    return {
        "benchmark": f"time to {target:.0%} accuracy", "unit": "s", "n": 1, "runs": found,
        "figures": {
            key: dict.fromkeys(("median", "low", "high"), facts["seconds"])
            for key, facts in found.items()
        },
        "ratios": {name: dict.fromkeys(("median", "low", "high"), ratio)},
    }  # fmt: skip


def main() -> None:
    """Run our recipe, then the plain recipe with the given learning rate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="efficientnet_lite0", help="of ours")
    parser.add_argument("--model_name_or_path", default="bundled/efficientnet_lite0")
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10")
    parser.add_argument("--image_size", default="96")
    parser.add_argument("--target", type=float, default=0.9)
    parser.add_argument("--epochs", type=int, default=3, help="of the first run of ours")
    parser.add_argument("--plain_epochs", type=int, default=3, help="of the plain recipe's first")
    parser.add_argument("--max_epochs", type=int, default=10)
    parser.add_argument("--plain_learning_rate", default="1e-3")
    options = parser.parse_args()
    data = ["--dataset_name", options.dataset_name]
    model = ["--model_name_or_path", options.model_name_or_path]

    def train_ours(epochs: int) -> list[float]:
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder, "run")
            command = [
                sys.executable, "scripts/finetune.py", "--recipe", options.recipe, *data, *model,
                "--output_dir", str(run), "--image_size", options.image_size,
                "--num_train_epochs", str(epochs), "--do_predict",
            ]  # fmt: skip
            # Remove the previous attempt.
            environment = {**os.environ, "HF_CIFAR_CACHE": str(Path(folder, "cache"))}
            subprocess.run(
                command, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
            )
            metrics = json.loads((run / "metrics.json").read_text())
            return [metrics[split]["accuracy"] for split in ("validation", "test")]

    def train_plain(epochs: int) -> list[float]:
        with tempfile.TemporaryDirectory() as folder:
            arguments = [
                model[1], data[1], options.image_size, str(epochs), options.plain_learning_rate, folder
            ]  # fmt: skip
            command = [sys.executable, "-c", PLAIN, *arguments]
            done = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
            return [float(word) for word in done.stdout.split()[-2:]]

    target, most = options.target, options.max_epochs
    ours = reach("ours", train_ours, target, options.epochs, most)
    if ours["validation"] < target:
        raise SystemExit(f"ours does not reach {target} in {most} epochs")
    plain = reach("plain", train_plain, target, options.plain_epochs, most)
    write({**record(ours, plain, target), **vars(options), **conditions()})


if __name__ == "__main__":
    main()

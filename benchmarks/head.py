"""Time and accuracy of a head on a frozen backbone: ours on cached features, the plain recipe without.

python -m benchmarks.head --model_name_or_path bundled/efficientnet_lite0 --dataset_name DATA [--rounds 3]
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import ROOT, compare, conditions, summary, write

# Like transformers' image-classification example in its README: evaluated and saved after each epoch.
PLAIN = """
import sys
from torchvision import transforms
from transformers import Trainer, TrainingArguments
from benchmarks.peers import collate, with_pil_transform
from hf_cifar import DataConfig, ModelConfig, build_model, load_splits
from hf_cifar.transforms.preprocessing import Preprocessing
model_name, data, images, checked, output = sys.argv[1:]
splits = load_splits(DataConfig(dataset_name=data, max_train_samples=int(images), max_eval_samples=int(checked)))
model, processor = build_model(ModelConfig(model_name_or_path=model_name, image_size=96, freeze="backbone"), splits.id2label)
preprocessing = Preprocessing.from_image_processor(processor)
args = TrainingArguments(
    output_dir=output, num_train_epochs=10, per_device_train_batch_size=32, learning_rate=2e-3, report_to="none",
    save_strategy="epoch", save_total_limit=2, eval_strategy="epoch", load_best_model_at_end=True,
    remove_unused_columns=False, disable_tqdm=True, label_names=["labels"],
)
whole = transforms.Compose([
    transforms.Resize(preprocessing.size, 3), transforms.ToTensor(), transforms.Normalize(preprocessing.mean, preprocessing.std),
])
Trainer(
    model=model, args=args, data_collator=collate, train_dataset=with_pil_transform(splits.train.rows, preprocessing),
    eval_dataset=with_pil_transform(splits.validation.rows, preprocessing, whole),
).train()
model.save_pretrained(output)
processor.save_pretrained(output)
"""  # noqa: E501


def seconds(command: list[str], folder: Path) -> float:
    """Return the seconds of a command from start to exit, in an emptied folder."""
    shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    run(command, folder)
    return time.perf_counter() - start


def run(command: list[str], folder: Path) -> None:
    """Run a command with its cache in the folder."""
    environment = {**os.environ, "HF_CIFAR_CACHE": str(folder / "cache")}
    subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


def main() -> None:
    """Time the commands, then evaluate the model of each one's last run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", default="bundled/efficientnet_lite0")
    parser.add_argument("--dataset_name", default="bundled/digits")
    parser.add_argument("--max_train_samples", default="5000")
    parser.add_argument(
        "--max_eval_samples", default="500", help="validation images after each epoch"
    )
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model, data = options.model_name_or_path, options.dataset_name
    images, checked = options.max_train_samples, options.max_eval_samples

    def ours(output: Path, *flags: str) -> list[str]:
        return [
            sys.executable, "scripts/finetune.py", "--dataset_name", data, "--max_train_samples", images,
            "--max_eval_samples", checked,
            "--model_name_or_path", model, "--image_size", "96", "--freeze", "backbone",
            "--num_train_epochs", "10", "--output_dir", str(output), *flags,
        ]  # fmt: skip

    with tempfile.TemporaryDirectory() as top:
        folders = {name: Path(top, name) for name in ("ours", "ours, L-BFGS", "plain")}
        outputs = {name: folder / "run" for name, folder in folders.items()}
        commands = {
            "ours": ours(outputs["ours"]),
            "ours, L-BFGS": ours(outputs["ours, L-BFGS"], "--head_solver", "lbfgs"),
            "plain": [
                sys.executable, "-c", PLAIN, model, data, images, checked, str(outputs["plain"]),
            ],
        }  # fmt: skip
        runs = {
            name: functools.partial(seconds, commands[name], folder)
            for name, folder in folders.items()
        }
        facts = {
            "model": Path(model).name, "dataset_name": Path(data).name, "num_images": int(images),
            "num_validation": int(checked),
        }  # fmt: skip
        compare("head on a frozen backbone", runs, "s", rounds=options.rounds, **facts)
        found = {}
        for name, output in outputs.items():
            evaluate = [
                sys.executable, "scripts/evaluate_run.py", "--model_name_or_path", str(output),
                "--dataset_name", data, "--split", "test", "--output_dir", str(folders[name] / "test"),
            ]  # fmt: skip
            run(evaluate, folders[name])
            metrics = json.loads((folders[name] / "test" / "metrics.json").read_text())
            found[name] = summary([metrics["test"]["accuracy"]])
            print(f"{name}: test accuracy {found[name]['median']}", flush=True)
        figures = {"unit": "accuracy", "n": 1, **facts, "figures": found, "ratios": {}}
        write({"benchmark": "head on a frozen backbone, test", **figures, **conditions()})


if __name__ == "__main__":
    main()

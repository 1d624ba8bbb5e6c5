"""A head on a frozen backbone, whole commands: ours on cached features, the plain recipe without.

python -m benchmarks.head --model_name_or_path bundled/efficientnet_lite0 --dataset_name DATA [--rounds 3]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import ROOT, compare

PLAIN = """
import sys, torch
from transformers import Trainer, TrainingArguments
from benchmarks.peers import collate, with_pil_transform
from hf_cifar import DataConfig, ModelConfig, Preprocessing, build_model, load_splits
model_name, data, images, output = sys.argv[1:]
splits = load_splits(DataConfig(dataset_name=data, max_train_samples=int(images)))
model, processor = build_model(ModelConfig(model_name_or_path=model_name, image_size=96, freeze="backbone"), splits.id2label)
preprocessing = Preprocessing.from_image_processor(processor)
args = TrainingArguments(
    output_dir=output, num_train_epochs=10, per_device_train_batch_size=32, learning_rate=2e-3, report_to="none",
    save_strategy="epoch", save_total_limit=2, remove_unused_columns=False, disable_tqdm=True,
)
Trainer(model=model, args=args, train_dataset=with_pil_transform(splits.train.rows, preprocessing), data_collator=collate).train()
model.save_pretrained(output)
"""  # noqa: E501


def main() -> None:
    """Time both commands from start to exit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", default="bundled/efficientnet_lite0")
    parser.add_argument("--dataset_name", default="bundled/digits")
    parser.add_argument("--max_train_samples", default="5000")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    data = [
        "--dataset_name",
        options.dataset_name,
        "--max_train_samples",
        options.max_train_samples,
    ]

    def seconds(command: list[str], folder: str) -> float:
        environment = {**os.environ, "HF_CIFAR_CACHE": folder}  # nothing is left over from before
        start = time.perf_counter()
        subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start

    def ours(*flags: str):
        def run() -> float:
            with tempfile.TemporaryDirectory() as folder:
                command = [
                    sys.executable, "scripts/finetune.py", *data, "--image_size", "96",
                    "--model_name_or_path", options.model_name_or_path, "--freeze", "backbone",
                    "--num_train_epochs", "10", "--output_dir", str(Path(folder, "run")), *flags,
                ]  # fmt: skip
                return seconds(command, folder)

        return run

    def plain() -> float:
        with tempfile.TemporaryDirectory() as folder:
            arguments = [
                options.model_name_or_path,
                options.dataset_name,
                options.max_train_samples,
            ]
            command = [sys.executable, "-c", PLAIN, *arguments, str(Path(folder, "run"))]
            return seconds(command, folder)

    runs = {"ours": ours(), "ours, L-BFGS": ours("--head_solver", "lbfgs"), "plain": plain}
    facts = {
        "model": Path(options.model_name_or_path).name,
        "dataset_name": Path(options.dataset_name).name,
        "num_images": int(options.max_train_samples),
    }
    compare("head on a frozen backbone", runs, "s", rounds=options.rounds, **facts)


if __name__ == "__main__":
    main()

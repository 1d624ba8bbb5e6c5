"""What a checkpoint costs: ResNet-50 with its optimiser, ours next to the stock Trainer's save.

python -m benchmarks.checkpoint [--model NAME] [--rounds 5]

Ours sums every file and waits until it is on the disk; the stock Trainer does neither. A third variant
flushes what the stock Trainer wrote.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from transformers import Trainer, TrainingArguments

from benchmarks.measure import compare
from benchmarks.peers import Task, collate, small_pictures, with_pil_transform
from hf_cifar import Preprocessing, build_model, build_trainer, load_splits
from hf_cifar.finetune import resolve_defaults

STEPS = 1  # the optimiser has its moments


def timed_save(trainer: Trainer, *, flush: bool = False) -> Callable[[], float]:
    """Seconds of one more checkpoint of a trainer, after which the one before is removed."""

    def save() -> float:
        trainer.state.global_step += 1
        start = time.perf_counter()
        trainer._save_checkpoint(trainer.model, None)
        if flush:
            for path in Path(trainer.args.output_dir).rglob("*"):
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
        return time.perf_counter() - start

    return save


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="scratch/resnet50")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = str(small_pictures(Path(folder, "data"), num_images=200))
        task = Task(options.model, 32, 4, STEPS, dataset_name=data)
        config = task.config(
            f"{folder}/ours",
            "--precision",
            "fp32",
            "--max_steps",
            str(STEPS),
            "--save_total_limit",
            "1",
        )
        splits = load_splits(config.data)
        model, processor = build_model(config.model, splits.id2label)
        ours = build_trainer(model, processor, splits, resolve_defaults(config, model))
        ours.train()
        stock = []
        for name in ("stock", "flushed"):
            model, processor = build_model(config.model, splits.id2label)
            shown = Preprocessing.from_image_processor(processor)
            args = TrainingArguments(
                output_dir=f"{folder}/{name}", per_device_train_batch_size=4, max_steps=STEPS,
                save_strategy="no", save_total_limit=1, remove_unused_columns=False, report_to="none",
                disable_tqdm=True,
            )  # fmt: skip
            rows = with_pil_transform(splits.train.rows, shown)
            stock.append(Trainer(model=model, args=args, train_dataset=rows, data_collator=collate))
            stock[-1].train()
        variants = {
            "ours": timed_save(ours),
            "stock Trainer": timed_save(stock[0]),
            "stock Trainer, flushed": timed_save(stock[1], flush=True),
        }
        compare("checkpoint", variants, "s", options.rounds, model=options.model)


if __name__ == "__main__":
    main()

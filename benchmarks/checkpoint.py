"""Cost of a checkpoint: ResNet-50 with its optimiser, ours compared with the stock Trainer's save.

python -m benchmarks.checkpoint [--model NAME] [--rounds 5]

Measures how long training waits. Ours then hashes every file and waits for the disk while training continues;
the second variant waits for that too. The stock Trainer does neither; the last variant flushes its files.
"""

from __future__ import annotations

import argparse
import functools
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from transformers import Trainer, TrainingArguments

from benchmarks.measure import compare
from benchmarks.peers import Task, collate, small_pictures, with_pil_transform
from hf_cifar import build_model, build_trainer, load_splits
from hf_cifar.plan import plan_run
from hf_cifar.transforms.preprocessing import Preprocessing

STEPS = 1  # initialises the optimiser's moments


def timed_save(
    trainer: Trainer,
    until: Callable[[], None] = lambda: None,
    after: Callable[[], None] = lambda: None,
) -> Callable[[], float]:
    """Return the seconds of one more checkpoint of a trainer, in place of the previous one.

    until, after: called before and after the clock stops."""

    def save() -> float:
        trainer.state.global_step += 1
        start = time.perf_counter()
        trainer._save_checkpoint(trainer.model, None)
        until()
        seconds = time.perf_counter() - start
        after()
        return seconds

    return save


def flush(folder: str) -> None:
    """Wait until all files below a folder are on the disk."""
    for path in Path(folder).rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="scratch/resnet50")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = str(small_pictures(Path(folder, "data"), num_images=200))
        task = Task(options.model, 32, 4, dataset_name=data, num_steps=STEPS)
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
        ours = build_trainer(model, processor, splits, plan_run(config, model, processor, splits))
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
            "ours": timed_save(ours, after=ours.finish_checkpoint),
            "ours, until complete": timed_save(ours, until=ours.finish_checkpoint),
            "stock Trainer": timed_save(stock[0]),
            "stock Trainer, flushed": timed_save(
                stock[1], until=functools.partial(flush, stock[1].args.output_dir)
            ),
        }
        compare("checkpoint", variants, "s", options.rounds, model=options.model)


if __name__ == "__main__":
    main()

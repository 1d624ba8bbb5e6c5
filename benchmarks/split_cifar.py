"""Split CIFAR-10, class-incremental: five tasks of two classes, evaluated on all ten classes at the end.

Plain fine-tuning and replay use `hf-cifar update`, once per task. DER++, for comparison, is implemented here
after Buzzega et al., Dark Experience for General Continual Learning, 2020: rows are stored in a reservoir,
with the logits that the model gave them at the time, which are the targets of a mean squared error. Joint
training sees all tasks at once. All share the pretrained network, views, optimiser, learning rate, batch and
epochs.

python -m benchmarks.split_cifar --dataset_name DATA [--seeds 3] [--per_class 500] [--image_size 64]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import disable_progress_bars
from torch import Tensor, nn

from benchmarks.studies import accuracy, arguments, record
from benchmarks.techniques import Options
from benchmarks.update import SHARED, write_part
from hf_cifar import RunConfig, finetune_classifier
from hf_cifar.config.augmentation import AugmentConfig
from hf_cifar.config.data import DataConfig
from hf_cifar.config.model import ModelConfig
from hf_cifar.config.studies import UpdateConfig
from hf_cifar.data.sources import load_source
from hf_cifar.data.split import prepare_split
from hf_cifar.data.splits import DataSource
from hf_cifar.data.store import build_store
from hf_cifar.logs import quieten
from hf_cifar.models.build import build_model
from hf_cifar.runs.folder import RunFolder
from hf_cifar.studies.update import update_run
from hf_cifar.studies.update_options import config_of_update
from hf_cifar.training.augmenting import augmentation
from hf_cifar.training.optimizers import default_rate
from hf_cifar.transforms.preprocessing import Preprocessing

TASKS = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
BUFFERS = (200, 500)
BATCH = 32
# alpha and beta of DER++ on Split CIFAR-10, by the size of the buffer: table of the paper's appendix.
WEIGHTS = {200: (0.1, 0.5), 500: (0.2, 0.5)}


class Reservoir:
    """A uniform sample of all rows seen so far, with their logits at the time (reservoir sampling)."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seen = size, 0
        self.rows: list[tuple[Tensor, int, Tensor]] = []
        self.draws = np.random.default_rng(seed)

    def add(self, images: Tensor, labels: Tensor, logits: Tensor) -> None:
        for row in zip(images, labels.tolist(), logits, strict=True):
            place = (
                len(self.rows) if len(self.rows) < self.size else self.draws.integers(self.seen + 1)
            )
            self.seen += 1
            if place == len(self.rows):
                self.rows.append(row)
            elif place < self.size:
                self.rows[int(place)] = row

    def draw(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        chosen = self.draws.choice(len(self.rows), min(count, len(self.rows)), replace=False)
        images, labels, logits = zip(*(self.rows[int(i)] for i in chosen), strict=True)
        return torch.stack(images), torch.tensor(labels), torch.stack(logits)


def der_plus_plus_loss(
    logits: Tensor,
    labels: Tensor,
    first: tuple[Tensor, Tensor] | None,
    second: tuple[Tensor, Tensor] | None,
    alpha: float,
    beta: float,
) -> Tensor:
    """Return cross-entropy + alpha * MSE of replayed logits + beta * cross-entropy of replayed labels.

    first: logits of replayed rows and those that were stored; second: logits and labels of other ones.
    """
    loss = F.cross_entropy(logits, labels)
    if first is not None:
        loss = loss + alpha * F.mse_loss(*first)
    if second is not None:
        loss = loss + beta * F.cross_entropy(*second)
    return loss


def der_plus_plus(
    parts: list[str], names: list[str], model_options: Options, seed: int, size: int
) -> float:
    """Train with DER++ on one task after another; return the accuracy on the test rows of all tasks."""
    torch.manual_seed(seed)
    epochs = int(str(model_options["num_train_epochs"]))
    config = ModelConfig(
        str(model_options["model_name_or_path"]), image_size=int(str(model_options["image_size"]))
    )
    model, processor = build_model(config, dict(enumerate(names)))
    preprocessing, augment = (
        Preprocessing.from_image_processor(processor),
        augmentation(AugmentConfig()),
    )
    rate = default_rate(model, BATCH, optim="adamw_torch", optim_args=None, scratch=False)
    assert rate is not None
    generator, reservoir = torch.Generator().manual_seed(seed), Reservoir(size, seed)
    alpha, beta = WEIGHTS[size]

    def logits_of(images: Tensor, labels: Tensor) -> Tensor:
        pixel_values, _ = augment(images, labels, preprocessing, len(names), generator)
        return model(pixel_values=pixel_values).logits

    for part in parts:
        train = DataSource(DataConfig(part)).splits.train
        split = prepare_split(train, preprocessing, augmented=True)
        store = build_store(split)
        ids = torch.tensor([names.index(name) for name in split.id2label.values()])
        optimizer = torch.optim.AdamW(model.parameters(), rate)
        steps, step = epochs * -(-len(store) // BATCH), 0
        for _ in range(epochs):
            for rows in torch.randperm(len(store), generator=generator).split(BATCH):
                model.train()
                for norm in model.modules():  # the checkpoint's statistics, as in the other runs
                    if isinstance(norm, nn.BatchNorm2d):
                        norm.eval()
                batch = store.__getitems__(rows.tolist())
                images, labels = batch["pixel_values"], ids[batch["labels"]]
                logits, replayed = logits_of(images, labels), []
                for _ in range(2 if reservoir.rows else 0):
                    old, old_labels, old_logits = reservoir.draw(BATCH)
                    replayed.append((logits_of(old, old_labels), old_logits, old_labels))
                loss = der_plus_plus_loss(
                    logits, labels,
                    (replayed[0][0], replayed[0][1]) if replayed else None,
                    (replayed[1][0], replayed[1][2]) if replayed else None,
                    alpha, beta,
                )  # fmt: skip
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for group in optimizer.param_groups:
                    group["lr"] = rate * (1 - step / steps)
                optimizer.step()
                step += 1
                reservoir.add(images, labels, logits.detach())
    model.eval()
    correct, count = 0, 0
    for part in parts:
        test = prepare_split(DataSource(DataConfig(part)).test_split, preprocessing)
        store = build_store(test)
        ids = torch.tensor([names.index(name) for name in test.id2label.values()])
        for rows in torch.arange(len(store)).split(64):
            batch = store.__getitems__(rows.tolist())
            with torch.inference_mode():
                found = model(pixel_values=preprocessing(batch["pixel_values"])).logits.argmax(1)
            correct += int((found == ids[batch["labels"]]).sum())
        count += len(store)
    return correct / count


def updates(parts: list[str], folder: Path, options: Options, replay: int, own: Options) -> float:
    """Fine-tune on the first task and update with each other one; return the accuracy on all test rows."""
    run = folder / "task-0"
    finetune_classifier(
        RunConfig.parse(arguments({**options, "dataset_name": parts[0], "output_dir": run}, SHARED))
    )
    for number, part in enumerate(parts[1:], 1):
        output = folder / f"task-{number}"
        given = {**own, "dataset_name": part, "output_dir": output}
        config = config_of_update(RunFolder(run), arguments(given, SHARED))
        update_run(run, config, UpdateConfig(replay=replay))
        run = output
    return accuracy(run)


def accuracies(
    source: Mapping, folder: Path, seed: int, per_class: int, model_options: Options
) -> dict[str, float]:
    """Return the accuracy on test after all tasks, by method, for one seed."""
    parts = [
        write_part(source, folder / f"data-{n}", classes, per_class, seed)
        for n, classes in enumerate(TASKS)
    ]
    options = {**model_options, "seed": seed}
    found = {}
    plain = {"class_balance": "none", "probe_images": 0, "seed": seed}
    found["plain fine-tuning"] = updates(parts, folder / "plain", options, 0, plain)
    for size in BUFFERS:
        found[f"replay, {size} stored"] = updates(
            parts, folder / f"replay-{size}", options, size, {"seed": seed}
        )
    names = source["train"].features["label"].names
    for size in BUFFERS:
        found[f"DER++, {size} stored"] = der_plus_plus(parts, names, model_options, seed, size)
    every = write_part(source, folder / "data", range(10), per_class, seed)
    run = folder / "joint"
    finetune_classifier(
        RunConfig.parse(arguments({**options, "dataset_name": every, "output_dir": run}, SHARED))
    )
    found["joint training"] = accuracy(run)
    print(f"seed {seed}: {json.dumps(found)}", flush=True)
    return found


def main() -> None:
    """Measure all methods with each seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--per_class", type=int, default=500)
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--num_train_epochs", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    disable_progress_bars()
    quieten(True)
    source = load_source(DataConfig(dataset_name=args.dataset_name))
    model_options: Options = {
        "model_name_or_path": "bundled/efficientnet_lite0", "image_size": args.image_size,
        "num_train_epochs": args.num_train_epochs,
    }  # fmt: skip
    found = []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            found.append(accuracies(source, Path(folder), seed, args.per_class, model_options))
    record(
        "Split CIFAR-10, five tasks",
        {name: [each[name] for each in found] for name in found[0]},
        args.output, unit="accuracy on test", per_class=args.per_class, image_size=args.image_size,
    )  # fmt: skip


if __name__ == "__main__":
    main()

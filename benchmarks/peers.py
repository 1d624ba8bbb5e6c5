"""The alternatives to this package, and the ceiling: each trains step by step, in turns with the others.

All peers get the same images, model, batch size, optimiser and number of steps, and the same augmentation:
a random resized crop and a flip.
"""

from __future__ import annotations

import functools
import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import transforms
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.turns import Turn
from hf_cifar import DataConfig, RunConfig, build_model, build_trainer, load_splits, plan_run
from hf_cifar.training.autotune import DTYPES, MEMORY_FORMATS, Setting, computing_as
from hf_cifar.training.memory import keep_freed_memory
from hf_cifar.transforms.preprocessing import Preprocessing

WARM_UP = 2  # steps
UNMEASURED = Setting()
AUGMENTATION = ["--crop_padding", "0", "--crop_scale", "0.25", "--flip", "0.5"]


@dataclass(frozen=True)
class Task:
    """A model to train in turns, with `batch_size` images a step.

    images: folder of the same images, in class folders. setting: how ours computes. num_steps: of a complete
    run, which usually is stopped earlier.
    """

    model: str
    image_size: int
    batch_size: int
    dataset_name: str = ""
    images: str = ""
    setting: Setting = UNMEASURED
    num_steps: int = 10**6

    def config(self, output_dir: str, *flags: str) -> RunConfig:
        """Return our options, with those of speed at their defaults."""
        return RunConfig.parse(
            [
                "--dataset_name", self.dataset_name, "--model_name_or_path", self.model,
                "--image_size", str(self.image_size), "--output_dir", output_dir,
                "--per_device_train_batch_size", str(self.batch_size),
                "--max_steps", str(self.num_steps), "--eval_strategy", "no",
                "--save_strategy", "no", "--logging_steps", "100000", "--disable_tqdm", "true",
                "--label_smoothing_factor", "0", *AUGMENTATION, *flags,
            ]
        )  # fmt: skip


def small_pictures(folder: Path, num_images: int = 4000) -> Path:
    """A saved data set of PNG images of CIFAR-10's size: scikit-learn's digits at 32 px, with noise."""
    digits = load_digits()
    generator = np.random.default_rng(0)
    cells = []
    for row in range(num_images):
        digit = Image.fromarray((digits.images[row % len(digits.images)] * 15).astype(np.uint8))
        pixels = np.asarray(digit.resize((32, 32), Image.Resampling.BICUBIC), dtype=np.int16)
        pixels = pixels[:, :, None] // 2 + generator.integers(0, 128, (32, 32, 3))
        buffer = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
        cells.append({"bytes": buffer.getvalue(), "path": None})
    labels = [int(digits.target[row % len(digits.target)]) for row in range(num_images)]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=list("0123456789"))})
    rows = Dataset.from_dict({"image": cells, "label": labels}, features=features)
    DatasetDict(train=rows).save_to_disk(str(folder))
    return folder


class AfterEachStep(TrainerCallback):
    """Calls a function after each step."""

    def __init__(self, turn: Turn) -> None:
        self.turn = turn

    def on_step_end(self, args, state, control, **kwargs):
        self.turn()


def device() -> torch.device:
    """Return the device that all peers train on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def chosen_setting(task: Task) -> Setting:
    """Return the setting that ours picks for a long run; on a CPU, for one too short to compile."""
    splits = load_splits(task.config("unused").data)
    epochs = "30" if device().type == "cuda" or task.image_size < 64 else "5"
    with tempfile.TemporaryDirectory() as folder:
        config = task.config(folder, "--max_steps", "-1", "--num_train_epochs", epochs)
        model, processor = build_model(config.model, splits.id2label)
        chosen = plan_run(config, model, processor, splits).config.train
    return Setting(
        chosen.precision, chosen.memory_format, chosen.attention, bool(chosen.torch_compile)
    )


def ours(task: Task, turn: Turn) -> None:
    """Train with this package at its defaults, in the setting that was measured."""
    setting = task.setting
    flags = ["--precision", setting.precision, "--memory_format", setting.memory_format]
    flags += ["--attention", setting.attention, "--torch_compile", str(setting.compiled)]
    splits = load_splits(task.config("unused").data)
    with tempfile.TemporaryDirectory() as folder:
        config = task.config(folder, *flags)
        model, processor = build_model(config.model, splits.id2label)
        trainer = build_trainer(
            model, processor, splits, plan_run(config, model, processor, splits)
        )
        trainer.add_callback(AfterEachStep(turn))
        trainer.train()


def pil_transform(preprocessing: Preprocessing) -> Callable[[Image.Image], torch.Tensor]:
    """Return the usual transforms of an image: random resized crop, flip, tensor, normalise."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(preprocessing.size, (0.25, 1), interpolation=3),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(preprocessing.mean, preprocessing.std),
        ]
    )


def with_pil_transform(
    rows: Dataset, preprocessing: Preprocessing, transform: Callable | None = None
) -> Dataset:
    """Return a data set of PIL images, transformed when they are read, as in transformers' example."""
    transform = transform or pil_transform(preprocessing)

    def apply(examples: dict) -> dict:
        return {
            "pixel_values": [transform(image.convert("RGB")) for image in examples["image"]],
            "labels": examples["label"],
        }

    return rows.cast_column("image", rows.features["image"].__class__(decode=True)).with_transform(
        apply
    )


def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    """Stack the examples of a batch."""
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }


def plain(task: Task, turn: Turn, **flags: object) -> None:
    """Train with the stock Trainer on PIL images. flags: TrainingArguments other than its defaults."""
    config = task.config("unused")
    splits = load_splits(config.data)
    model, processor = build_model(config.model, splits.id2label)
    rows = with_pil_transform(splits.train.rows, Preprocessing.from_image_processor(processor))
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=task.batch_size, max_steps=task.num_steps,
            save_strategy="no", logging_steps=100000, remove_unused_columns=False, report_to="none",
            disable_tqdm=True, learning_rate=1e-3, **flags,
        )  # fmt: skip
        trainer = Trainer(model=model, args=args, train_dataset=rows, data_collator=collate)
        trainer.add_callback(AfterEachStep(turn))
        trainer.train()


def timm_pattern(task: Task, turn: Turn, workers: int = 2) -> None:
    """Train with timm's data set, loader and loop on a folder of images, like its train.py, in float32."""
    from timm.data import create_dataset, create_loader
    from timm.optim import create_optimizer_v2

    config, on = task.config("unused"), device()
    model, processor = build_model(config.model, load_splits(config.data).id2label)
    preprocessing = Preprocessing.from_image_processor(processor)
    model = model.to(on).train()
    loader = create_loader(
        create_dataset("", root=task.images), (3, *preprocessing.size), task.batch_size,
        is_training=True, scale=(0.25, 1), hflip=0.5, color_jitter=None, num_workers=workers,
        mean=preprocessing.mean, std=preprocessing.std, interpolation="bicubic",
        use_prefetcher=on.type == "cuda", persistent_workers=False, device=on,
    )  # fmt: skip
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    batches = (batch for _ in range(10**6) for batch in loader)
    for _, (images, labels) in zip(range(task.num_steps), batches, strict=False):
        loss = F.cross_entropy(model(pixel_values=images.to(on)).logits, labels.to(on))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        turn()


def ceiling(task: Task, turn: Turn, keep_memory: bool = True) -> None:
    """Run forward, backward and step on one batch of ready tensors on the device, in our setting.

    keep_memory: keep freed memory for the next step, as ours does on a CPU.
    """
    if keep_memory and device().type == "cpu":
        keep_freed_memory()
    config, on = task.config("unused"), device()
    layout, dtype = MEMORY_FORMATS[task.setting.memory_format], DTYPES[task.setting.precision]
    id2label = load_splits(config.data).id2label
    model, processor = build_model(config.model, id2label)
    size = Preprocessing.from_image_processor(processor).size
    model = model.to(on).train()
    network = torch.compile(model, dynamic=False) if task.setting.compiled else model
    images = torch.randn(task.batch_size, 3, *size, device=on).contiguous(memory_format=layout)
    labels = torch.arange(task.batch_size, device=on) % len(id2label)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    with computing_as(task.setting, model):
        for _ in range(task.num_steps):
            with torch.autocast(on.type, dtype, enabled=dtype is not torch.float32):
                logits = network(pixel_values=images).logits
            F.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            turn()


def plain_at_its_best(workers: int) -> Callable[[Task, Turn], None]:
    """Train with the stock Trainer and its best flags."""
    return functools.partial(
        plain,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_num_workers=workers,
    )


PEERS: dict[str, Callable[[Task, Turn], None]] = {
    "ours": ours,
    "ceiling": ceiling,
    "ceiling, memory given back": functools.partial(ceiling, keep_memory=False),
    "plain": plain,
    **{f"plain, bf16 and {n} workers": plain_at_its_best(n) for n in (2, 4, 16)},
    "timm": timm_pattern,
}


def train_as(peer: str, task: Task, turn: Turn) -> None:
    """Train the task with the named peer."""
    PEERS[peer](task, turn)


def image_folder(dataset_name: str, folder: Path) -> Path:
    """Write the training images as PNG files, in a folder for each class."""
    split = load_splits(DataConfig(dataset_name=dataset_name)).train
    for row in range(len(split)):
        target = folder / split.id2label[int(split.labels[row])] / f"{row}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(split.decode(row)).save(target)
    return folder

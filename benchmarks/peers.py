"""What a user would otherwise run, and the ceiling: each trains some steps and tells its images/s.

All peers get the same images, model, batch size, optimiser and number of steps, and the same augmentation:
a random resized crop and a flip.
"""

from __future__ import annotations

import io
import tempfile
import time
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

from hf_cifar import Preprocessing, RunConfig, build_model, build_trainer, load_splits
from hf_cifar.finetune import resolve_defaults
from hf_cifar.setting import DTYPES, MEMORY_FORMATS, resolve_setting

WARM_UP = 3
AUGMENTATION = ["--crop_padding", "0", "--crop_scale", "0.25", "--flip", "0.5"]


@dataclass(frozen=True)
class Task:
    """A model to be trained for `steps` steps of `batch_size` images."""

    model: str
    image_size: int
    batch_size: int
    steps: int
    dataset_name: str = ""

    def config(self, output_dir: str, *flags: str) -> RunConfig:
        """Ours, with the speed options at their defaults."""
        return RunConfig.parse(
            [
                "--dataset_name", self.dataset_name, "--model_name_or_path", self.model,
                "--image_size", str(self.image_size), "--output_dir", output_dir,
                "--per_device_train_batch_size", str(self.batch_size),
                "--max_steps", str(WARM_UP + self.steps), "--eval_strategy", "no",
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


class StepClock(TrainerCallback):
    """Time from the end of the warm-up to the end of the last step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == WARM_UP:
            wait()
            self.start = time.perf_counter()
        if state.global_step == state.max_steps:
            wait()
            self.seconds = time.perf_counter() - self.start


def wait() -> None:
    """Until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def rate(trainer: Trainer, task: Task) -> float:
    """Images/s of a Trainer, without its warm-up."""
    clock = StepClock()
    trainer.add_callback(clock)
    trainer.train()
    return task.steps * task.batch_size / clock.seconds


def ours(task: Task) -> tuple[Callable[[], float], str]:
    """The package at its defaults; the setting is measured once, for a long run."""
    splits = load_splits(task.config("unused").data)
    with tempfile.TemporaryDirectory() as folder:
        config = task.config(folder, "--max_steps", "-1", "--num_train_epochs", "30")
        model, processor = build_model(config.model, splits.id2label)
        chosen = resolve_setting(config, model, processor, splits.train).train
    setting = ["--precision", chosen.precision, "--memory_format", chosen.memory_format]

    def run() -> float:
        with tempfile.TemporaryDirectory() as folder:
            config = task.config(folder, *setting)
            model, processor = build_model(config.model, splits.id2label)
            config = resolve_defaults(config, model)
            return rate(build_trainer(model, processor, splits, config), task)

    return run, f"{chosen.precision} {chosen.memory_format}"


def pil_transform(preprocessing: Preprocessing) -> Callable[[Image.Image], torch.Tensor]:
    """The usual pipeline of an image: random resized crop, flip, tensor, normalise."""
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
    """A data set of PIL images that is transformed when it is read, as the public example does."""
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


def plain(task: Task, **flags: object) -> Callable[[], float]:
    """The stock Trainer on PIL images; flags: TrainingArguments beyond its defaults."""
    config = task.config("unused")
    splits = load_splits(config.data)

    def run() -> float:
        model, processor = build_model(config.model, splits.id2label)
        rows = with_pil_transform(splits.train.rows, Preprocessing.from_image_processor(processor))
        with tempfile.TemporaryDirectory() as folder:
            args = TrainingArguments(
                output_dir=folder, per_device_train_batch_size=task.batch_size,
                max_steps=WARM_UP + task.steps, save_strategy="no", logging_steps=100000,
                remove_unused_columns=False, report_to="none", disable_tqdm=True,
                learning_rate=1e-3, **flags,
            )  # fmt: skip
            trainer = Trainer(model=model, args=args, train_dataset=rows, data_collator=collate)
            return rate(trainer, task)

    return run


def timm_pattern(task: Task, folder: Path, workers: int = 2) -> Callable[[], float]:
    """timm's data set, loader and loop on a folder of images, as its train.py has them; float32."""
    from timm.data import create_dataset, create_loader
    from timm.optim import create_optimizer_v2

    config = task.config("unused")
    splits = load_splits(config.data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def run() -> float:
        model, processor = build_model(config.model, splits.id2label)
        preprocessing = Preprocessing.from_image_processor(processor)
        model = model.to(device).train()
        loader = create_loader(
            create_dataset("", root=str(folder)), (3, *preprocessing.size), task.batch_size,
            is_training=True, scale=(0.25, 1), hflip=0.5, color_jitter=None, num_workers=workers,
            mean=preprocessing.mean, std=preprocessing.std, interpolation="bicubic",
            use_prefetcher=device.type == "cuda", persistent_workers=False, device=device,
        )  # fmt: skip
        optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
        batches = (batch for _ in range(10**6) for batch in loader)
        start = 0.0
        for step, (images, labels) in zip(range(WARM_UP + task.steps), batches, strict=False):
            if step == WARM_UP:
                wait()
                start = time.perf_counter()
            images, labels = images.to(device), labels.to(device)
            loss = F.cross_entropy(model(pixel_values=images).logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        wait()
        return task.steps * task.batch_size / (time.perf_counter() - start)

    return run


def ceiling(task: Task, setting: str) -> Callable[[], float]:
    """Forward, backward, step on one batch of tensors that lies on the device; no data at all."""
    precision, memory_format = setting.split()
    config = task.config("unused")
    splits = load_splits(config.data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layout, dtype = MEMORY_FORMATS[memory_format], DTYPES[precision]

    def run() -> float:
        model, processor = build_model(config.model, splits.id2label)
        size = Preprocessing.from_image_processor(processor).size
        model = model.to(device, memory_format=layout).train()
        images = torch.randn(task.batch_size, 3, *size, device=device).contiguous(
            memory_format=layout
        )
        labels = torch.arange(task.batch_size, device=device) % len(splits.id2label)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        start = 0.0
        for step in range(WARM_UP + task.steps):
            if step == WARM_UP:
                wait()
                start = time.perf_counter()
            with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
                logits = model(pixel_values=images).logits
            F.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        wait()
        return task.steps * task.batch_size / (time.perf_counter() - start)

    return run


def image_folder(task: Task, folder: Path) -> Path:
    """The training images as PNG files in one folder a class."""
    split = load_splits(task.config("unused").data).train
    for row in range(len(split)):
        target = folder / split.id2label[int(split.labels[row])] / f"{row}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(split.decode(row)).save(target)
    return folder

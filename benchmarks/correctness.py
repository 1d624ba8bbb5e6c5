"""Check that the fast paths give the same results: settings, transforms on a GPU, and resumed runs.

`python -m benchmarks.gpu` runs these first; without a GPU they compare the CPU with itself.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from hf_cifar import ModelConfig, RunConfig, build_model, finetune_classifier
from hf_cifar.training.autotune import DTYPES, MEMORY_FORMATS, Setting, candidates, computing_as
from hf_cifar.transforms.augmentation import Augmentation
from hf_cifar.transforms.policies import Policy
from hf_cifar.transforms.preprocessing import Preprocessing
from hf_cifar.transforms.views import RandomView

# Largest relative errors of logits and of gradients, compared with float32 on the CPU: fixed for float32; for
# fp16 and bf16, this many times the error of bfloat16 on the CPU, which differs widely between networks.
FLOAT32_LIMIT, HALF_PRECISION_FACTOR = 1e-2, 1.5
NAMES = {index: f"class {index}" for index in range(10)}


@dataclass(frozen=True)
class Check:
    """A measured difference, and the largest one that passes."""

    name: str
    difference: float
    limit: float

    @property
    def passed(self) -> bool:
        """Return True if the difference is within the limit; False for NaN."""
        return self.difference <= self.limit


def device() -> torch.device:
    """Return the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_settings(
    models: tuple[str, ...], image_size: int, settings: Sequence[Setting] | None = None
) -> Iterator[Check]:
    """Compare logits and gradients of settings, all candidates if not given, with float32 on the CPU."""
    for name in models:
        config = ModelConfig(model_name_or_path=name, image_size=image_size)
        torch.manual_seed(0)
        model, _ = build_model(config, NAMES)
        images = torch.randn(16, 3, image_size, image_size)
        reference = logits_and_gradients(model, images, Setting("fp32", "contiguous"))
        rounded = logits_and_gradients(model, images, Setting("bf16", "contiguous"))
        model.to(device())
        for setting in settings or candidates(model, device()):
            found = logits_and_gradients(model, images.to(device()), setting)
            for what, output, exact, bf16_on_cpu in zip(
                ("logits", "gradients"), found, reference, rounded, strict=True
            ):
                limit = FLOAT32_LIMIT
                if setting.precision != "fp32":
                    limit = HALF_PRECISION_FACTOR * relative_error(bf16_on_cpu, exact)
                difference = relative_error(output, exact)
                yield Check(f"{name}, {setting}: {what}", difference, limit)


def logits_and_gradients(
    model: PreTrainedModel, images: Tensor, setting: Setting
) -> tuple[Tensor, Tensor]:
    """Return logits [N, K] and all gradients as one vector, float64 on the CPU, of one training step.

    Without TF32, so that float32 on a GPU is float32.
    """
    model.train()
    network = torch.compile(model, dynamic=False) if setting.compiled else model
    dtype, on = DTYPES[setting.precision], images.device.type
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(0)  # for the same dropout
    images = images.contiguous(memory_format=MEMORY_FORMATS[setting.memory_format])
    with without_tf32(), computing_as(setting, model):
        with torch.autocast(on, dtype, enabled=dtype is not torch.float32):
            logits = network(pixel_values=images).logits
        labels = torch.arange(len(images), device=images.device) % logits.shape[1]
        scale = 2.0**7 if setting.precision == "fp16" else 1.0  # as a gradient scaler does
        (scale * F.cross_entropy(logits.float(), labels)).backward()
    gradients = [p.grad.double().cpu().flatten() / scale for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return logits.detach().double().cpu(), torch.cat(gradients)


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Let convolutions on a GPU compute in full float32 until the block ends."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def relative_error(found: Tensor, reference: Tensor) -> float:
    """Return the norm of the difference over the norm of the reference."""
    return ((found - reference).norm() / reference.norm()).item()


def check_transforms(size: int) -> Iterator[Check]:
    """Compare augmented and evaluated batches of the GPU with those of the CPU, from the same draws."""
    preprocessing = Preprocessing.from_image_processor(
        build_model(ModelConfig(model_name_or_path="scratch/resnet18", image_size=size), NAMES)[1]
    )
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    images = images.float().unfold(2, 5, 1).mean(-1).unfold(3, 5, 1).mean(-1).to(torch.uint8)
    labels = torch.arange(64) % 10
    different = (preprocessing(images) != preprocessing(images.to(device())).cpu()).sum().item()
    yield Check("evaluation transform: values that differ", different, 0)
    view = RandomView(padding=0.125, min_area=0.25, flip=0.5)
    turned = RandomView(rotation=20, shear=0.2, zoom=0.2, flip=0.5)
    augmentations = {
        "crop and flip": Augmentation(view),
        "rotation, shear and zoom": Augmentation(turned),
        "colour": Augmentation(view, color_jitter=0.4, hue=0.1, grayscale=0.2),
        "trivial augment": Augmentation(view, Policy.trivial_augment()),
        "rand augment": Augmentation(view, Policy.rand_augment(2, 0.3)),
        "erasing": Augmentation(view, random_erasing=0.5),
        "mixup and cutmix": Augmentation(view, mixup_alpha=0.2, cutmix_alpha=1.0),
    }
    for name, augmentation in augmentations.items():
        outputs = []
        for on in (torch.device("cpu"), device()):
            generator = torch.Generator().manual_seed(1)
            pixels, targets = augmentation(
                images.to(on), labels.to(on), preprocessing, 10, generator
            )
            outputs.append((pixels.cpu(), targets.cpu().float()))
        (ours, ours_targets), (theirs, theirs_targets) = outputs
        # Posterise and solarise are step functions: a value at an edge may fall on either side.
        share = ((ours - theirs).abs() > 1e-2).float().mean().item()
        yield Check(f"{name}: share of values that differ by more than 0.01", share, 1e-3)
        yield Check(f"{name}: targets", (ours_targets - theirs_targets).abs().max().item(), 1e-6)


def check_training(
    model: str, image_size: int, steps: int, names: Sequence[str] = ("fp16", "bf16")
) -> Iterator[Check]:
    """Compare the losses of complete runs in each named precision with those of a run in float32.

    names: precisions, each optionally followed by ` compiled`.
    """
    losses: dict[str, Tensor] = {}
    if device().type == "cpu":
        names = [name for name in names if name != "fp16"]
    for name in ("fp32", *names):
        flags = ["--torch_compile", "true"] if name.endswith("compiled") else []
        with tempfile.TemporaryDirectory() as folder:
            options = run_options(Path(folder, "run"), model, image_size, steps)
            options += ["--precision", name.split()[0], "--logging_steps", "1", *flags]
            finetune_classifier(RunConfig.parse([*options, "--save_strategy", "no"]))
            history = json.loads(Path(folder, "run", "run.json").read_text())["history"]
            losses[name] = torch.tensor([record["loss"] for record in history if "loss" in record])
        if name != "fp32":
            difference = relative_error(losses[name], losses["fp32"])
            yield Check(f"{model}, {steps} steps in {name}: losses", difference, 5e-2)


def check_resuming(model: str, image_size: int, steps: int) -> Iterator[Check]:
    """Resume a run from the checkpoint in its middle, and count the weights that differ at the end.

    Uses deterministic kernels, because others on a GPU sum in a random order.
    """
    with tempfile.TemporaryDirectory() as folder:
        whole, resumed = Path(folder, "whole"), Path(folder, "resumed")
        flags = ["--precision", "fp32", "--save_strategy", "steps", "--save_steps", str(steps // 2)]
        flags += ["--full_determinism", "true"]
        finetune_classifier(RunConfig.parse(run_options(whole, model, image_size, steps) + flags))
        shutil.copytree(whole, resumed)
        for path in (resumed / f"checkpoint-{steps}", resumed / "model.safetensors"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        flags += ["--resume_from_checkpoint", "last"]
        finetune_classifier(RunConfig.parse(run_options(resumed, model, image_size, steps) + flags))
        before, after = (load_file(run / "model.safetensors") for run in (whole, resumed))
        different = sum((before[name] != after[name]).sum().item() for name in before)
        yield Check(
            f"{model}, resumed at step {steps // 2} of {steps}: weights that differ", different, 0
        )


def run_options(output_dir: Path, model: str, image_size: int, steps: int) -> list[str]:
    """Return the options of a short run on scikit-learn's digits."""
    return [
        "--dataset_name", "bundled/digits", "--model_name_or_path", model, "--image_size", str(image_size),
        "--output_dir", str(output_dir), "--max_steps", str(steps), "--eval_strategy", "no",
        "--learning_rate", "1e-3", "--max_eval_samples", "64", "--disable_tqdm", "true",
        "--rotation", "10",
    ]  # fmt: skip

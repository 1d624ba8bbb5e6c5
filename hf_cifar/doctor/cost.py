"""What a run will cost: time, memory and disk, from a few timed steps of its own Trainer."""

from __future__ import annotations

import copy
import logging
import math
import tempfile
import time
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import torch
from transformers import BaseImageProcessor, PreTrainedModel, TrainerCallback

from hf_cifar.audit.findings import Finding
from hf_cifar.data.cache import cache_folder, free_bytes
from hf_cifar.data.preparation import gigabytes
from hf_cifar.data.split import Split, prepare_split, subset, with_images
from hf_cifar.data.splits import Splits
from hf_cifar.data.stratify import representative_rows
from hf_cifar.errors import UserError
from hf_cifar.models.heads import has_new_head
from hf_cifar.plan import Plan, images_a_step
from hf_cifar.preflight import run_bytes
from hf_cifar.text import duration, one_line
from hf_cifar.training.build import build_trainer
from hf_cifar.training.features import FeatureStore, accepting_features
from hf_cifar.training.progress import TrainingLines
from hf_cifar.training.race import BUDGET
from hf_cifar.transforms.preprocessing import Preprocessing

logger = logging.getLogger(__name__)
STEPS, SECONDS = (
    8,
    10.0,
)  # timed at most; the first step also allocates, and is left out if there are more
EVALUATED = 256  # images whose evaluation is timed


def measure_cost(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    splits: Splits,
    plan: Plan,
    seeds: int,
) -> dict[str, Any]:
    """Train a copy of the model for a few steps, and estimate the cost of the run, as plain values.

    Raises: UserError for what makes building the Trainer or a step fail, such as too little memory.
    """
    train, validation = splits.train, splits.validation
    preprocessing = Preprocessing.from_image_processor(image_processor)
    preparing = _preparation(splits, preprocessing, plan)
    options = plan.config.train
    batch = images_a_step(options, plan.processes)
    with tempfile.TemporaryDirectory(prefix="hf_cifar-doctor-") as folder:
        config = plan.config.as_trial(folder).with_training(
            max_steps=STEPS, probe_images=0, torch_compile=False, disable_tqdm=True, save_steps=None
        )
        trial = replace(plan, config=config, checkpoint=None)
        assert isinstance(train, Split)  # a stream has no steps to time in advance
        parts = Splits(
            _some(train, _whole_steps(len(train), batch), preprocessing, plan, augmented=True),
            _some(validation, EVALUATED, preprocessing, plan),
        )
        start = time.perf_counter()
        trainer = build_trainer(copy.deepcopy(model), image_processor, parts, trial)
        built = time.perf_counter() - start
        on_features = isinstance(trainer.train_dataset, FeatureStore)
        timer = StepTimes()
        trainer.add_callback(timer)
        trainer.remove_callback(TrainingLines)
        try:
            if options.head_solver != "lbfgs":
                trainer.train()
            evaluated = min(EVALUATED, len(validation))
            start = time.perf_counter()
            with accepting_features(trainer.classifier, trainer.train_dataset):
                trainer.predict(trainer.eval_dataset)
            per_image = (time.perf_counter() - start) / evaluated
        except UserError:
            raise
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{str(error).splitlines()[0]} Pass a smaller --per_device_train_batch_size (or "
                "--auto_find_batch_size true) or --per_device_eval_batch_size"
            ) from None
        except Exception as error:  # of any kind, in the model or a library
            raise UserError(
                f"training fails in its first steps with {type(error).__name__}: {one_line(error, 200)}; try "
                "other options, or another model"
            ) from error
        memory = _memory(plan.processes.device)
    steps = 0 if options.head_solver == "lbfgs" else _num_steps(len(train), batch, plan)
    a_step = timer.median
    parts_of = {"prepare images": preparing["seconds"]}
    if on_features:
        images = len(parts.train) * options.feature_views + evaluated
        whole = len(train) * options.feature_views + len(validation)
        parts_of["compute features"] = built * whole / max(1, images)
    elif options.probe_images and has_new_head(model):
        parts_of["fit the new head"] = per_image * min(options.probe_images, len(train))
    if plan.requested.train.learning_rate == "auto":
        parts_of["race learning rates"] = BUDGET * steps * a_step
    parts_of["train"] = steps * a_step
    evaluations = _num_evaluations(steps, plan)
    parts_of["evaluate"] = (evaluations + 1) * len(validation) * per_image
    seconds = seeds * sum(parts_of.values())
    needed, free = run_bytes(plan.config, model), free_bytes(plan.folder.path)
    return {
        "device": str(plan.processes.device), "seconds": seconds, "parts": parts_of, "runs": seeds,
        "seconds_per_step": a_step, "timed_steps": timer.count, "steps": steps, "batch": batch,
        "evaluations": evaluations, "epochs": options.num_train_epochs, "memory": memory,
        "disk": {"run_bytes": seeds * needed, "image_bytes": preparing["bytes"], "free_bytes": free,
                 "image_folder_free_bytes": free_bytes(cache_folder())},
        "precision": plan.config.train.precision,
    }  # fmt: skip


class StepTimes(TrainerCallback):
    """Times each optimiser step, and ends training after `SECONDS`."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._begun = self._start = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._begun = self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        now = time.perf_counter()
        self.times.append(now - self._start)
        self._start = now
        control.should_training_stop |= now - self._begun > SECONDS and len(self.times) > 1

    @property
    def count(self) -> int:
        """Number of steps that count."""
        return len(self.times[1:] or self.times)

    @property
    def median(self) -> float:
        """Median seconds of a step; 0 without steps."""
        return float(np.median(self.times[1:] or self.times or [0.0]))


def _whole_steps(num_images: int, batch: int) -> int:
    """Return how many images to time steps on: only whole batches, unless all images are fewer."""
    return min(STEPS, num_images // batch) * batch or num_images


def _some(
    split: Split, count: int, preprocessing: Preprocessing, plan: Plan, *, augmented: bool = False
) -> Split:
    """Return up to `count` images of a split, prepared; train keeps its classes."""
    rows = representative_rows(split.labels, count, plan.config.data.split_seed)
    return prepare_split(
        subset(split, rows), preprocessing, augmented=augmented, kind=plan.config.data.pixel_store,
        on_bad_image="skip", device=plan.processes.device,
    )  # fmt: skip


def _preparation(splits: Splits, preprocessing: Preprocessing, plan: Plan) -> dict[str, float]:
    """Return the seconds and bytes that it takes to prepare the images that are not prepared yet."""
    found = {"seconds": 0.0, "bytes": 0}
    for split, augmented in ((splits.train, True), (splits.validation, False)):
        assert isinstance(split, Split)
        kind, device = plan.config.data.pixel_store, plan.processes.device
        images = with_images(
            split, preprocessing, augmented=augmented, kind=kind, device=device
        ).images
        assert images is not None
        found["seconds"] += images.seconds
        found["bytes"] += images.prepared.num_bytes(images.positions)
    return found


def _num_steps(num_images: int, batch: int, plan: Plan) -> int:
    train = plan.config.train
    if train.max_steps > 0:
        return train.max_steps
    assert train.num_train_epochs is not None  # settled
    return math.ceil(math.ceil(num_images / batch) * train.num_train_epochs)


def _num_evaluations(steps: int, plan: Plan) -> int:
    """Return how often validation is evaluated during training."""
    train = plan.config.train
    if train.eval_strategy == "no" or not steps:
        return 0
    if train.eval_strategy == "steps" and train.eval_steps:
        every = train.eval_steps if train.eval_steps >= 1 else train.eval_steps * steps
        return int(steps // max(1, every))
    return math.ceil(train.num_train_epochs or 1)


def _memory(device: torch.device) -> dict[str, float]:
    """Return the memory in use after the steps, of the process and of a GPU, in bytes."""
    memory = psutil.virtual_memory()
    found: dict[str, float] = {
        "process_bytes": psutil.Process().memory_info().rss,
        "available_bytes": memory.available, "total_bytes": memory.total,
    }  # fmt: skip
    if device.type == "cuda":
        found["gpu_bytes"] = torch.cuda.max_memory_reserved(device)
        found["gpu_total_bytes"] = torch.cuda.mem_get_info(device)[1]
    return found


def render_cost(cost: dict[str, Any]) -> list[str]:
    """Render the cost in lines: time, memory, disk."""
    parts = ", ".join(
        f"{name} {duration(value)}" for name, value in cost["parts"].items() if value >= 0.5
    )
    runs = f" for {cost['runs']} runs" if cost["runs"] > 1 else ""
    memory, disk = cost["memory"], cost["disk"]
    gpu = (
        f"; GPU {gigabytes(memory['gpu_bytes'])} of {gigabytes(memory['gpu_total_bytes'])}"
        if "gpu_bytes" in memory else ""
    )  # fmt: skip
    images = (
        f", and {gigabytes(disk['image_bytes'])} of prepared images" if disk["image_bytes"] else ""
    )
    steps = (
        f"; {cost['steps']:,} steps of {cost['batch']} images, {cost['seconds_per_step']:.3g} s each (median "
        f"of {cost['timed_steps']})"
        if cost["steps"] else "; the head is solved without steps"
    )  # fmt: skip
    return [
        f"time: about {duration(cost['seconds'])}{runs}{f' ({parts})' if parts else ''}{steps} on "
        f"{cost['device']} in {cost['precision']}",
        f"memory: about {gigabytes(memory['process_bytes'])} of "
        f"{gigabytes(memory['total_bytes'])}, including this check{gpu}",
        f"disk: {gigabytes(disk['run_bytes'])} for the model and its checkpoints{images}; "
        f"{gigabytes(disk['free_bytes'])} are free",
    ]


def cost_findings(cost: dict[str, Any]) -> list[Finding]:
    """Return a warning if a run may not have enough memory."""
    memory = cost["memory"]
    if memory["available_bytes"] > 0.05 * memory["total_bytes"]:
        return []
    return [
        Finding(
            "warning", "little memory",
            f"after a few steps, only {gigabytes(memory['available_bytes'])} of memory are left",
            "pass a smaller --per_device_train_batch_size, or --pixel_store disk",
        )
    ]  # fmt: skip

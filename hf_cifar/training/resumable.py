"""A Trainer that can stop at any step, and resumes with bit-identical results."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from hf_cifar.data.split import Split
from hf_cifar.data.splits import Splits
from hf_cifar.data.store import ShardStore
from hf_cifar.data.streams import Stream
from hf_cifar.errors import UserError
from hf_cifar.training.checkpoints import (
    complete_checkpoint,
    find_damage,
    load_state,
    remove_old_checkpoints,
    save_state,
    written_aside,
)

logger = logging.getLogger(__name__)
OPTIMIZER_FILE, SCALER_FILE = "optimizer.safetensors", "scaler.safetensors"
IDENTITY_FILE = "identity.json"
IMAGES_PER_STEP = "images per step"  # in the identity
DOUBTED = "doubted rows"  # in the identity of a run with --clean_labels, see `Split`


class ResumableTrainer(Trainer):
    """A Trainer that can stop at any step and resume with bit-identical results.

    identity: plain values by name that must not change between a run and its resumption.
    """

    def __init__(self, *args: Any, identity: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.identity = identity or {}
        self.saved_step = -1  # of the last checkpoint that this process wrote
        self._completion: Future[None] | None = None
        self.resuming = Resuming(self)
        self.add_callback(self.resuming)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate without advancing the training's random generators, so that an interrupted evaluation can
        be repeated after a resume."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint. Training continues once it is written; it is complete once its files are hashed
        and flushed, see `finish_checkpoint`.

        Raises: UserError if this one or the previous one cannot be saved, or the weights are not finite.
        """
        self.finish_checkpoint()
        folder, state = Path(self.args.output_dir), self.state
        if not self._is_sharded and not all_finite(self.model):
            raise UserError(
                f"training diverged: the weights are not finite at step {state.global_step}; start again "
                f"with a lower --learning_rate than {self.args.learning_rate:g}"
            )
        self.store_flos()
        final = folder / f"checkpoint-{state.global_step}"
        if state.best_global_step == state.global_step:
            state.best_model_checkpoint = str(final)
        is_main = self.args.should_save
        with written_aside(
            folder, state.global_step, is_main=is_main, wait=self.accelerator.wait_for_everyone
        ) as staging:
            self.save_model(str(staging), _internal_call=True)
            if not self.args.save_only_model:
                self._save_states(staging)
            if is_main:
                for part in (*self.callback_handler.callbacks, self.control):
                    if isinstance(part, ExportableState):
                        state.stateful_callbacks[type(part).__name__] = part.state()
                state.save_to_json(str(staging / TRAINER_STATE_NAME))
                text = json.dumps(self.identity | self._step_identity(), indent=2)
                (staging / IDENTITY_FILE).write_text(text, encoding="utf-8")
        self.saved_step = step = state.global_step
        if is_main:
            best = {Path(state.best_model_checkpoint)} if state.best_model_checkpoint else set()
            limit = self.args.save_total_limit

            def complete() -> None:
                complete_checkpoint(folder, step)
                remove_old_checkpoints(folder, keep={final} | best, limit=limit)

            pool = ThreadPoolExecutor(1)
            self._completion = pool.submit(complete)
            pool.shutdown(wait=False)

    def finish_checkpoint(self, *, wait: bool = True) -> None:
        """Wait until the last checkpoint is complete. wait: False to return at once if it is not.

        Raises: UserError if it could not be written.
        """
        completion = self._completion
        if completion is not None and (wait or completion.done()):
            self._completion = None
            completion.result()

    def _load_best_model(self) -> None:
        self.finish_checkpoint()
        self.accelerator.wait_for_everyone()
        super()._load_best_model()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run an epoch unless the run is finished: the parent trains one more step (transformers 5.23)."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    @property
    def _is_sharded(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _save_states(self, folder: Path) -> None:
        """Write the states of optimiser, schedule, gradient scaler and random generators."""
        if self._is_sharded:  # they use their own formats
            self._save_optimizer_and_scheduler(str(folder))
        elif self.args.should_save:
            states = {
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.lr_scheduler.state_dict(),
            }
            save_state(folder / OPTIMIZER_FILE, states)
        if self.accelerator.scaler is not None and self.args.should_save:
            save_state(folder / SCALER_FILE, self.accelerator.scaler.state_dict())
        save_state(folder / self._random_state_file, random_states(self.args.device))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._is_sharded:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None:
            states = load_state(Path(checkpoint) / OPTIMIZER_FILE)
            self.optimizer.load_state_dict(states["optimizer"])
            self.lr_scheduler.load_state_dict(states["scheduler"])
        if self.accelerator.scaler is not None and checkpoint is not None:
            self.accelerator.scaler.load_state_dict(load_state(Path(checkpoint) / SCALER_FILE))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        path = Path(checkpoint) / self._random_state_file
        if path.exists():
            set_random_states(load_state(path), self.args.device)
        else:  # of a process that the run did not have then
            key = (self.args.seed, self.state.global_step, self.args.process_index)
            set_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))

    def _step_identity(self) -> dict[str, Any]:
        """Return the parts of the identity that depend on the processes; a stream is divided among them."""
        facts = {
            IMAGES_PER_STEP: self.get_total_train_batch_size(self.args),
            "processes": self.args.world_size,
        }
        if isinstance(self.train_dataset, ShardStore):
            facts["processes that read the stream"] = self.args.world_size
        return facts

    @property
    def _random_state_file(self) -> str:
        return f"rng_state_{self.args.process_index}.safetensors"

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Raises: UserError for a checkpoint with missing or unexpected weights."""
        wrong = [*load_result.missing_keys, *load_result.unexpected_keys]
        if wrong:
            raise UserError(
                f"the checkpoint belongs to another model: {len(wrong)} weights differ, first {wrong[0]}"
            )


class Resuming(TrainerCallback, ExportableState):
    """Restores what the Trainer's resume leaves out: early-stopping patience, the best checkpoint's path, an
    evaluation that was due when the run stopped, and the time that training took until then. Reports a
    checkpoint that failed after its step.

    checkpoint: folder that the run resumes from.
    """

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer
        self.checkpoint: str | None = None
        self._start, self._seconds_before = time.perf_counter(), 0.0

    @property
    def seconds(self) -> float:
        """The seconds of training so far, before the checkpoint too."""
        return self._seconds_before + time.perf_counter() - self._start

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, in the Trainer's form."""
        return {"args": {}, "attributes": {"seconds": self.seconds}}

    def on_train_begin(self, args, state, control, **kwargs):
        self._start, self._seconds_before = time.perf_counter(), 0.0
        if self.checkpoint is None:
            return
        saved = state.stateful_callbacks.get(type(self).__name__, self.state())
        self._seconds_before = saved["attributes"]["seconds"]
        trainer, checkpoint = self.trainer, Path(self.checkpoint)
        check_identity(checkpoint, trainer.identity | trainer._step_identity())
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                before = state.stateful_callbacks.get(type(callback).__name__, callback.state())
                callback.early_stopping_patience_counter = before["attributes"][
                    "early_stopping_patience_counter"
                ]
        state.best_model_checkpoint = None
        if state.best_global_step:
            best = checkpoint.parent / f"checkpoint-{state.best_global_step}"
            damage = find_damage(best)
            if damage is None:
                state.best_model_checkpoint = str(best)
            else:
                logger.warning(
                    "%s, the best so far, is lost: %s; the best one from here on is kept",
                    best,
                    damage,
                )
                state.best_metric = state.best_global_step = None
        if evaluation_due(args, state):
            metrics = trainer._evaluate(trial=None, ignore_keys_for_eval=None)
            if trainer._determine_best_metric(metrics, trial=None):
                state.best_model_checkpoint = str(checkpoint)

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.finish_checkpoint(wait=False)


def evaluation_due(args: TrainingArguments, state: TrainerState) -> bool:
    """Return True if the run stopped between a step and the evaluation due after it."""
    due = {
        "epoch": state.epoch is not None and state.epoch == int(state.epoch),
        "steps": bool(state.eval_steps) and state.global_step % state.eval_steps == 0,
    }
    evaluated = any(
        "eval_loss" in record and record["step"] == state.global_step
        for record in state.log_history
    )
    return due.get(str(args.eval_strategy.value), False) and not evaluated


def random_states(device: torch.device) -> dict[str, Any]:
    """Return the states of all random generators, for `set_random_states`."""
    state: Any = np.random.get_state()
    kind, keys, *rest = state
    states = {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Restore what `random_states` returned."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def check_identity(checkpoint: Path, identity: dict[str, Any]) -> None:
    """Require the values that the checkpoint was saved with; the number of processes may differ if a step
    has the same number of images.

    Raises: UserError that names the first difference.
    """
    before = json.loads((checkpoint / IDENTITY_FILE).read_text(encoding="utf-8"))
    if IMAGES_PER_STEP in before:
        before.pop("processes", None)
    changed = [name for name in before if before[name] != identity.get(name, before[name])]
    if changed:
        name = changed[0]
        values = f" ({before[name]} then, {identity[name]} now)"
        what = f"{name}{values if len(values) < 200 else ''}"
        raise UserError(
            f"{checkpoint} belongs to a run with different {what}; restore that, or start again in another "
            "--output_dir"
        )


def all_finite(model: nn.Module) -> bool:
    """Return True if every weight is finite. Waits for the device once."""
    with torch.no_grad():
        sums = [value.sum().float() for value in model.parameters() if value.is_floating_point()]
        return bool(torch.isfinite(torch.stack(sums)).all())


def identity(splits: Splits) -> dict[str, Any]:
    """Return the values that must be the same when a run is resumed."""
    parts = [s for s in (splits.train, splits.validation) if isinstance(s, Split)]
    return {"split": splits.hash} | identity_of(parts, splits.id2label)


def identity_of(splits: Sequence[Split], id2label: dict[int, str]) -> dict[str, Any]:
    """Return the same for splits that were not made together."""
    facts: dict[str, Any] = {"classes": list(id2label.values())}
    for split in splits:
        facts[f"labels of {split.name}"] = hashlib.sha256(split.labels.tobytes()).hexdigest()
        if split.doubted is not None:
            facts[DOUBTED] = split.doubted.tolist()
    return facts | {f"pixels of {name}": sha for name, sha in pixel_hashes(splits).items()}


def pixel_hashes(splits: Iterable[Split | Stream]) -> dict[str, str]:
    """Return the SHA-256 of the prepared images of each split; none for one that is not in the cache yet."""
    parts = [each for each in splits if isinstance(each, Split)]
    found = {split.name: split.images.pixel_hash for split in parts if split.images is not None}
    return {name: sha for name, sha in found.items() if sha is not None}

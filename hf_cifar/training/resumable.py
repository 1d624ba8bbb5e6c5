"""A Trainer that stops at any step and resumes to the same bits."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from hf_cifar.config.run import RunConfig
from hf_cifar.data.split import Split
from hf_cifar.data.splits import Splits
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


class ResumableTrainer(Trainer):
    """A Trainer that stops at any step, and goes on from there as if it had not stopped.

    identity: plain values by name, of what must not change while the run goes on.
    """

    def __init__(self, *args: Any, identity: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.identity = identity or {}
        self.saved_step = -1  # of the last checkpoint that this process wrote
        self._due = False
        self._completion: Future[None] | None = None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The parent's, without a trace in the random numbers of training: one cut off is made again."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """What the parent saves. Training goes on as soon as it is written; it counts as a checkpoint once it
        is summed and on the disk, see `finish_checkpoint`.

        Raises: UserError if this one or the one before cannot be saved, or is not finite.
        """
        self.finish_checkpoint()
        folder, state = Path(self.args.output_dir), self.state
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if not sharded and not all_finite(self.model):
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
                self._save_optimizer_and_scheduler(str(staging))
                self._save_scaler(str(staging))
                self._save_rng_state(str(staging))
            if is_main:
                for part in (*self.callback_handler.callbacks, self.control):
                    if isinstance(part, ExportableState):
                        state.stateful_callbacks[type(part).__name__] = part.state()
                state.save_to_json(str(staging / TRAINER_STATE_NAME))
                (staging / IDENTITY_FILE).write_text(json.dumps(self.identity, indent=2))
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
        """Wait for the last checkpoint to be whole and on the disk. wait: or only look whether it is.

        Raises: UserError if it could not be made.
        """
        completion = self._completion
        if completion is not None and (wait or completion.done()):
            self._completion = None
            completion.result()

    def _load_best_model(self) -> None:
        self.finish_checkpoint()
        self.accelerator.wait_for_everyone()
        super()._load_best_model()

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        """The parent's, with what it forgets: patience, where the best checkpoint lies by now, and an
        evaluation that was due when the run stopped."""
        started = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        state = self.state
        if resume_from_checkpoint is None:
            return started
        check_identity(Path(resume_from_checkpoint), self.identity)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                before = state.stateful_callbacks.get(type(callback).__name__, callback.state())
                callback.early_stopping_patience_counter = before["attributes"][
                    "early_stopping_patience_counter"
                ]
        state.best_model_checkpoint = None
        if state.best_global_step:
            best = Path(resume_from_checkpoint).parent / f"checkpoint-{state.best_global_step}"
            damage = find_damage(best)
            if damage is None:
                state.best_model_checkpoint = str(best)
            else:
                logger.warning(
                    "%s, the best so far, is lost: %s; the best from here counts", best, damage
                )
                state.best_metric = state.best_global_step = None
        every = {"epoch": num_update_steps_per_epoch, "steps": state.eval_steps}
        interval = every.get(str(self.args.eval_strategy.value))
        evaluated = any(
            "eval_loss" in record and record["step"] == state.global_step
            for record in state.log_history
        )
        self._due = bool(interval) and state.global_step % interval == 0 and not evaluated
        return started

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, Any]:
        prepared = super()._prepare_for_training(
            max_steps, train_dataloader, resume_from_checkpoint
        )
        if self._due:
            self._due = False
            metrics = self._evaluate(trial=None, ignore_keys_for_eval=None)
            if self._determine_best_metric(metrics, trial=None):
                self.state.best_model_checkpoint = resume_from_checkpoint
        return prepared

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The parent's, which trains a step too many of a run that ended in mid-epoch (transformers 5.23)."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # which have formats of their own
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            states = {
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.lr_scheduler.state_dict(),
            }
            save_state(Path(output_dir) / OPTIMIZER_FILE, states)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None:
            states = load_state(Path(checkpoint) / OPTIMIZER_FILE)
            self.optimizer.load_state_dict(states["optimizer"])
            self.lr_scheduler.load_state_dict(states["scheduler"])

    def _save_scaler(self, output_dir: str) -> None:
        if self.accelerator.scaler is not None and self.args.should_save:
            save_state(Path(output_dir) / SCALER_FILE, self.accelerator.scaler.state_dict())

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self.accelerator.scaler is not None and checkpoint is not None:
            self.accelerator.scaler.load_state_dict(load_state(Path(checkpoint) / SCALER_FILE))

    def _save_rng_state(self, output_dir: str) -> None:
        kind, keys, *rest = np.random.get_state()
        states = {
            "python": random.getstate(),
            "numpy": (kind, keys.tolist(), *rest),
            "torch": torch.get_rng_state(),
        }
        if self.args.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.args.device)
        save_state(self._rng_file(output_dir), states)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        states = load_state(self._rng_file(checkpoint))
        random.setstate(states["python"])
        np.random.set_state(states["numpy"])
        torch.set_rng_state(states["torch"])
        if "cuda" in states and self.args.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], self.args.device)

    def _rng_file(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"rng_state_{self.args.process_index}.safetensors"

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """A checkpoint that lacks weights of the model, or has others, is no checkpoint of this run."""
        wrong = [*load_result.missing_keys, *load_result.unexpected_keys]
        if wrong:
            raise UserError(
                f"the checkpoint is of another model: {len(wrong)} weights differ, first {wrong[0]}"
            )


def check_identity(checkpoint: Path, identity: dict[str, Any]) -> None:
    """Raises: UserError that names what is no longer what it was when the checkpoint was saved."""
    before = json.loads((checkpoint / IDENTITY_FILE).read_text())
    changed = [name for name in before if before[name] != identity.get(name, before[name])]
    if changed:
        name = changed[0]
        what = f"{name} ({before[name]} then, {identity[name]} now)"
        raise UserError(
            f"{checkpoint} is of a run with other {what if len(what) < 200 else name}; bring that back, or "
            "start anew in another --output_dir"
        )


def all_finite(model: nn.Module) -> bool:
    """Whether every weight is a number."""
    with torch.no_grad():
        sums = [value.sum() for value in model.parameters() if value.is_floating_point()]
        return bool(torch.isfinite(torch.stack([each.float().cpu() for each in sums])).all())


def identity(splits: Splits, config: RunConfig) -> dict[str, Any]:
    """What must not change while a run goes on, as plain values."""
    facts: dict[str, Any] = {
        "split": splits.hash,
        "classes": list(splits.id2label.values()),
        "processes": config.train.world_size,
    }
    for split in (splits.train, splits.validation):
        if isinstance(split, Split):
            facts[f"labels of {split.name}"] = hashlib.sha256(split.labels.tobytes()).hexdigest()
    return facts | {f"pixels of {name}": sha for name, sha in pixel_hashes(splits, config).items()}


def pixel_hashes(splits: Splits, config: RunConfig) -> dict[str, str]:
    """SHA-256 of the images of both splits, where they are decoded into memory."""
    if config.data.pixel_store == "streamed":
        return {}
    parts = [s for s in (splits.train, splits.validation) if isinstance(s, Split)]
    return {split.name: split.pixel_hash for split in parts if split.pixel_hash is not None}

"""Checkpoints that are whole or not there: written aside, then summed and renamed into place while training
goes on; a run goes on from the newest that is whole, to the same bits.

A checkpoint is a folder `checkpoint-STEP` with a list of its files' SHA-256 in the format of `sha256sum -c`.
Tensors and plain values are kept as safetensors, which run no code when they are read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from hf_cifar.errors import UserError
from hf_cifar.text import one_line

logger = logging.getLogger(__name__)

SUMS_FILE = "SHA256SUMS"
OPTIMIZER_FILE, SCALER_FILE = "optimizer.safetensors", "scaler.safetensors"
IDENTITY_FILE = "identity.json"
# Of what is being written or removed; whoever finds one finds the rest of a process that was killed.
STAGING, TRASH = ".checkpoint-staging", ".checkpoint-trash"


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


@contextlib.contextmanager
def written_aside(
    run_folder: Path, step: int, *, is_main: bool, wait: Callable[[], None]
) -> Iterator[Path]:
    """A folder to write a checkpoint into; `complete_checkpoint` makes it one.

    is_main: whether this process makes the folder, for all that write. wait: until all processes are there.

    Raises: UserError if it cannot be written; nothing is left of it then.
    """
    staging = run_folder / STAGING
    with _told(run_folder, step, is_main):
        if is_main:
            _remove_rest(run_folder)
            staging.mkdir(parents=True)
        wait()
        yield staging
        wait()


def complete_checkpoint(run_folder: Path, step: int) -> None:
    """Make what was written aside `checkpoint-STEP`, whole, on the disk.

    A checkpoint of this step that is there already is replaced.
    Raises: UserError if that fails; what was there before stays as it was.
    """
    staging, final = run_folder / STAGING, run_folder / f"checkpoint-{step}"
    with _told(run_folder, step, is_main=True):
        _seal(staging)
        _replace(final, staging, aside=run_folder / TRASH)
        _sync(run_folder)
        _remove_rest(run_folder)


@contextlib.contextmanager
def _told(run_folder: Path, step: int, is_main: bool) -> Iterator[None]:
    """Leave nothing half written, and say in a line what the system did not do."""
    try:
        yield
    except BaseException as error:
        if is_main:
            _remove_rest(run_folder)
        if not isinstance(error, (OSError, SafetensorError)):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(
            f"cannot save a checkpoint at step {step} in {run_folder}: {reason}; make room, then go on from "
            "the one before with --resume_from_checkpoint last"
        ) from None


def _replace(folder: Path, new: Path, *, aside: Path) -> None:
    """Rename `new` to `folder`; what is there goes aside, and comes back if that fails."""
    replaced = folder.exists()
    if replaced:
        os.rename(folder, aside)
    try:
        os.rename(new, folder)
    except OSError:
        if replaced:
            os.rename(aside, folder)
        raise


def list_checkpoints(run_folder: str | Path) -> list[Path]:
    """The checkpoint folders of a run, the newest step first, whole or not."""
    steps = {
        int(match[1]): path
        for path in Path(run_folder).glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
    }
    return [steps[step] for step in sorted(steps, reverse=True)]


def newest_checkpoint(run_folder: str | Path) -> Path | None:
    """The newest checkpoint that is whole, or None; one line for each newer one that is not."""
    for folder in list_checkpoints(run_folder):
        damage = find_damage(folder)
        if damage is None:
            return folder
        logger.warning("%s is damaged: %s; looking for the one before", folder, damage)
    return None


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, in a phrase; None if each is what was written."""
    try:
        lines = (checkpoint / SUMS_FILE).read_bytes().decode().splitlines(keepends=True)
    except FileNotFoundError:
        return f"it has no {SUMS_FILE}"
    except (OSError, UnicodeDecodeError) as error:
        return f"{SUMS_FILE} cannot be read ({error})"
    sums = {}
    for line in lines:
        match = re.fullmatch(r"([0-9a-f]{64})  (.+)\n", line)
        if match is None:
            return f"{SUMS_FILE} is no list of sums"
        sums[match[2]] = match[1]
    there = set(_files(checkpoint))
    for name in sorted(there ^ sums.keys()):
        return f"{name} is missing" if name in sums else f"{name} does not belong to it"
    try:
        with ThreadPoolExecutor(4) as pool:
            found = dict(
                zip(sums, pool.map(lambda name: file_hash(checkpoint / name), sums), strict=True)
            )
    except OSError as error:
        return str(error)
    return next(
        (f"{name} is not what was written" for name in sums if found[name] != sums[name]), None
    )


def remove_old_checkpoints(run_folder: Path, *, keep: set[Path], limit: int | None) -> None:
    """Remove the oldest checkpoints until no more than `limit` are left, or only those of `keep`."""
    checkpoints = list_checkpoints(run_folder)
    surplus = len(checkpoints) - limit if limit else 0
    for folder in [path for path in reversed(checkpoints) if path not in keep][: max(0, surplus)]:
        # First out of sight: a checkpoint is never seen half removed.
        os.rename(folder, run_folder / TRASH)
        _remove_rest(run_folder)


def save_state(path: Path, state: Any) -> None:
    """Write nested dicts, lists and tuples of tensors and plain values, as one safetensors file.

    Raises: UserError for a value that is neither.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_to_plain(state, tensors))
    storages: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        # Not two tensors of one memory, nor a part of a larger one: safetensors refuses them.
        if storage.data_ptr() in storages or storage.nbytes() != tensor.nbytes:
            tensors[name] = tensor.clone()
        storages.add(storage.data_ptr())
    save_file(tensors, path, metadata={"tree": tree})


def load_state(path: Path) -> Any:
    """What `save_state` wrote, on the CPU, tensors with their strides. Raises: UserError if it did not."""
    try:
        with safe_open(path, framework="pt") as file:
            tree = json.loads(file.metadata()["tree"])
            return _from_plain(tree, file.get_tensor)
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} is no saved state: {one_line(error)}") from None


def _to_plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON: what JSON lacks is a list that begins with its kind; tensors go to `tensors`."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        # In the order of their memory: an optimiser's moments are laid out like their weights.
        order = sorted(range(value.ndim), key=lambda dim: (-value.stride(dim), dim))
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().permute(order).contiguous()
        return ["tensor", name, order]
    if isinstance(value, dict):
        items = [[_to_plain(k, tensors), _to_plain(v, tensors)] for k, v in value.items()]
        return ["dict", items]
    if type(value) in (list, tuple):
        return [type(value).__name__, [_to_plain(item, tensors) for item in value]]
    raise UserError(
        f"a checkpoint cannot hold a {type(value).__name__}; use another --optim or schedule"
    )


def _from_plain(tree: Any, tensor_of: Callable[[str], Tensor]) -> Any:
    if not isinstance(tree, list):
        return tree
    if tree[0] == "tensor":
        order = tree[2]
        return tensor_of(tree[1]).permute([order.index(dim) for dim in range(len(order))])
    if tree[0] == "dict":
        return {_from_plain(k, tensor_of): _from_plain(v, tensor_of) for k, v in tree[1]}
    return {"list": list, "tuple": tuple}[tree[0]](_from_plain(item, tensor_of) for item in tree[1])


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(folder: Path) -> None:
    """Sum and flush all files of a folder; last the list of the sums."""
    names = sorted(_files(folder))
    with ThreadPoolExecutor(4) as pool:
        flushed = pool.map(lambda name: _sync(folder / name), names)
        sums = list(pool.map(lambda name: file_hash(folder / name), names))
        list(flushed)  # raises what went wrong
    text = "".join(f"{digest}  {name}\n" for digest, name in zip(sums, names, strict=True))
    (folder / SUMS_FILE).write_text(text)
    _sync(folder / SUMS_FILE)
    _sync(folder)


def _files(folder: Path) -> list[str]:
    """Names of all files below a folder, but the list of sums."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return [name for name in names if name != SUMS_FILE]


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_rest(run_folder: Path) -> None:
    for name in (STAGING, TRASH):
        shutil.rmtree(run_folder / name, ignore_errors=True)

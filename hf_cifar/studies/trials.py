"""A trial of a search: a run whose evaluations are reported, and which may be stopped early."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import release_memory
from transformers import TrainerCallback

from hf_cifar.config.run import RunConfig
from hf_cifar.data.splits import DataSource
from hf_cifar.errors import UserError
from hf_cifar.finetune import finetune_classifier
from hf_cifar.runs.folder import RunFolder, write_json
from hf_cifar.runs.signals import Stopped
from hf_cifar.studies.execution import start_or_resume
from hf_cifar.studies.series import is_kept
from hf_cifar.text import one_line

logger = logging.getLogger(__name__)
# Starts of a trial from the same checkpoint; after that, the trial must be what kills its processes.
MAX_STARTS = 3


class Pruned(Exception):
    """A trial is stopped because others were better at the same point."""


class OutOfTime(Exception):
    """A trial is stopped at a checkpoint, because the time of the search is up."""


class Watch(TrainerCallback):
    """Reports the metric of each evaluation, and stops a trial that is pruned or out of time.

    facts: content of trial.json, which is written at each evaluation. metric: its name in `metrics`; value:
    the last one. evaluated: called with the percentage of the training that is done and the metric; returns
    True to prune the trial. deadline: by `time.monotonic`.
    """

    def __init__(
        self,
        folder: RunFolder,
        facts: dict[str, Any],
        metric: str,
        evaluated: Callable[[int, float], bool],
        deadline: float | None,
    ) -> None:
        self.folder, self.facts, self.metric = folder, facts, metric
        self.evaluated, self.deadline = evaluated, deadline
        self.value: float | None = None
        self.out_of_time = self.trains = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.trains = True

    def on_train_end(self, args, state, control, **kwargs):
        self.trains = False

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        value = (metrics or {}).get(f"eval_{self.metric}")
        if not self.trains or value is None:
            return
        percent = round(100 * state.global_step / state.max_steps)
        self.value = float(value)
        self.facts["evaluations"][str(percent)] = self.value
        write_json(self.folder.trial_path, self.facts | {"seconds": seconds_of(self.facts)})
        if self.evaluated(percent, self.value) and percent < 100:
            raise Pruned

    def on_step_end(self, args, state, control, **kwargs):
        # The Trainer saves a checkpoint when it is stopped.
        if self.deadline is not None and time.monotonic() > self.deadline:
            self.out_of_time = state.global_step < state.max_steps
            if self.out_of_time:
                raise Stopped(signal.SIGTERM)


def begin_trial(folder: RunFolder, number: int, parameters: dict[str, Any]) -> dict[str, Any]:
    """Record in trial.json that this process starts or resumes a trial, and return its content.

    Raises: UserError if too many processes have died in it without a new checkpoint.
    """
    before, checkpoints = folder.trial(), folder.checkpoints()
    newest = checkpoints[0].name if checkpoints else None
    starts = before.get("starts", 0) if before.get("checkpoint") == newest else 0
    facts = {
        "number": number, "state": "running", "parameters": parameters, "starts": starts + 1,
        "checkpoint": newest, "worker": f"process {os.getpid()} on {socket.gethostname()}",
        "seconds": before.get("seconds", 0.0), "started": time.time(),
        "evaluations": before.get("evaluations", {}),
    }  # fmt: skip
    if starts >= MAX_STARTS:
        raise UserError(f"{starts} processes have died in this trial without a new checkpoint")
    write_json(folder.trial_path, facts)
    return facts


def run_trial(
    config: RunConfig,
    source: DataSource,
    facts: dict[str, Any],
    metric: str,
    evaluated: Callable[[int, float], bool],
    deadline: float | None,
) -> dict[str, Any]:
    """Start or resume the run of a trial, and return the content of trial.json with its state and value.

    The model, metrics and predictions of a complete trial stay, like those of any run; its checkpoints, and
    those of one that was pruned or failed, are removed.

    Raises: OutOfTime; Stopped.
    """
    folder = RunFolder(config.train.output_dir)
    watch = Watch(folder, facts, metric, evaluated, deadline)
    ends: dict[str, Any] = {"state": "complete"}
    try:
        if not is_kept(config):
            finetune_classifier(start_or_resume(config), source, callbacks=[watch])
        ends["value"] = folder.metrics()["validation"][metric]
    except Pruned:
        ends = {"state": "pruned", "value": watch.value}
    except (UserError, torch.OutOfMemoryError) as error:
        ends = {"state": "failed", "reason": one_line(error, 300)}
    except Stopped:
        # The process did not die, so the count of starts begins again.
        write_json(folder.trial_path, facts | {"state": "stopped", "starts": 0} | times_of(facts))
        if watch.out_of_time:
            raise OutOfTime from None
        raise
    finally:
        release_memory()
    return facts | ends | times_of(facts)


def times_of(facts: dict[str, Any]) -> dict[str, float]:
    """Return the seconds that a trial which ends now took, and the current time."""
    return {"seconds": seconds_of(facts), "finished": time.time()}


def seconds_of(facts: dict[str, Any]) -> float:
    """Return the seconds that all processes of a trial have worked on it so far."""
    return round(facts["seconds"] + time.time() - facts["started"], 2)


def end_trial(folder: RunFolder, facts: dict[str, Any]) -> None:
    """Write trial.json of a trial that has ended, and remove its checkpoints."""
    write_json(folder.trial_path, facts)
    for checkpoint in folder.checkpoints():
        shutil.rmtree(checkpoint)

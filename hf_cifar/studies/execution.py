"""Finish the runs of a series, alone or together with other processes and machines."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from accelerate.utils import broadcast_object_list, release_memory

from hf_cifar.config.run import RunConfig
from hf_cifar.data.splits import DataSource
from hf_cifar.finetune import finetune_classifier
from hf_cifar.plan import requested_setting
from hf_cifar.runs.folder import RunFolder
from hf_cifar.runs.lock import claimed_run
from hf_cifar.runs.processes import Processes, is_main_process, start_processes
from hf_cifar.studies.series import is_kept

logger = logging.getLogger(__name__)

WAIT_SECONDS = 1.0  # between checks of what other processes are working on
FINISHED, TAKEN, FREE = "finished", "taken", "free"


def run_series(configs: Sequence[RunConfig], source: DataSource) -> None:
    """Finish every run, each in its own folder; they share the images of `source`.

    If the options resume, finished runs are kept and interrupted ones resume. Other processes may work on the
    same series, on this machine or on others that share the folder: each takes runs that no other process is
    working on, and takes over those of a process that has died. All runs use the setting that
    `--precision auto` picks for the first.
    """
    processes, pending = start_processes(configs[0]), list(configs)
    waiting = False
    while pending:
        before = len(pending)
        for config in tuple(pending):
            with claimed(config, configs[0], processes) as state:
                if state != TAKEN:
                    finish(config, state, configs, source)
                    pending.remove(config)
        if len(pending) == before:
            if not waiting and processes.is_main:
                names = ", ".join(Path(config.train.output_dir).name for config in pending)
                logger.info("waiting for other processes, which are working on %s", names)
            waiting = True
            time.sleep(WAIT_SECONDS)


@contextlib.contextmanager
def claimed(config: RunConfig, first: RunConfig, processes: Processes) -> Iterator[str]:
    """Claim a run for this process and those that train with it, and yield its state.

    FREE: claimed here until the block ends or the process dies. TAKEN: claimed by another process, or waiting
    until the first run of the series has picked the setting.
    """
    waits = config is not first and not RunFolder(first.train.output_dir).has_run
    with contextlib.ExitStack() as stack:
        state = [TAKEN]
        if processes.is_main and is_kept(config):
            state = [FINISHED]
        elif processes.is_main and not waits:
            is_free = stack.enter_context(claimed_run(Path(config.train.output_dir)))
            # Another process may have finished it before it was claimed here.
            state = [FINISHED if is_kept(config) else FREE if is_free else TAKEN]
        if processes.count > 1:
            broadcast_object_list(state)
        yield state[0]


def finish(config: RunConfig, state: str, configs: Sequence[RunConfig], source: DataSource) -> None:
    """Start or resume a run that is free, and log which one it is."""
    number, folder = configs.index(config), config.train.output_dir
    place = f"run {number + 1} of {len(configs)}"
    if state == FINISHED:
        logger.info("%s: already finished, in %s", place, folder)
        return
    logger.info("%s: %s", place, folder)
    config = start_or_resume(config)
    if number:
        config = with_setting_of(config, [RunFolder(configs[0].train.output_dir)])
    finetune_classifier(config, source.sharing(config.data))
    release_memory()  # a Trainer and its model refer to each other


def start_or_resume(config: RunConfig) -> RunConfig:
    """Resume if there is a checkpoint; otherwise start, even if an earlier run left no checkpoint."""
    folder = RunFolder(config.train.output_dir)
    if not config.train.resumes or folder.checkpoints():
        return config
    if is_main_process():
        folder.config_path.unlink(missing_ok=True)
    return config.with_training(resume_from_checkpoint=None)


def with_setting_of(config: RunConfig, folders: Iterable[RunFolder]) -> RunConfig:
    """Return the options of a run with the compute setting of the first of these folders that has one."""
    for folder in folders:
        if folder.has_run:
            return config.with_training(**requested_setting(config.train, folder.load_config()))
    return config


@contextlib.contextmanager
def alone_in(folder: Path, wait_seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """Wait until no other process is in this block for the same folder, checking every `wait_seconds`."""
    while True:
        with claimed_run(folder) as is_free:
            if is_free:
                yield
                return
        time.sleep(wait_seconds)

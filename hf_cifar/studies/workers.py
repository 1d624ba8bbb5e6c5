"""The processes of a search: each takes trials, also those of processes that died, until there are enough."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from hf_cifar.config.space import render_choice
from hf_cifar.errors import UserError
from hf_cifar.evaluation.tables import render_number
from hf_cifar.runs.lock import claimed_run
from hf_cifar.studies.execution import alone_in, with_setting_of
from hf_cifar.studies.optuna_study import adopt, ask
from hf_cifar.studies.search_plan import Search
from hf_cifar.studies.trials import OutOfTime, begin_trial, end_trial, run_trial
from hf_cifar.text import duration, one_line

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial


logger = logging.getLogger(__name__)
POLL_SECONDS = 0.2  # between checks of what other processes are working on
PROGRESS = "hf_cifar.progress"
FAILURES = 5  # in a row, which end the search


def run_trials(search: Search) -> None:
    """Run trials until the search has enough of them or its time is up, and no other process is running one.

    Raises: UserError if several in a row have failed.
    """
    failures, waiting, begun = 0, False, False
    while True:
        with contextlib.ExitStack() as claim:
            with alone_in(search.folder.path, POLL_SECONDS):
                found = next_trial(search, claim)
            if found == "none":
                return
            if found != "wait":
                with without_setup() if begun else contextlib.nullcontext():
                    state = work_on(search, found)
                begun = True
                failures = failures + 1 if state == "failed" else 0
                if failures >= FAILURES:
                    reason = search.trial_folder(found.number).trial()["reason"]
                    raise UserError(f"{failures} trials in a row failed: {reason}")
                continue
        if not waiting:
            logger.info("waiting for other processes")
        waiting = True
        time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def without_setup() -> Iterator[None]:
    """Do not log how a trial is set up, which is the same as for the first one; its progress is logged."""
    levels = {"hf_cifar": logging.WARNING, "hf_cifar.studies": logging.INFO, PROGRESS: logging.INFO}
    loggers = {logging.getLogger(name): level for name, level in levels.items()}
    before = {each: each.level for each in loggers}
    if logging.getLogger("hf_cifar").isEnabledFor(logging.INFO):
        for each, level in loggers.items():
            each.setLevel(level)
    try:
        yield
    finally:
        for each, level in before.items():
            each.setLevel(level)


def next_trial(search: Search, claim: contextlib.ExitStack) -> Trial | Literal["none", "wait"]:
    """Return the next trial for this process: one that no living process works on, or a new one. Its folder
    is locked until `claim` is closed. Other trials wait until the first one has picked the compute setting.
    Only one process may be here at a time."""
    from optuna.trial import TrialState

    sampler, seed = search.options.sampler, search.config.train.seed
    busy, has_setting = False, any(folder.has_run for folder in search.trial_folders())
    for trial in search.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        with contextlib.ExitStack() as attempt:
            folder = search.trial_folder(trial.number).path
            is_free = attempt.enter_context(claimed_run(folder))
            if is_free and not search.out_of_time and (has_setting or not busy):
                claim.push(attempt.pop_all())
                logger.info("trial %d resumed: its process has ended", trial.number)
                return adopt(search.study, trial, sampler, search.space, seed)
            busy |= not is_free
    if search.out_of_time or started(search) >= search.num_trials:
        return "wait" if busy else "none"
    if busy and not has_setting:
        return "wait"
    found = ask(search.study, sampler, search.space, seed)
    claim.enter_context(claimed_run(search.trial_folder(found.number).path))
    return found


def started(search: Search) -> int:
    """Count the trials that have begun, except lost ones, of which only the number is left."""
    trials = search.study.get_trials(deepcopy=False)
    return sum(trial.state.name != "WAITING" and "lost" not in trial.user_attrs for trial in trials)


def work_on(search: Search, trial: Trial) -> str:
    """Start or resume a trial, and tell the study how it ended; returns its state.

    A trial that is stopped at a checkpoint, by a signal or the time limit, resumes at the next start.
    """
    from optuna.exceptions import StorageInternalError

    number, parameters = trial.number, trial.params
    folder = search.trial_folder(number)
    facts = folder.trial()
    if facts.get("state") not in ("complete", "pruned", "failed"):
        logger.info("trial %d: %s", number, render_parameters(parameters))

        def evaluated(percent: int, value: float) -> bool:
            try:
                trial.report(value, percent)
                return trial.should_prune()
            except StorageInternalError as error:
                logger.warning("cannot reach the storage of the search: %s", one_line(error))
                return False

        try:
            config = search.options_of(parameters, f"trial-{number}")
            facts = begin_trial(folder, number, parameters)
            # If it resumes, its own setting comes first.
            config = with_setting_of(config, [folder, *search.trial_folders()])
            facts = run_trial(
                config, search.source, facts, search.metric, evaluated, search.deadline
            )
        except OutOfTime:
            logger.info("trial %d: stopped at a checkpoint, because the time is up", number)
            return "stopped"
        except UserError as error:
            facts |= {
                "number": number, "parameters": parameters, "state": "failed", "reason": str(error),
            }  # fmt: skip
    end_trial(folder, facts)
    tell(search, trial, facts)
    return facts["state"]


def tell(search: Search, trial: Trial, facts: dict[str, Any]) -> None:
    """Tell the study how a trial has ended, and log it in a line."""
    from optuna.trial import TrialState

    states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED}
    value = facts["value"] if facts["state"] == "complete" else None
    search.study.tell(trial.number, value, states.get(facts["state"], TrialState.FAIL), True)
    seconds = duration(facts.get("seconds", 0))
    if facts["state"] == "failed":
        logger.warning("trial %d: failed after %s: %s", trial.number, seconds, facts["reason"])
        return
    pruned = f" at {max(map(int, facts['evaluations']))}%, pruned" if value is None else ""
    best = best_trial(search)
    logger.info(
        "trial %d: %s %s%s, in %s; best %s",
        trial.number, search.metric, render_number(facts["value"]), pruned, seconds,
        "none yet" if best is None else f"{render_number(best.value)} (trial {best.number})",
    )  # fmt: skip


def best_trial(search: Search) -> FrozenTrial | None:
    """Return the best complete trial; among equals the one with the lowest cross-entropy, or the first."""
    return next(iter(best_trials(search)), None)


def best_trials(search: Search) -> list[FrozenTrial]:
    """Return the complete trials that share the best value of the metric, as `best_trial` ranks them."""
    from optuna.trial import TrialState

    def rank(trial: FrozenTrial) -> tuple[float, int]:
        metrics = search.trial_folder(trial.number).metrics().get("validation", {})
        return metrics.get("cross_entropy", math.inf), trial.number

    complete = search.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    values = [trial.value or 0.0 for trial in complete]
    best = (max if search.larger_is_better else min)(values, default=None)
    return sorted((trial for trial in complete if (trial.value or 0.0) == best), key=rank)


def render_parameters(parameters: dict[str, Any]) -> str:
    """Format the parameters of a trial for people."""
    return ", ".join(f"{name} {render_choice(value)}" for name, value in parameters.items())

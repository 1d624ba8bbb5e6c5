"""The optuna study of a search: its storage, sampler and pruner. Needs optuna, and no torch."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_cifar.config.space import Choices, Space
from hf_cifar.errors import UserError
from hf_cifar.extras import require
from hf_cifar.platform import lock_file
from hf_cifar.runs.folder import RunFolder
from hf_cifar.text import one_line

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

logger = logging.getLogger(__name__)
POLL_SECONDS = 0.01  # between attempts to lock the journal
PROPOSALS = 20  # of a sampler; if none is new, the next new combination is taken
MIN_IMPORTANCE = 4  # different values of complete trials that importances need


def open_study(folder: Path, url: str | None, name: str, direction: str) -> Study:
    """Open the study of a search, or create it. url: of a database; default: a journal in the folder.

    Raises: UserError if the storage cannot be opened.
    """
    optuna = require("optuna", extra="search")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", module="optuna")
    storage = open_database(url) if url else open_journal(RunFolder(folder).journal_path)
    return optuna.create_study(
        storage=storage, study_name=name, direction=direction, load_if_exists=True
    )


def open_journal(path: Path) -> BaseStorage:
    """Open a journal file; one that cannot be read is renamed, and a new one is started."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    lock: Any = JournalLock(path)
    try:
        return JournalStorage(JournalFileBackend(str(path), lock))
    except (ValueError, LookupError) as error:
        damaged = path.with_suffix(".damaged")
        path.replace(damaged)
        logger.warning(
            "%s cannot be read (%s); it is renamed to %s", path, one_line(error, 80), damaged
        )
        return JournalStorage(JournalFileBackend(str(path), lock))


class JournalLock:
    """The lock of a journal, which the system releases at once if its process dies; optuna's own lock files
    make others wait for 30 seconds. An incomplete line of a process that died is removed.

    On a file system without locks, only one process may search, as the run folders need locks too.
    """

    def __init__(self, journal: Path) -> None:
        self.journal = journal
        self._held = contextlib.ExitStack()

    def acquire(self) -> bool:
        """Wait for the lock."""
        path = self.journal.with_name(f".{self.journal.name}.lock")
        with contextlib.suppress(NotImplementedError):
            while True:
                with contextlib.ExitStack() as attempt:
                    if attempt.enter_context(lock_file(path, create=True)) is not None:
                        self._held = attempt.pop_all()
                        break
                time.sleep(POLL_SECONDS)
        remove_partial_line(self.journal)
        return True

    def release(self) -> None:
        """Release the lock."""
        self._held.close()


def remove_partial_line(path: Path) -> None:
    """Remove an incomplete last line of a file."""
    with contextlib.suppress(FileNotFoundError), path.open("rb+") as file:
        size = file.seek(0, 2)
        if not size:
            return
        file.seek(size - 1)
        if file.read(1) == b"\n":
            return
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def open_database(url: str) -> BaseStorage:
    """Open a database. Raises: UserError, without the password."""
    from optuna.exceptions import StorageInternalError
    from optuna.storages import RDBStorage
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError

    try:
        shown = make_url(url).render_as_string(hide_password=True)
    except SQLAlchemyError:
        raise UserError(
            "--storage takes a database URL, such as postgresql+psycopg://USER@HOST/NAME; leave it out for a "
            "file in --output_dir"
        ) from None
    try:
        return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
    except ImportError as error:
        raise UserError(
            f"--storage {shown}: {one_line(error.__cause__ or error)}; install the driver of the database, "
            "for example pip install 'psycopg[binary]' for postgresql+psycopg://"
        ) from None
    except (SQLAlchemyError, StorageInternalError, RuntimeError) as error:
        reason = one_line(error.__cause__ or error, 200)
        raise UserError(f"--storage {shown}: {reason}") from None


def distributions_of(space: Space) -> dict[str, BaseDistribution]:
    """Return a space as optuna's distributions."""
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    found: dict[str, BaseDistribution] = {}
    for name, each in space.items():
        if isinstance(each, Choices):
            found[name] = CategoricalDistribution(each.values)
        elif each.whole:
            found[name] = IntDistribution(int(each.low), int(each.high), log=each.log)
        else:
            found[name] = FloatDistribution(each.low, each.high, log=each.log)
    return found


def build_sampler(name: str, seed: int, number: int) -> BaseSampler:
    """Return the sampler that proposes the trial of this number.

    Its random numbers depend only on the seed and the number: workers do not propose the same values, and an
    interrupted search continues as if it had not been interrupted.
    """
    from optuna.samplers import RandomSampler, TPESampler

    own = int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
    return TPESampler(seed=own) if name == "tpe" else RandomSampler(seed=own)


def ask(study: Study, sampler: str, space: Space, seed: int) -> Trial:
    """Begin a new trial, with all parameters. Only one process may be here at a time.

    No combination of a space of lists is proposed twice: the next new one is queued first, unless the queue
    still has one because a process died before it took it.
    """
    trials = study.get_trials(deepcopy=False)
    study.sampler = build_sampler(sampler, seed, len(trials))
    is_queued = any(trial.state.name == "WAITING" for trial in trials)
    if num_combinations(space) < math.inf and not is_queued:
        study.enqueue_trial(next_combination(study, sampler, space))
    return study.ask(distributions_of(space))


def next_combination(study: Study, sampler: str, space: Space) -> dict[str, Any]:
    """Return a combination of a space of lists that no trial has: the next one of a grid, or the first new
    one that the study's sampler proposes."""
    import optuna

    trials = study.get_trials(deepcopy=False)
    given = [trial.system_attrs.get("fixed_params", {}) | trial.params for trial in trials]
    if sampler != "grid":
        draft = optuna.create_study(direction=study.direction, sampler=study.sampler)
        draft.add_trials(trials)
        for _ in range(PROPOSALS):
            proposed = draft.ask(distributions_of(space)).params
            if proposed not in given:
                return proposed
    return next(each for each in grid_of(space) if each not in given)


def adopt(study: Study, trial: FrozenTrial, sampler: str, space: Space, seed: int) -> Trial:
    """Return a running trial whose process has died, with all parameters: the process may have died before
    all were set."""
    from optuna.trial import Trial

    study.sampler = build_sampler(sampler, seed, trial.number)
    adopted = Trial(study, trial._trial_id)
    for name, each in space.items():
        if isinstance(each, Choices):
            adopted.suggest_categorical(name, each.values)
        elif each.whole:
            adopted.suggest_int(name, int(each.low), int(each.high), log=each.log)
        else:
            adopted.suggest_float(name, each.low, each.high, log=each.log)
    return adopted


def num_combinations(space: Space) -> float:
    """Return the number of combinations of a space, infinite if it has a range."""
    sizes = [len(each.values) if isinstance(each, Choices) else math.inf for each in space.values()]
    return math.prod(sizes)


def grid_of(space: Space) -> Iterator[dict[str, Any]]:
    """Yield every combination of a space of lists."""
    lists = [each.values for each in space.values() if isinstance(each, Choices)]
    return (dict(zip(space, values, strict=True)) for values in itertools.product(*lists))


def importances(study: Study) -> dict[str, float] | None:
    """Return the importance of each parameter, by PED-ANOVA, as shares, largest first; None for too few
    complete trials."""
    from optuna.importance import get_param_importances
    from optuna.trial import TrialState

    values = {each.value for each in study.get_trials(states=(TrialState.COMPLETE,))}
    if len(values) < MIN_IMPORTANCE:
        return None
    try:
        return dict(get_param_importances(study))
    except (RuntimeError, ValueError) as error:
        logger.info("importance: not computed, because %s", one_line(error))
        return None


def add_trial(study: Study, facts: Mapping[str, Any] | None, space: Space) -> None:
    """Add a trial to a study that has lost it. facts: of trial.json, or None for one whose folder is lost
    too, which keeps its number."""
    from optuna.trial import TrialState, create_trial

    facts = facts or {"state": "lost"}
    states = {
        "complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED,
        "running": TrialState.RUNNING, "stopped": TrialState.RUNNING,
    }  # fmt: skip
    parameters = facts.get("parameters", {})
    distributions = {
        name: each for name, each in distributions_of(space).items() if name in parameters
    }
    study.add_trial(
        create_trial(
            state=states.get(facts["state"], TrialState.FAIL),
            value=facts.get("value") if facts["state"] == "complete" else None,
            params=parameters,
            distributions=distributions,
            intermediate_values={int(k): v for k, v in facts.get("evaluations", {}).items()},
            user_attrs={"lost": True} if facts["state"] == "lost" else {},
        )
    )

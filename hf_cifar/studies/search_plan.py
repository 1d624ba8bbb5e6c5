"""What the processes of a search share: options, space, metric and study. Imports no torch.

This is in study.json, and the results of each trial are in its own trial.json. Optuna's storage only
distributes the work, and can be rebuilt from these files.
"""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hf_cifar.config.metrics import BEST_METRICS
from hf_cifar.config.run import RunConfig
from hf_cifar.config.space import Choices, Space, space_of
from hf_cifar.config.studies import SearchConfig
from hf_cifar.data.splits import DataSource
from hf_cifar.errors import UserError
from hf_cifar.runs.folder import RunFolder, write_json
from hf_cifar.runs.processes import share_of_launcher
from hf_cifar.runs.resume import may_change
from hf_cifar.studies.optuna_study import add_trial, num_combinations, open_study
from hf_cifar.studies.series import LENGTHS, check_series, run_of

if TYPE_CHECKING:
    from optuna.study import Study

logger = logging.getLogger(__name__)
DEFAULT_TRIALS = 30


@dataclass(frozen=True, eq=False)
class Search:
    """A search with its options, checked: what all of its processes share.

    config: the options that the space does not set, for every trial. deadline: by `time.monotonic`.
    """

    config: RunConfig
    options: SearchConfig
    space: Space
    source: DataSource
    metric: str
    deadline: float | None

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.config.train.output_dir)

    @property
    def larger_is_better(self) -> bool:
        return BEST_METRICS[self.metric]

    @property
    def num_trials(self) -> float:
        """The number of trials of all processes together."""
        has_end = self.options.sampler == "grid" or self.deadline is not None
        wanted = self.options.n_trials or (math.inf if has_end else DEFAULT_TRIALS)
        return min(wanted, num_combinations(self.space))

    @property
    def out_of_time(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def trial_folder(self, number: int) -> RunFolder:
        return RunFolder(self.folder.path / f"trial-{number}")

    def trial_folders(self) -> list[RunFolder]:
        """The folders of the trials, in order."""
        return [self.trial_folder(number) for number in self.numbers()]

    def numbers(self) -> list[int]:
        """The numbers of the trials that have a folder, in order."""
        paths = self.folder.path.glob("trial-*/trial.json")
        return sorted(int(path.parent.name.removeprefix("trial-")) for path in paths)

    def shared(self) -> dict[str, Any]:
        """What the processes of a search must agree on, as plain values."""
        return {
            "metric": self.metric,
            "sampler": self.options.sampler,
            "prune": self.options.prune,
            "space": {name: each.plain for name, each in self.space.items()},
            "options": self.config.options(),
        }

    def options_of(self, parameters: Mapping[str, Any], name: str) -> RunConfig:
        """Return the options of a trial's run, in the folder `name`; it never reads test."""
        config = self.config.with_options(**parameters)
        return run_of(
            config, name, metric_for_best_model=self.metric, resume_from_checkpoint="last",
            do_predict=False, check_leakage=False, reject=None,
        )  # fmt: skip

    def winner_of(self, parameters: Mapping[str, Any]) -> RunConfig:
        """Return the options of the winner's run, as requested."""
        train = self.config.train
        return self.options_of(parameters, self.folder.winner_path.name).with_training(
            do_predict=train.do_predict, check_leakage=train.check_leakage, reject=train.reject
        )

    @cached_property
    def study(self) -> Study:
        """The study in its storage, with all trials that have a folder."""
        direction = "maximize" if self.larger_is_better else "minimize"
        study = open_study(
            self.folder.path, self.options.storage, self.folder.study()["name"], direction
        )
        known, numbers = len(study.get_trials(deepcopy=False)), self.numbers()
        if numbers and numbers[-1] >= known:
            logger.warning(
                "the storage has %d of %d trials; the others are read from their folders",
                known,
                numbers[-1] + 1,
            )
            for number in range(known, numbers[-1] + 1):
                facts = self.trial_folder(number).trial() if number in numbers else None
                add_trial(study, facts, self.space)
        study.pruner = self.pruner()
        return study

    def pruner(self) -> Any:
        from optuna.pruners import MedianPruner, NopPruner

        return MedianPruner() if self.options.prune else NopPruner()


def prepare_search(config: RunConfig, options: SearchConfig) -> Space:
    """Check options and folder before anything is read, and return the space.

    Raises: UserError.
    """
    check_series(config, "hf-cifar search")
    if config.train.seeds != 1:
        raise UserError("--seeds does not work with hf-cifar search; leave it out")
    if share_of_launcher()[1] > 1:
        raise UserError(
            "hf-cifar search trains each trial in one process; start the same command several times, without "
            "a launcher, and the processes share the trials"
        )
    space = space_of(options.space, config)
    ranges = [name for name, each in space.items() if not isinstance(each, Choices)]
    if options.sampler == "grid" and ranges:
        raise UserError(
            f"--sampler grid needs a list of choices for each option, and {ranges[0]} has a range; write a "
            "--space with lists"
        )
    folder = RunFolder(config.train.output_dir)
    if not folder.study():
        folder.refuse_occupied()
    return space


def join(search: Search) -> None:
    """Begin the search in its folder, or check that it is the same one. Raises: UserError."""
    before, now = search.folder.study(), search.shared()
    if not before:
        write_json(search.folder.study_path, {"name": f"hf-cifar {uuid.uuid4().hex[:12]}", **now})
        return
    for name in ("metric", "sampler", "prune", "space"):
        if before[name] != now[name]:
            raise UserError(
                f"--{name.replace('metric', 'metric_for_best_model')} differs from that of the search in "
                f"{search.folder.path}; pass the same, or another --output_dir"
            )
    earlier, given = before["options"], now["options"]
    for name in {**earlier, **given}:
        if earlier.get(name) == given.get(name):
            continue
        if name in LENGTHS or not may_change(name, search.config):
            raise UserError(
                f"--{name} is {given.get(name, 'the default')}, but the search in {search.folder.path} began "
                f"with {earlier.get(name, 'the default')}; pass the same, or another --output_dir"
            )

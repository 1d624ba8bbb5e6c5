"""A search for the best options: complete runs as trials, proposed by optuna; the winner is trained again."""

from __future__ import annotations

import logging
import math
import shutil
import time
from typing import Any

from hf_cifar.config.metrics import LOSS, words
from hf_cifar.config.run import RunConfig
from hf_cifar.config.studies import SearchConfig
from hf_cifar.data.splits import DataSource
from hf_cifar.errors import UserError
from hf_cifar.hub.origin import public_name
from hf_cifar.report.search import render_page
from hf_cifar.runs.folder import RunFolder, write_json, write_text
from hf_cifar.runs.lock import LOCK_FILE
from hf_cifar.studies.optuna_study import importances
from hf_cifar.studies.search_plan import Search, join, prepare_search
from hf_cifar.studies.series import is_kept
from hf_cifar.text import duration

logger = logging.getLogger(__name__)


def run_search(
    config: RunConfig, options: SearchConfig | None = None, source: DataSource | None = None
) -> dict[str, Any]:
    """Run trials, each a run in output_dir/trial-NUMBER, then train the winner again, in output_dir/best.

    The same call continues after an interruption, and other processes that share output_dir may make it at
    the same time: trials of a process that has died are taken over, from their last checkpoint. Returns the
    content of search.json, see `summarise_search`.

    Raises: UserError before the first trial, for options or folders that do not fit; and if no trial is
    complete at the end.
    """
    options, began = options or SearchConfig(), time.monotonic()
    space = prepare_search(config, options)
    from hf_cifar.plan import best_metric  # imports torch
    from hf_cifar.studies.execution import alone_in
    from hf_cifar.studies.workers import POLL_SECONDS, run_trials

    source = source or DataSource(config.data)
    if config.train.do_predict:
        _ = source.test_split  # raises now, and not after all trials, if there is none
    metric = best_metric(config.train, multi_label=source.splits.multi_label).removeprefix("eval_")
    search = Search(
        config, options, space, source,
        metric="cross_entropy" if metric == LOSS else metric,  # as metrics.json names it
        deadline=None if options.seconds is None else began + options.seconds,
    )  # fmt: skip
    with alone_in(search.folder.path, POLL_SECONDS):
        join(search)
        _ = search.study  # opens it
    announce(search)
    run_trials(search)
    return train_winner(search)


def announce(search: Search) -> None:
    """Log the space, how many trials there are, and which given options it replaces."""
    for name, each in search.space.items():
        logger.info("searching --%s: %s", name, each)
    given, defaults = search.config.options(), RunConfig().options()
    replaced = [name for name in search.space if given.get(name) != defaults.get(name)]
    if replaced:
        values = ", ".join(f"--{name} {given[name]}" for name in replaced)
        logger.info("these options are searched, so their given values are not used: %s", values)
    limit = "" if search.options.time_limit is None else f", for {search.options.time_limit}"
    count = "trials" if search.num_trials == math.inf else f"{search.num_trials:g} trials"
    logger.info(
        "%s by %s%s, ranked by %s on %s validation images",
        count, search.options.sampler, limit, words(search.metric),
        f"{len(search.source.splits.validation):,}",
    )  # fmt: skip
    wanted = search.options.n_trials
    if wanted is not None and search.num_trials < wanted:
        logger.warning(
            "--n_trials %s: the space has only %g combinations", f"{wanted:,}", search.num_trials
        )


def train_winner(search: Search) -> dict[str, Any]:
    """Train the winner in its own folder, unless that is done, and write its recipe, the summary and the
    page; returns the summary. Only one process does this at a time, and it then looks for the winner again.

    Raises: UserError if no trial is complete.
    """
    from hf_cifar.finetune import finetune_classifier
    from hf_cifar.studies.execution import alone_in, start_or_resume, with_setting_of
    from hf_cifar.studies.workers import POLL_SECONDS, best_trial, best_trials

    if best_trial(search) is None:
        failed = [folder.trial() for folder in search.trial_folders()]
        failed = [each for each in failed if each["state"] == "failed"]
        reason = f" ({len(failed)} failed, the last one: {failed[-1]['reason']})" if failed else ""
        raise UserError(
            f"no trial is complete yet{reason}; pass a longer --time_limit or more --n_trials: the same "
            "command continues this search"
        )
    study, folder = search.folder, RunFolder(search.folder.winner_path)
    with alone_in(folder.path, POLL_SECONDS):
        best, *equal = best_trials(search)
        if equal:
            logger.info(
                "%d trials share the best %s; trial %d has the lowest cross-entropy",
                1 + len(equal), words(search.metric), best.number,
            )  # fmt: skip
        config, before = search.winner_of(best.params), folder.trial().get("number")
        if before != best.number:
            if before is not None:
                logger.info("trial %d replaces trial %d as the winner", best.number, before)
            clear(folder)
            write_json(folder.trial_path, {"number": best.number, "parameters": best.params})
        write_text(study.recipe_path, recipe_of(search, config, best))
        if not is_kept(config):
            seconds = search.trial_folder(best.number).trial().get("seconds", 0)
            logger.info(
                "training the winner again (trial %d, which took %s): %s",
                best.number, duration(seconds), folder.path,
            )  # fmt: skip
            folders = [search.trial_folder(best.number), *search.trial_folders()]
            finetune_classifier(start_or_resume(with_setting_of(config, folders)), search.source)
        summary = summarise_search(search)
        write_json(study.search_path, summary)
        write_text(study.search_page_path, render_page(summary))
    return summary


def clear(folder: RunFolder) -> None:
    """Remove the content of a folder that this process has locked."""
    for path in folder.path.iterdir():
        if path.name != LOCK_FILE:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def recipe_of(search: Search, config: RunConfig, best: Any) -> str:
    """Return the options of the winner as a file for `hf-cifar finetune --config`."""
    return (
        f"# The best trial of hf-cifar search, trial {best.number}: {words(search.metric)} on validation "
        f"{best.value:.4f}.\n{config.to_yaml()}"
    )


def summarise_search(search: Search) -> dict[str, Any]:
    """Return the trials, the winner with its metrics, and the importance of the options, as plain values.

    A trial's `value` is its metric on validation; for a pruned trial, the last one before it was stopped.
    """
    trials = []
    for trial in search.study.get_trials(deepcopy=False):
        facts = search.trial_folder(trial.number).trial()
        if "lost" in trial.user_attrs or not facts:
            continue
        trials.append(
            {
                name: facts[name]
                for name in (
                    "number",
                    "state",
                    "value",
                    "parameters",
                    "evaluations",
                    "seconds",
                    "reason",
                )
                if name in facts
            }
        )
    best = RunFolder(search.folder.winner_path)
    return {
        "run": public_name(str(search.folder.path.resolve())),
        "study": search.folder.study()["name"],
        **{name: value for name, value in search.shared().items() if name != "options"},
        "model": public_name(search.config.model.model_name_or_path),
        "data": public_name(str(search.config.data.dataset_name)),
        "larger_is_better": search.larger_is_better,
        "time_limit": search.options.time_limit,
        "trials": trials,
        "best": {**best.trial(), "metrics": best.metrics()},
        "importances": importances(search.study),
    }

"""`hf-cifar search`."""

from __future__ import annotations

from collections.abc import Sequence

from hf_cifar.commands.command import Command, open_source
from hf_cifar.config.command_line import parse, wants_help
from hf_cifar.config.run import CONFIGS as RUN_CONFIGS
from hf_cifar.config.run import RunConfig, split_options
from hf_cifar.config.studies import SearchConfig
from hf_cifar.extras import require
from hf_cifar.logs import quieten
from hf_cifar.models.names import check_models
from hf_cifar.runs.folder import RunFolder

CONFIGS = (SearchConfig, *RUN_CONFIGS)
USAGE = (
    "hf-cifar search [--n_trials N] [--time_limit TIME] [--recipe NAME] [--config FILE] [options of hf-cifar "
    "finetune]"
)
DESCRIPTION = (
    "Train a run for each trial, in OUTPUT_DIR/trial-NUMBER, and then the best one on validation again, in "
    "OUTPUT_DIR/best. The same command continues after an interruption; several processes started with it at "
    "the same time, on any machines that share OUTPUT_DIR, share the trials."
)


def search(argv: Sequence[str]) -> int:
    """Search. Mistakes in options, space and images are found before torch is imported."""
    if wants_help(argv):
        parse(CONFIGS, ["--help"], "hf-cifar search", usage=USAGE, description=DESCRIPTION)
    options, argv = split_options([SearchConfig], argv, "hf-cifar search")
    config = RunConfig.parse(argv, "hf-cifar search")
    require("optuna", extra="search")
    check_models(config)
    from hf_cifar.studies.search_plan import prepare_search

    prepare_search(config, options)
    source = open_source(config.data, ["train", "validation"])

    from hf_cifar.report.search import render_summary
    from hf_cifar.studies.search import run_search

    quieten(True)
    print(render_summary(run_search(config, options, source), RunFolder(config.train.output_dir)))
    return 0


COMMAND = Command("search for the best options of a run, in one process or many", search)

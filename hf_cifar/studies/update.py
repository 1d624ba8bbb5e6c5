"""Continue a finished run with new rows and classes: old rows are replayed, and what it forgets is measured.

Source: Chaudhry et al., On Tiny Episodic Memories in Continual Learning, 2019.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_cifar.config.run import RunConfig
from hf_cifar.config.studies import UpdateConfig
from hf_cifar.data.split import Split
from hf_cifar.data.splits import DataSource
from hf_cifar.data.stored import StoredRows
from hf_cifar.errors import UserError
from hf_cifar.report.update import render_page
from hf_cifar.runs.folder import RunFolder, write_json, write_text
from hf_cifar.runs.processes import is_main_process, start_processes
from hf_cifar.studies.forgetting import summarise_update
from hf_cifar.studies.replay import (
    classes_of,
    count_copies,
    counts_of,
    describe_rows,
    store_rows,
)
from hf_cifar.studies.series import check_same
from hf_cifar.studies.update_options import config_anew
from hf_cifar.text import listed

logger = logging.getLogger(__name__)


def update_run(run: str | Path, config: RunConfig, own: UpdateConfig) -> dict[str, Any]:
    """Continue a run with new data, in a folder of its own; the same call continues after an interruption.

    config: as `config_of_update` returns it. Returns the content of update.json, see
    `summarise_update`; {} in a process that is not the first.

    Raises: UserError before training for data that cannot be read, or a folder that holds another run.
    """
    from hf_cifar.studies.execution import alone_in, run_series  # imports torch

    files, configs = RunFolder(run), [config]
    if own.compare_anew:
        configs.append(config_anew(files, config))
    check_same(configs)
    processes = start_processes(config)
    if is_main_process():
        for each in configs:
            store_rows(files, each, own, anew=each is not config)
    processes.wait_for_all()
    sources = open_sources(configs)
    if is_main_process():
        announce(files, sources[0], own)
    for each, source in zip(configs, sources, strict=True):
        run_series([each], source)
    summary: dict[str, Any] = {}
    if is_main_process():
        summary = summarise_update(files, config, own)
        folder = RunFolder(config.train.output_dir)
        with alone_in(folder.path):
            write_json(folder.update_path, summary)
            write_text(folder.update_page_path, render_page(summary))
    return summary


def open_sources(configs: Sequence[RunConfig]) -> list[DataSource]:
    """Open the data of each run. If they cannot be used, nothing is left of a run that has not begun."""
    try:
        sources = [DataSource(config.data) for config in configs]
        for source in sources:
            _ = source.splits
        return sources
    except UserError:
        for folder in (RunFolder(config.train.output_dir) for config in reversed(configs)):
            if is_main_process() and not folder.has_run:
                folder.stored_path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # it has other files
                    folder.path.rmdir()
        raise


def announce(run: RunFolder, source: DataSource, own: UpdateConfig) -> None:
    """State which classes are new, and how many training rows each class has, new and stored."""
    names, known = list(source.splits.id2label.values()), set(classes_of(run))
    train = source.splits.train
    assert isinstance(train, Split)  # stored rows are not combined with a stream
    counts = counts_of(train)
    is_new = np.array([name not in known for name in names])
    new = [name for name in names if name not in known]
    logger.info(
        "%s new class%s%s; training rows of the others: %s",
        f"{len(new):,}" if new else "no", "" if len(new) == 1 else "es",
        f": {describe_rows(new, counts[is_new])}" if new else "",
        describe_rows([name for name in names if name in known], counts[~is_new]),
    )  # fmt: skip
    if not own.replay:
        logger.warning(
            "--replay 0: no old row is trained on, and the model forgets what the new data do not show"
        )
    stored = StoredRows.load(str(source.config.stored_rows))
    if copies := count_copies(train, stored):
        logger.warning(
            "%s new training images are also validation or test images of the run, whose accuracy is then "
            "too high; remove them from %s", f"{copies:,}", source.config.dataset_name,
        )  # fmt: skip
    absent = [name for name, count in zip(names, counts, strict=True) if not count]
    if absent and own.replay:
        logger.warning("no training rows of %s", listed(absent))

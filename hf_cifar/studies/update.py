"""Continue a finished run with new rows and classes: replay old rows, and measure what is forgotten.

Source: Chaudhry et al., On Tiny Episodic Memories in Continual Learning, 2019.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_cifar.audit.class_names import misspelt_names, similar_names
from hf_cifar.config.run import RunConfig
from hf_cifar.config.studies import UpdateConfig
from hf_cifar.data.folders import Source
from hf_cifar.data.listing import refuse_data_folder
from hf_cifar.data.split import Split
from hf_cifar.data.splits import DataSource
from hf_cifar.errors import UserError
from hf_cifar.runs.folder import RunFolder, require_writable, write_json, write_text
from hf_cifar.runs.lock import claimed_run
from hf_cifar.runs.processes import is_main_process, start_processes
from hf_cifar.studies.replay import (
    EarlierRows,
    classes_of,
    counts_of,
    describe_rows,
    store_rows,
)
from hf_cifar.studies.series import check_same
from hf_cifar.studies.update_options import ANEW, config_anew
from hf_cifar.text import enumerated, listed

logger = logging.getLogger(__name__)


def update_run(run: str | Path, config: RunConfig, own: UpdateConfig) -> dict[str, Any]:
    """Continue a run with new data, in a folder of its own; the same call continues after an interruption.

    config: as `config_of_update` returns it. Returns the content of update.json, see
    `forgetting.summarise_update`; {} in a process that is not the first.

    Raises: UserError before training for data that cannot be read, or a folder that holds another run.
    """
    files, configs = RunFolder(run), [config]
    if own.compare_anew:
        configs.append(config_anew(files, config))
    check_same(configs)
    earlier = EarlierRows(files, config, own)
    if is_main_process():
        for each in configs:
            check_output(each, [config.data.dataset_name, files.data().dataset_name, own.old_data])
    with nothing_left(configs):
        if is_main_process():
            for each in configs:
                store_rows(earlier, each, anew=each is not config)
            sources = open_sources(configs, earlier.new)
            announce(earlier, sources[0])
        from hf_cifar.studies.execution import alone_in, run_series  # imports torch

        start_processes(config).wait_for_all()
        if not is_main_process():
            sources = open_sources(configs)
        for each, source in zip(configs, sources, strict=True):
            run_series([each], source)
    summary: dict[str, Any] = {}
    if is_main_process():
        from hf_cifar.report.update import render_page
        from hf_cifar.studies.forgetting import summarise_update

        folder = RunFolder(config.train.output_dir)
        if RunFolder(folder.path / ANEW).facts():  # a finished comparison stays
            own = dataclasses.replace(own, compare_anew=True)
        summary = summarise_update(files, config, own)
        with alone_in(folder.path):
            write_json(folder.update_path, summary)
            write_text(folder.update_page_path, render_page(summary))
    return summary


def check_output(config: RunConfig, data: Sequence[str | None]) -> None:
    """Raises: UserError for an output folder that holds other runs, or is the data."""
    folder = RunFolder(config.train.output_dir)
    if folder.has_run:
        return  # see `check_same`
    folder.refuse_occupied()
    require_writable(folder.path, "--output_dir")
    for name in data:
        refuse_data_folder(folder.path, name)


def open_sources(configs: Sequence[RunConfig], new: Source | None = None) -> list[DataSource]:
    """Open the data of each run, and divide them. new: the new data, if they are open already."""
    sources = [DataSource(config.data, new) for config in configs]
    for source in sources:
        _ = source.splits
    return sources


@contextlib.contextmanager
def nothing_left(configs: Sequence[RunConfig]) -> Iterator[None]:
    """If the block finds a mistake, remove the stored rows of each run that has not begun."""
    try:
        yield
    except UserError:
        folders = [RunFolder(config.train.output_dir) for config in reversed(configs)]
        for folder in folders if is_main_process() else []:
            if folder.stored_path.exists():
                with claimed_run(folder.path) as is_free:
                    if is_free and not folder.has_run:
                        folder.stored_path.unlink(missing_ok=True)
            if not folder.has_run:
                with contextlib.suppress(OSError):  # it has other files
                    folder.path.rmdir()
        raise


def announce(earlier: EarlierRows, source: DataSource) -> None:
    """Log which images the run already has, which classes are new, and how many training rows each has."""
    stored = source.stored
    assert stored is not None
    if copies := {split: len(rows) for split, rows in stored.note["copies"].items() if rows}:
        logger.warning(
            "left out of %s: %s images that %s already has (%s)", source.config.dataset_name,
            f"{sum(copies.values()):,}", earlier.run.path,
            listed([f"{split} {count:,}" for split, count in copies.items()]),
        )  # fmt: skip
    names, known = list(source.splits.id2label.values()), set(classes_of(earlier.run))
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
    absent = [name for name, count in zip(names, counts, strict=True) if not count]
    if missing := [name for name in absent if name not in known]:
        raise UserError(
            f"{earlier.run.path} already has all training images of the new class {enumerated(missing)}, "
            "with other labels; pass new images, or train anew"
        )
    # Of a stream, nothing is counted.
    sizes = earlier.run.facts().get("label_counts", {}).get("train", {})
    sizes = sizes | dict(zip(new, counts[is_new].tolist(), strict=True))
    for same in [*similar_names(list(sizes)), *misspelt_names(sizes)]:
        if not known.issuperset(same):
            logger.warning(
                "%s may be one class; if so, rename the folder or label", enumerated(same)
            )
    replay = earlier.own.replay
    if not replay:
        logger.warning(
            "--replay 0: no old rows are trained on, so the model forgets what is not in the new data"
        )
    if absent and replay:
        logger.warning("no training rows of %s", listed(absent))

"""One recipe with different seeds: complete runs, and the mean and spread of their metrics."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import release_memory

from hf_cifar.config.metrics import shown
from hf_cifar.config.run import RunConfig
from hf_cifar.data.splits import DataSource
from hf_cifar.errors import UserError
from hf_cifar.evaluation.intervals import mean_interval
from hf_cifar.evaluation.tables import render_number
from hf_cifar.finetune import finetune_classifier
from hf_cifar.plan import requested_setting
from hf_cifar.runs.folder import RunFolder, write_json
from hf_cifar.runs.processes import is_main_process, start_processes
from hf_cifar.runs.resume import check_same_run
from hf_cifar.text import render_table

logger = logging.getLogger(__name__)

SEEDS_FILE = "seeds.json"
# A resumed run may change these; a finished run that is kept must not.
LENGTHS = ("num_train_epochs", "max_steps")


def finetune_seeds(config: RunConfig, source: DataSource | None = None) -> dict[str, Any]:
    """Run `config.train.seeds` complete runs with seeds seed, seed + 1, ..., in output_dir/seed-SEED.

    The data's split stays the same, and all runs share its pixels: the spread is that of training. source:
    the data of `config.data`, if already open. All runs use the setting that `--precision auto` picks for the
    first. With resume_from_checkpoint "last", finished runs are kept, and the others resume or start.
    Returns the content of seeds.json, see `summarise_seeds`.

    Raises: UserError before the first run for options or folders that hold other runs.
    """
    configs = [config_of(config, seed) for seed in seeds_of(config)]
    check_series(config)
    source = source or DataSource(config.data)
    kept = [is_kept(each) for each in configs]
    for each, keep in zip(configs, kept, strict=True):
        check_same(each, keep)
    start_processes(config).wait_for_all()  # none may write before all have checked the folders
    for number, (each, keep) in enumerate(zip(configs, kept, strict=True), 1):
        folder, place = each.train.output_dir, f"run {number} of {len(configs)}"
        if keep:
            logger.info("%s, seed %d: already finished, in %s", place, each.train.seed, folder)
            continue
        logger.info("%s, seed %d: %s", place, each.train.seed, folder)
        each = start_or_resume(each)
        if number > 1:
            each = with_setting_of(configs[0], each)
        finetune_classifier(each, source)
        release_memory()  # a Trainer and its model refer to each other
    summary = summarise_seeds(configs)
    if is_main_process():
        write_json(Path(config.train.output_dir) / SEEDS_FILE, summary)
    return summary


def check_series(config: RunConfig) -> None:
    """Raises: UserError for options of a single run, or a folder that holds one."""
    train = config.train
    if train.push_to_hub:
        raise UserError(
            "--push_to_hub pushes one model; leave it out, or leave out --seeds to push a single run"
        )
    if train.resumes and not train.resumes_last:
        raise UserError(
            "--seeds resumes with --resume_from_checkpoint last, not from the one checkpoint "
            f"{train.resume_from_checkpoint}"
        )
    if not train.resumes and is_main_process():
        RunFolder(train.output_dir).refuse_occupied()
    if RunFolder(train.output_dir).has_run:
        raise UserError(f"{train.output_dir} holds a single run; pass another --output_dir")


def seeds_of(config: RunConfig) -> range:
    """Return the seeds of a series."""
    return range(config.train.seed, config.train.seed + config.train.seeds)


def config_of(config: RunConfig, seed: int) -> RunConfig:
    """Return the options of one run of a series: those of a single run with its seed."""
    train = config.train
    changed: dict[str, Any] = {
        "seeds": 1,
        "seed": seed,
        "output_dir": str(Path(train.output_dir) / f"seed-{seed}"),
    }
    if train.run_name is not None:
        changed["run_name"] = f"{train.run_name}/seed-{seed}"
    return config.with_training(**changed)


def is_kept(config: RunConfig) -> bool:
    """Return True if a resumed series has this run already, with every requested metric."""
    folder = RunFolder(config.train.output_dir)
    if not config.train.resumes or not folder.facts():
        return False
    wanted = {"validation", "test"} if config.train.do_predict else {"validation"}
    return wanted <= folder.metrics().keys()


def check_same(config: RunConfig, keep: bool) -> None:
    """Raises: UserError if the folder holds a different run, or a finished one of another length."""
    folder = Path(config.train.output_dir)
    check_same_run(folder, config)
    if not keep:
        return
    before = RunFolder(folder).load_config().train
    for name in LENGTHS:
        then, now = getattr(before, name), getattr(config.train, name)
        if now not in (None, then):
            raise UserError(
                f"--{name} is {now:g}, but the finished run in {folder} had {then:g}; start a series of "
                "that length in another --output_dir"
            )


def start_or_resume(config: RunConfig) -> RunConfig:
    """Resume from a checkpoint if there is one; else start, also after a run without a checkpoint."""
    folder = RunFolder(config.train.output_dir)
    if not config.train.resumes or folder.checkpoints():
        return config
    if is_main_process():
        folder.config_path.unlink(missing_ok=True)
    return config.with_training(resume_from_checkpoint=None)


def with_setting_of(first: RunConfig, config: RunConfig) -> RunConfig:
    """Return the options of a run with the setting that the first run of the series found the fastest."""
    before = RunFolder(first.train.output_dir).load_config()
    return config.with_training(**requested_setting(config.train, before))


def summarise_seeds(configs: list[RunConfig]) -> dict[str, Any]:
    """Return mean, spread and interval of the headline metrics of finished runs, as plain values.

    `metrics` holds, by split and metric, `values` in the order of `seeds`, their `mean`, their standard
    deviation `std` (of a sample: n - 1), the 95% `interval` of the mean by Student's t, and `num_runs`.
    """
    metrics = [RunFolder(config.train.output_dir).metrics() for config in configs]
    splits = ["validation", "test"] if configs[0].train.do_predict else ["validation"]
    return {
        "seeds": [config.train.seed for config in configs],
        "runs": [Path(config.train.output_dir).name for config in configs],
        "num_images": {split: metrics[0][split]["num_images"] for split in splits},
        "metrics": {
            split: {
                name: _summary([each[split][name] for each in metrics])
                for name in shown("headline", metrics[0][split])
                if all(each[split].get(name) is not None for each in metrics)
            }
            for split in splits
        },
    }


def _summary(values: list[float]) -> dict[str, Any]:
    return {
        "num_runs": len(values),
        "mean": float(np.mean(values)),
        "std": float(np.std(values, ddof=1)),
        "interval": mean_interval(values).tolist(),
        "values": values,
    }


def render_seeds(summary: dict[str, Any]) -> str:
    """Render a text table for each split: mean, spread and interval of every headline metric."""
    tables = []
    for split, metrics in summary["metrics"].items():
        rows = [
            [
                name,
                render_number(found["mean"]),
                render_number(found["std"]),
                "[{:.4f}, {:.4f}]".format(*found["interval"]),
                str(found["num_runs"]),
            ]
            for name, found in metrics.items()
        ]
        title = f"{split}, {summary['num_images'][split]:,} images"
        header = [title, "mean", "standard deviation", "95% interval of the mean", "runs"]
        tables.append(render_table(header, rows))
    return "\n\n".join([*tables, f"seeds: {', '.join(map(str, summary['seeds']))}"])

"""One recipe with different seeds: complete runs, and the mean and spread of their metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_cifar.config.run import RunConfig
from hf_cifar.data.splits import DataSource
from hf_cifar.evaluation.intervals import mean_interval
from hf_cifar.evaluation.tables import render_number
from hf_cifar.runs.folder import RunFolder, write_json
from hf_cifar.runs.processes import is_main_process, start_processes
from hf_cifar.studies.series import (
    check_same,
    check_series,
    metrics_of,
    run_of,
    splits_of,
    spread,
)
from hf_cifar.text import render_table

SEEDS_FILE = "seeds.json"


def finetune_seeds(config: RunConfig, source: DataSource | None = None) -> dict[str, Any]:
    """Run `config.train.seeds` complete runs with seeds seed, seed + 1, ..., in output_dir/seed-SEED.

    The data's split stays the same, and all runs share its pixels: the spread is that of training. source:
    the data of `config.data`, if already open. With resume_from_checkpoint "last", finished runs are kept,
    and the others resume or start; see `run_series`. Returns the content of seeds.json, see
    `summarise_seeds`.

    Raises: UserError before the first run for options or folders that hold other runs.
    """
    from hf_cifar.studies.execution import run_series  # imports torch

    configs = runs_of_seeds(config)
    check_same(configs)
    start_processes(config).wait_for_all()  # none may write before all have checked the folders
    run_series(configs, source or DataSource(config.data))
    summary = summarise_seeds(configs)
    if is_main_process():
        write_json(Path(config.train.output_dir) / SEEDS_FILE, summary)
    return summary


def runs_of_seeds(config: RunConfig) -> list[RunConfig]:
    """Return the options of each run: those of a single run with its seed.

    Raises: UserError for options of a single run, or a folder that holds other runs.
    """
    first = config.train.seed
    configs = [
        run_of(config, f"seed-{seed}", seed=seed, seeds=1)
        for seed in range(first, first + config.train.seeds)
    ]
    check_series(config, "--seeds")
    if not config.train.resumes and is_main_process():
        RunFolder(config.train.output_dir).refuse_occupied()
    return configs


def summarise_seeds(configs: list[RunConfig]) -> dict[str, Any]:
    """Return mean, spread and interval of the headline metrics of finished runs, as plain values.

    `metrics` holds, by split and metric, `values` in the order of `seeds`, their `mean`, their standard
    deviation `std` (of a sample: n - 1), the 95% `interval` of the mean by Student's t, and `num_runs`.
    """
    metrics = RunFolder(configs[0].train.output_dir).metrics()
    return {
        "seeds": [config.train.seed for config in configs],
        "runs": [Path(config.train.output_dir).name for config in configs],
        "num_images": {split: metrics[split]["num_images"] for split in splits_of(configs[0])},
        "metrics": {
            split: {
                name: spread(values) | {"interval": mean_interval(values).tolist()}
                for name, values in found.items()
            }
            for split, found in metrics_of(configs).items()
        },
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

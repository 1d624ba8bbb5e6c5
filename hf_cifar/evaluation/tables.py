"""Figures as people read them: a cell, a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_cifar.text import render_table


def render_figure(value: float | int | None) -> str:
    """One figure as people read it: four decimals, thousands separated, a dash for an undefined one."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def render_cell(figures: dict[str, Any], key: str) -> str:
    """One figure and, where it has one, its 95% interval."""
    interval = figures.get("intervals", {}).get(key)
    value = render_figure(figures.get(key))
    return f"{value} [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else value


def render_figures(metrics: dict[str, dict[str, Any]], keys: Sequence[str]) -> str:
    """The named figures with their intervals as a table of text: a row each, a column for each split."""
    rows = [[key, *(render_cell(figures, key) for figures in metrics.values())] for key in keys]
    return render_table(["", *metrics], rows)


def render_metrics(metrics: dict[str, dict[str, Any]]) -> str:
    """All figures of one or more splits as a table of text, and the per-class figures of the last."""
    names = list(metrics)
    single = [k for k, v in metrics[names[0]].items() if not isinstance(v, (dict, list))]
    per_class = metrics[names[-1]]["per_class"]
    columns = list(next(iter(per_class.values())))
    rows = [
        [name, *(render_figure(values[column]) for column in columns)]
        for name, values in per_class.items()
    ]
    return "\n\n".join(
        [
            render_figures(metrics, single) + "\n[low, high]: 95% interval",
            render_table([f"{names[-1]}, per class", *columns], rows),
        ]
    )

"""Format metrics for people, as cells and tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_cifar.text import render_table


def render_number(value: float | int | None) -> str:
    """Format a number with four decimals, or an integer with thousands separators; a dash for None."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def render_cell(metrics: dict[str, Any], name: str) -> str:
    """Format a metric with its 95% interval, if it has one; that of a class without images as -."""
    if metrics.get("num_images") == 0 and name != "num_images":
        return "-"
    interval = metrics.get("intervals", {}).get(name)
    value = render_number(metrics.get(name))
    return f"{value} [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else value


def render_chosen(metrics: dict[str, dict[str, Any]], names: Sequence[str]) -> str:
    """Format the named metrics with their intervals as a text table: one row each, one column per split."""
    rows = [[name, *(render_cell(own, name) for own in metrics.values())] for name in names]
    return render_table(["", *metrics], rows)


def render_metrics(metrics: dict[str, dict[str, Any]]) -> str:
    """Format all metrics of one or more splits as a text table, and the per-class metrics of the last."""
    splits = list(metrics)
    single = [k for k, v in metrics[splits[0]].items() if not isinstance(v, (dict, list))]
    per_class = metrics[splits[-1]]["per_class"]
    columns = list(next(iter(per_class.values())))
    rows = [
        [name, *(render_number(values[column]) for column in columns)]
        for name, values in per_class.items()
    ]
    return "\n\n".join(
        [
            render_chosen(metrics, single) + "\n[low, high]: 95% interval",
            render_table([f"{splits[-1]}, per class", *columns], rows),
        ]
    )

"""search.html: the trials of a search, their results, and which options matter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from hf_cifar.config.metrics import shown, words
from hf_cifar.config.space import render_choice
from hf_cifar.evaluation.tables import render_chosen, render_number
from hf_cifar.report import charts
from hf_cifar.report.page import render_template
from hf_cifar.runs.folder import RunFolder
from hf_cifar.text import duration, render_table

NO_IMPORTANCE = "too few complete trials with different results"
STATES = ("complete", "pruned", "failed", "stopped", "running")


def render_page(facts: dict[str, Any]) -> str:
    """Render the page; every metric names its place in search.json."""
    complete = [each for each in facts["trials"] if each["state"] == "complete"]
    metrics = facts["best"]["metrics"]
    return render_template(
        "search.html",
        facts,
        plots=plots_of(facts, complete),
        counts=counts_of(facts["trials"]),
        headline=[
            name for name in shown("headline", metrics["validation"]) if name != facts["metric"]
        ],
        render_choice=render_choice,
        duration=duration,
        no_importance=NO_IMPORTANCE,
    )


def plots_of(facts: dict[str, Any], complete: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Draw the history, importances, slices and parallel coordinates of the complete trials."""
    best = [each["number"] for each in complete].index(facts["best"]["number"])
    metric = words(facts["metric"])
    bars = {name: (share, None) for name, share in (facts["importances"] or {}).items()}
    return {
        "history": Markup(history_plot(facts, complete, best, metric)),
        "importance": Markup(charts.interval_bars("Importance", bars, "share", 150))
        if bars
        else None,
        "slices": [
            Markup(slice_plot(name, facts, complete, best, metric)) for name in facts["space"]
        ],
        "parallel": Markup(parallel_plot(facts, complete, best, metric)),
    }


def history_plot(
    facts: dict[str, Any], complete: Sequence[dict[str, Any]], best: int, metric: str
) -> str:
    """Draw the metric of each complete trial, and the best one so far."""
    better = max if facts["larger_is_better"] else min
    line: list[tuple[float, float]] = []
    for each in complete:
        so_far = better(each["value"], line[-1][1]) if line else each["value"]
        if line:
            line.append((each["number"], line[-1][1]))
        line.append((each["number"], so_far))
    points = [(each["number"], each["value"], text_of(each)) for each in complete]
    return charts.scatter("History", points, best, "trial", metric, line=line)


def slice_plot(
    name: str, facts: dict[str, Any], complete: Sequence[dict[str, Any]], best: int, metric: str
) -> str:
    """Draw the metric against one parameter."""
    space, found = facts["space"][name], [each["parameters"][name] for each in complete]
    choices = space if isinstance(space, list) else []
    xs = [choices.index(value) for value in found] if choices else found
    points = [(x, each["value"], text_of(each)) for x, each in zip(xs, complete, strict=True)]
    log = isinstance(space, dict) and space.get("log", False) and len(set(xs)) > 1
    words = [render_choice(value) for value in choices]
    return charts.scatter(name, points, best, name, metric, log_x=log, words=words)


def parallel_plot(
    facts: dict[str, Any], complete: Sequence[dict[str, Any]], best: int, metric: str
) -> str:
    """Draw a line for each complete trial through its parameters, to its metric on the right."""
    values = [each["value"] for each in complete]
    low, high = min(values), max(values)
    worst, top = (low, high) if facts["larger_is_better"] else (high, low)
    axes = {name: (name, marks_of(space)) for name, space in facts["space"].items()}
    ends = [(0.0, f"{worst:.3f}"), (1.0, f"{top:.3f}")]
    axes["value"] = (metric, ends if low < high else ends[1:])
    lines = [
        (
            [
                *(
                    place_of(each["parameters"][name], facts["space"][name])
                    for name in facts["space"]
                ),
                (each["value"] - worst) / (top - worst) if low < high else 1.0,
            ],
            text_of(each),
        )
        for each in complete
    ]
    return charts.parallel_coordinates("Parallel coordinates", axes, lines, best)


def place_of(value: Any, space: Any) -> float:
    """Return the position of a value in its range or list, 0..1."""
    if isinstance(space, list):
        return space.index(value) / (len(space) - 1)
    scale = math.log if space.get("log") else float
    low, high = scale(space["low"]), scale(space["high"])
    return (scale(value) - low) / (high - low)


def marks_of(space: Any) -> list[tuple[float, str]]:
    """Return the ticks of an axis of the parallel coordinates."""
    values = space if isinstance(space, list) else [space["low"], space["high"]]
    return [(place_of(value, space), render_choice(value)) for value in values]


def text_of(trial: Mapping[str, Any]) -> str:
    """Describe a trial in one line."""
    parameters = ", ".join(f"{k} {render_choice(v)}" for k, v in trial["parameters"].items())
    return f"trial {trial['number']}: {render_number(trial['value'])}; {parameters}"


def counts_of(trials: Sequence[Mapping[str, Any]]) -> str:
    """Count the trials by how they ended: `20 complete, 4 pruned`."""
    counts = {state: sum(each["state"] == state for each in trials) for state in STATES}
    return ", ".join(f"{count} {state}" for state, count in counts.items() if count)


def render_summary(facts: dict[str, Any], study: RunFolder) -> str:
    """Render the trials, best first, and the winner with its metrics for a terminal."""
    trials, names = facts["trials"], list(facts["space"])
    sign = -1 if facts["larger_is_better"] else 1

    def rank(trial: Mapping[str, Any]) -> tuple[int, float]:
        return STATES.index(trial["state"]), sign * trial.get("value", 0.0)

    rows = [
        [
            str(each["number"]),
            each["state"],
            render_number(each.get("value")),
            *(render_choice(each["parameters"][name]) for name in names),
            duration(each.get("seconds", 0)),
        ]
        for each in sorted(trials, key=rank)
    ]
    header = ["trial", "state", f"validation {facts['metric']}", *names, "time"]
    best, metrics = facts["best"], facts["best"]["metrics"]
    num_complete = sum(each["state"] == "complete" for each in trials)
    headline = list(dict.fromkeys([facts["metric"], *shown("headline", metrics["validation"])]))
    lines = [render_table(header, rows, left=2), "", counts_of(trials)]
    lines += [
        f"trial {each['number']} is not complete; the same command continues it"
        for each in trials
        if each["state"] in ("stopped", "running")
    ]
    if facts["importances"]:
        shares = ", ".join(f"{name} {share:.2f}" for name, share in facts["importances"].items())
        lines.append(f"importance: {shares}")
    else:
        lines.append(f"importance: unknown; {NO_IMPORTANCE}")
    return "\n".join(
        [
            *lines,
            "",
            f"the winner, trial {best['number']}, trained again:",
            render_chosen(metrics, [name for name in headline if name in metrics["validation"]]),
            f"the best of {num_complete} complete trials on validation, so its metrics there are optimistic",
            "",
            f"recipe: {study.recipe_path}",
            f"model: {study.winner_path}",
            f"page: {study.search_page_path}",
        ]
    )

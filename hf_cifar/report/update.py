"""update.json as a text table and as update.html: what an update of a run learnt and forgot."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from hf_cifar.report import charts
from hf_cifar.report.page import render_template
from hf_cifar.text import duration, listed, render_table

PARTS = {"old": "old rows", "new": "new rows", "all": "all rows"}
STATES = {"before": "before", "after": "updated", "anew": "trained anew"}
SHOWN_CLASSES = 30  # in the plot: those whose recall changes most


def states_of(facts: dict[str, Any]) -> list[str]:
    """Return which of before, after and anew the facts have."""
    parts = [part for split in facts["splits"].values() for part in split["parts"].values()]
    return [state for state in STATES if any(state in part for part in parts)]


def verdict(facts: dict[str, Any]) -> str:
    """Say in words what was forgotten, on test (or on validation if there are no earlier predictions of
    test), and whether training anew is better."""
    splits = facts["splits"]
    last = list(splits)[-1]
    split = next((each for each in reversed(splits) if forgetting_of(splits[each])), last)
    found = forgetting_of(splits[split])
    if found is None:
        said = f"Forgetting is unknown: there are no earlier predictions of {split}."
    elif sign := sign_of(found):
        verb = "forgets" if sign > 0 else "gains"
        said = f"The update {verb} {in_points(found)} on the old {split} rows."
    else:
        said = f"No clear loss or gain on the old {split} rows: forgetting is {in_points(found)}."
    gain = splits[last]["parts"].get("all", {}).get("gain_anew")
    if gain is None:
        return said
    if sign := sign_of(gain):
        better = "better" if sign > 0 else "worse"
        return f"{said} Training anew is {better} by {in_points(gain)} on all {last} rows."
    unclear = f"Training anew is neither clearly better nor worse on all {last} rows"
    return f"{said} {unclear}: {in_points(gain)}."


def sign_of(found: dict[str, Any]) -> int:
    """Return the sign of a difference, 0 if its interval contains 0."""
    low, high = found["interval"]
    return int(low > 0) - int(high < 0)


def in_points(found: dict[str, Any]) -> str:
    """Format a difference in points with its interval; if its sign is clear, as if it were positive."""
    sign = sign_of(found) or 1
    value, *ends = (100 * sign * each for each in (found["value"], *found["interval"]))
    low, high = sorted(ends)
    shown = f"{value:.1f}" if sign_of(found) else f"{value:+.1f}"
    return f"{shown} points of accuracy (95% interval {low:+.1f} to {high:+.1f})"


def forgetting_of(split: dict[str, Any]) -> dict[str, Any] | None:
    """Return what was forgotten of the old rows of a split."""
    return split["parts"].get("old", {}).get("forgetting")


def render_update(facts: dict[str, Any], folder: str, page: str) -> str:
    """Render a text table for each split, what was forgotten, and what training anew would have cost."""
    states, tables = states_of(facts), []
    for split, found in facts["splits"].items():
        rows = [
            [
                f"{PARTS[name]}, {part['num_images']:,} images",
                *(_cell(part.get(state)) for state in states),
                _signed(part.get("forgetting")),
                *([_signed(part.get("gain_anew"))] if "anew" in states else []),
            ]
            for name, part in found["parts"].items()
        ]
        header = [f"accuracy on {split}", *(STATES[state] for state in states), "forgetting"]
        tables.append(render_table([*header, *["anew - updated"] * ("anew" in states)], rows))
    lines = ["[low, high]: 95% interval, of differences paired", verdict(facts), render_cost(facts)]
    lines += [f"model: {folder}", f"page: {page}"]
    return "\n\n".join([*tables, "\n".join(lines)])


def render_cost(facts: dict[str, Any]) -> str:
    """Say how long training took, and on how many rows."""
    texts = [
        f"{name} {duration(facts['seconds'][state])} on {facts['num_train'][state]:,} rows"
        for state, name in (("update", "update"), ("anew", "anew"))
        if state in facts["seconds"]
    ]
    return f"Training time: {'; '.join(texts)}."


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    return "{:.4f} [{:.4f}, {:.4f}]".format(found["value"], *found["interval"])


def _signed(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    return "{:+.4f} [{:+.4f}, {:+.4f}]".format(found["value"], *found["interval"])


def render_page(facts: dict[str, Any]) -> str:
    """Render the page; every number names its place in update.json."""
    return render_template(
        "update.html",
        facts,
        parts=PARTS,
        states={state: STATES[state] for state in states_of(facts)},
        plots={split: recall_plot(split, found) for split, found in facts["splits"].items()},
        new_classes=listed(each["name"] for each in facts["classes"] if each["is_new"]),
        verdict=verdict(facts),
        cost=render_cost(facts),
        shown_classes=SHOWN_CLASSES,
    )


def recall_plot(split: str, found: dict[str, Any]) -> Markup:
    """Draw the recall of each class before and after; if there are many classes, those that change most."""

    def change(each: dict[str, Any]) -> float:
        before = each["before"] or {"value": 0.0}
        return abs(each["after"]["value"] - before["value"])

    chosen = sorted(found["recalls"], key=change, reverse=True)[:SHOWN_CLASSES]
    rows = {
        each["name"]: [
            (each[state]["value"], each[state]["interval"])
            for state in ("after", "before")
            if each[state]
        ]
        for each in found["recalls"]
        if each in chosen
    }
    title = f"Recall by class on {split}"
    return Markup(
        charts.interval_dots(title, ["updated", "before"], rows, "recall, with 95% interval")
    )

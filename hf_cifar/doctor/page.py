"""Render an examination: lines for a terminal, and a self-contained page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from hf_cifar.audit.findings import LEVELS, Finding, count_of
from hf_cifar.audit.survey import Survey
from hf_cifar.doctor.cost import render_cost
from hf_cifar.doctor.examine import Examination, describe
from hf_cifar.errors import UserError
from hf_cifar.report import charts
from hf_cifar.report.page import picture, render_template
from hf_cifar.text import duration, listed, render_table

SHOWN_IMAGES = 24  # of a finding, on the page
SHOWN_BARS = 40
PLURALS = {"error": "errors", "warning": "warnings", "note": "notes"}


def render_text(examination: Examination) -> str:
    """Render the findings as text: each with its level and what to do."""
    facts, lines = examination.facts, []
    if "splits" in facts:
        lines += [_splits_table(facts), "", f"classes: {_classes(facts)}", ""]
    for finding in examination.findings:
        lines.append(f"{finding.level}: {finding.text}{_rows(finding, examination.surveys)}")
        if finding.action:
            lines.append(f"  -> {finding.action}")
    if facts.get("labels", {}).get("reason"):
        lines.append(f"labels: {facts['labels']['reason']}")
    if "test" in examination.surveys:
        lines.append("test: only its pixels were read, to find copies; its labels were not used")
    lines += _cost(examination)
    return "\n".join([*lines, "", verdict(examination)])


def _cost(examination: Examination) -> list[str]:
    """Render the cost of the run in lines, or say why it is not known."""
    if "cost" in examination.facts:
        return render_cost(examination.facts["cost"])
    if examination.refused:
        return ["time, memory and disk: unknown, because training would be refused"]
    return []


def verdict(examination: Examination) -> str:
    """Say whether training would start, with the number of findings of each level."""
    found = [(level, sum(f.level == level for f in examination.findings)) for level in LEVELS]
    counts = listed(count_of(number, level) for level, number in found)
    start = "would be refused" if examination.refused else "would start"
    return f"training {start}: {counts}, in {duration(examination.facts['seconds'])}"


def _rows(finding: Finding, surveys: dict[str, Survey], shown: int = 3) -> str:
    """List the first images of a finding, unless its text names them."""
    if not finding.examples or finding.name == "unreadable images":
        return ""
    words = [" = ".join(_short(place, surveys) for place in e.places) for e in finding.examples]
    return f": {listed(words, shown)}"


def _short(place: tuple[str, int], surveys: dict[str, Survey]) -> str:
    return surveys[place[0]].split.describe_row(place[1])


def _splits_table(facts: dict[str, Any]) -> str:
    rows = []
    for name, each in facts["splits"].items():
        size = each.get("height_width")
        shown = ["-"] * 3
        if size:
            shown = [f"{w} x {h}" for h, w in (size["smallest"], size["median"], size["largest"])]
        rows.append(
            [name, f"{each['num_images']:,}", str(each["unreadable"]), *shown, str(each["grey"]),
             str(each["alpha"]), str(each["more_than_8_bits"]), str(each["blank"])]
        )  # fmt: skip
    head = [
        "split",
        "images",
        "unreadable",
        "smallest",
        "median px",
        "largest",
        "grey",
        "alpha",
        "> 8 bits",
        "blank",
    ]
    return render_table(head, rows)


def _classes(facts: dict[str, Any]) -> str:
    counts = facts["classes"]["train"]
    low, high = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    ratio = f", ratio {counts[high] / counts[low]:.1f}" if counts[low] else ""
    return (
        f"{len(counts):,}, in train from {count_of(counts[low])} ({low}) to {count_of(counts[high])} ({high})"
        + ratio
    )


def render_page(examination: Examination, title: str) -> str:
    """Render the page, with the images that the findings name."""
    facts = examination.facts
    cards = [
        {
            "level": finding.level,
            "finding": finding,
            "examples": [_shown(e, examination.surveys) for e in finding.examples[:SHOWN_IMAGES]],
            "more": max(0, len(finding.examples) - SHOWN_IMAGES),
        }
        for finding in examination.findings
    ]
    return render_template(
        "doctor.html",
        facts,
        title=title,
        cards={level: [card for card in cards if card["level"] == level] for level in LEVELS},
        plurals=PLURALS,
        verdict=verdict(examination),
        bars=_bars(facts),
        cost=_cost(examination),
        classes=_classes(facts) if "splits" in facts else "",
        reads_test="test" in examination.surveys,
    )


def _shown(example: Any, surveys: dict[str, Survey]) -> dict[str, Any]:
    images = []
    for name, position in example.places:
        split, found = surveys[name].split, describe(name, position, surveys)
        try:
            found["picture"] = picture(split.pixels.decode(int(split.positions[position])))
        except UserError:
            found["picture"] = None
        found["where"] = f"{found['split']} row {found['row']}"
        found["file"] = Path(found["path"]).name if found["path"] else None
        images.append(found)
    return {"images": images, "note": example.note}


def _bars(facts: dict[str, Any]) -> Markup | None:
    """Draw the number of images of each class in train, as a share of that of the largest class."""
    counts = facts.get("classes", {}).get("train", {})
    if not counts or not max(counts.values()):
        return None
    smallest = sorted(counts, key=counts.__getitem__)[:SHOWN_BARS]
    shown = [name for name in counts if name in smallest]
    rows = {name: (counts[name] / max(counts.values()), None) for name in shown}
    title = "Images of each class in train"
    if len(counts) > SHOWN_BARS:
        title = f"The {SHOWN_BARS} classes with the fewest images in train"
    return Markup(charts.interval_bars(title, rows, "share of the largest class"))

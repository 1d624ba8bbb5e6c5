"""report.html: a report as one self-contained page."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from hf_cifar.config.evaluation import ReportConfig
from hf_cifar.config.metrics import shown, training_metrics, words
from hf_cifar.errors import UserError
from hf_cifar.evaluation.tables import render_number
from hf_cifar.report import charts
from hf_cifar.report.facts import DEFAULTS, Report, build_report
from hf_cifar.report.wording import render_race, render_skipped
from hf_cifar.runs.folder import RunFolder, write_json, write_text

MAX_SIDE = 128  # px per side of a picture in the page
# With more classes, the page has no confusion matrix, and only the lowest recalls.
MATRIX_CLASSES = 40


def write_report(folder: str | Path, config: ReportConfig = DEFAULTS, dataset: Any = None) -> Path:
    """Write report.json and report.html into the folder of a run. Returns the path of the page.

    dataset: see `build_report`. Raises: UserError like `build_report`, or if the folder is not writable.
    """
    folder, files = Path(folder), RunFolder(folder)
    report = build_report(folder, config, dataset)
    page = render_page(report)
    try:
        write_json(files.page_facts_path, report.facts)
        write_text(files.page_path, page)
    except PermissionError as error:
        raise UserError(f"cannot write the report: {error}; make {folder} writable") from None
    return files.page_path


def render_page(report: Report) -> str:
    """Render the page. Every number is in an element that names its place in report.json."""
    facts = report.facts
    metrics = facts["metrics"][facts["split"]]
    return render_template(
        "report.html",
        facts,
        pictures={name: picture(image) for name, image in report.pictures.items()},
        curves=[*race_curves(facts["run"].get("race")), *training_curves(facts["history"])],
        race=render_race(facts["run"]),
        bars=recall_bars(metrics),
        fold_bars=fold_bars(facts["folds"]),
        headline=[name for name in shown("headline", metrics) if name != "accuracy"],
        reliability=reliability_diagram(facts),
        risk_coverage=risk_coverage_curve(facts),
        matrix_classes=MATRIX_CLASSES,
        skipped=render_skipped(facts["run"], facts["metrics"]),
    )


def render_template(name: str, facts: dict[str, Any], **values: Any) -> str:
    """Render a template with the facts as `report`, and elements for their numbers."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hf_cifar"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"words": words, "key": pointer_key, "spoken": spoken}
    return environment.get_template(name).render(
        report=facts,
        number=lambda place, form="plain": number(facts, place, form),
        interval=lambda place, form="plain": interval(facts, place, form),
        **values,
    )


def spoken(split: str) -> str:
    """Return the name of a split as it is written before a noun: out_of_fold is out-of-fold."""
    return split.replace("_", "-")


def pointer_key(name: str) -> str:
    """Escape a key for a JSON pointer (RFC 6901)."""
    return name.replace("~", "~0").replace("/", "~1")


def look_up(facts: dict[str, Any], place: str) -> Any:
    """Look up a JSON pointer without its first slash, such as metrics/test/accuracy."""
    value: Any = facts
    for key in place.split("/"):
        key = key.replace("~1", "/").replace("~0", "~")
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


def render_value(value: float | int | None, form: str) -> str:
    """Format a number for the page: with four decimals, or as a percentage with one."""
    return (
        f"{100 * value:.1f}%" if form == "percent" and value is not None else render_number(value)
    )


def number(facts: dict[str, Any], place: str, form: str = "plain") -> Markup:
    """Render an element that shows the number at a place of report.json and names the place."""
    text = render_value(look_up(facts, place), form)
    return Markup('<data value="{}" class="{}">{}</data>').format(place, form, text)


def interval(facts: dict[str, Any], place: str, form: str = "plain") -> Markup:
    """Render the interval [low, high] at a place of report.json as two numbers; empty if there is none."""
    try:
        ends = look_up(facts, place)
    except KeyError:
        return Markup("")
    if ends is None:
        return Markup("")
    low, high = (number(facts, f"{place}/{end}", form) for end in (0, 1))
    return Markup('<span class="interval">[{}, {}]</span>').format(low, high)


def picture(image: np.ndarray, max_side: int = MAX_SIDE) -> dict[str, Any]:
    """Encode a picture [H, W, 3] uint8 for a page, of at most max_side x max_side pixels: source, and `small`
    if it should be shown pixelated."""
    shown = Image.fromarray(image)
    small = max(shown.size) <= 64
    shown.thumbnail((max_side, max_side))
    file = io.BytesIO()
    shown.save(file, "PNG" if small else "JPEG", **({} if small else {"quality": 85}))
    kind = "png" if small else "jpeg"
    encoded = base64.b64encode(file.getvalue()).decode()
    return {"source": f"data:image/{kind};base64,{encoded}", "small": small}


def reliability_diagram(facts: dict[str, Any]) -> Markup | None:
    """Draw accuracy against confidence; None for multi-label data."""
    if "reliability" not in facts:
        return None
    where = "out of fold" if facts["folds"] else f"on {facts['split']}"
    title = f"Reliability {where}"
    return Markup(charts.reliability_diagram(title, facts["reliability"]))


def risk_coverage_curve(facts: dict[str, Any]) -> Markup | None:
    """Draw accuracy against the share of images kept; None for a model that rejects no image."""
    if not (rejection := facts.get("rejection")):
        return None
    metrics = facts["metrics"][facts["split"]]
    series = {"by confidence alone": [tuple(point) for point in rejection["risk_coverage"]]}
    if metrics["accuracy_kept"] is not None:
        series["both thresholds"] = [(metrics["kept"], metrics["accuracy_kept"])]
    title = f"Accuracy by the share of images kept, on {facts['split']}"
    return Markup(charts.line_chart(title, series, "share of images kept", "accuracy of these"))


def training_curves(history: list[dict[str, float | None]]) -> list[Markup]:
    """Draw loss, validation metrics and learning rate over the epochs, as far as the run logged them."""

    def points(key: str) -> list[tuple[float, float]]:
        logged = ((log.get("epoch"), log.get(key)) for log in history)
        return [(x, y) for x, y in logged if x is not None and y is not None]

    loss = {"train": points("loss"), "validation": points("eval_cross_entropy")}
    metrics = [
        (f"Validation {words(name)}", {words(name): points(f"eval_{name}")}, words(name))
        for name in training_metrics()
        if name != "cross_entropy"  # shown next to the training loss
    ]
    curves = [
        ("Loss", {name: line for name, line in loss.items() if line}, "loss"),
        *metrics,
        ("Learning rate", {"learning rate": points("learning_rate")}, "learning rate"),
    ]
    return [
        Markup(
            charts.line_chart(
                title,
                {name: charts.thinned(line) for name, line in series.items()},
                "epoch",
                y_label,
                from_zero=not title.startswith("Validation"),
            )
        )
        for title, series, y_label in curves
        if any(len(line) > 0 for line in series.values())
    ]


def race_curves(race: dict[str, Any] | None) -> list[Markup]:
    """Draw the validation loss over the learning rate for each rung of a race, without runs that diverged."""
    if not race:
        return []
    series: dict[str, list[tuple[float, float]]] = {}
    for rung in race["rungs"]:
        losses = zip(rung["rates"], rung["losses"], strict=True)
        line = [(rate, loss) for rate, loss in losses if loss is not None]
        series |= {f"after {rung['steps']} steps": line} if line else {}
    title, labels = "Race of learning rates", ("learning rate", "validation loss")
    return [Markup(charts.line_chart(title, series, *labels, log_x=True))] if series else []


def fold_bars(folds: dict[str, Any] | None) -> Markup | None:
    """Draw the accuracy of each fold with its interval; None without folds."""
    if not folds:
        return None
    values = folds["metrics"]["validation"]["accuracy"]["values"]
    pairs = zip(values, folds["accuracy_intervals"], strict=True)
    rows = dict(zip(folds["runs"], pairs, strict=True))
    return Markup(charts.interval_bars("Accuracy by fold", rows, "accuracy, with 95% interval"))


def recall_bars(metrics: dict[str, Any]) -> Markup:
    """Draw the recall of each class with its interval."""
    intervals = metrics["intervals"]["per_class"]
    rows = {
        name: (values["recall"], intervals[name]["recall"])
        for name, values in metrics["per_class"].items()
        if values["num_images"]
    }
    title = "Recall by class"
    if len(rows) > MATRIX_CLASSES:
        lowest = sorted(rows, key=lambda name: rows[name][0])[:MATRIX_CLASSES]
        rows = {name: rows[name] for name in lowest}
        title = f"The {MATRIX_CLASSES} classes with the lowest recall"
    return Markup(charts.interval_bars(title, rows, "recall, with 95% interval"))

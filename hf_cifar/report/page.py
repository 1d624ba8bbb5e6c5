"""report.html: one page that shows a report, and needs nothing but itself."""

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
from hf_cifar.errors import UserError
from hf_cifar.evaluation.tables import render_figure
from hf_cifar.report import charts
from hf_cifar.report.facts import Report, build_report
from hf_cifar.report.wording import render_skipped
from hf_cifar.runs.folder import write_json

PAGE_FILE, FACTS_FILE = "report.html", "report.json"
MAX_SIDE = 128  # px, of a picture in the page
MATRIX_CLASSES = 40  # of more the page shows no confusion matrix, and the lowest recalls alone
# Beside the accuracy, at the top of the page.
HEADLINE = ("f1_macro", "roc_auc_macro", "cross_entropy", "ece")
MULTI_LABEL_HEADLINE = ("f1_micro", "f1_macro", "average_precision_macro", "cross_entropy")
# A figure's name in words, where it is not the name itself.
WORDS = {
    "num_images": "images",
    "top_5_accuracy": "top-5 accuracy",
    "matthews": "Matthews' correlation",
    "f1_micro": "F1, micro",
    "f1_macro": "F1, macro",
    "f1_weighted": "F1, weighted",
    "roc_auc": "ROC AUC",
    "roc_auc_macro": "ROC AUC, macro",
    "average_precision_macro": "mean average precision (mAP)",
    "brier": "Brier score",
    "ece": "calibration error (ECE)",
    "ece_equal_mass": "ECE, bins of equal mass",
    "ece_uncalibrated": "ECE before calibration",
    "jpeg": "JPEG",
    "f1": "F1",
}


def write_report(folder: str | Path, config: ReportConfig) -> Path:
    """Write report.json and report.html into the folder of a run; returns the path of the page.

    Raises: UserError as `build_report` does, or if the folder cannot be written.
    """
    folder = Path(folder)
    report = build_report(folder, config)
    page = render_page(report)
    try:
        write_json(folder / FACTS_FILE, report.facts)
        temporary = folder / f".{PAGE_FILE}.tmp"
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(folder / PAGE_FILE)
    except PermissionError as error:
        raise UserError(f"cannot write the report: {error}; make {folder} writable") from None
    return folder / PAGE_FILE


def render_page(report: Report) -> str:
    """The page. Every figure in it stands in an element that names its place in report.json."""
    facts = report.facts
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hf_cifar"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"words": words, "key": pointer_key}
    return environment.get_template("report.html").render(
        report=facts,
        figure=lambda place, form="plain": figure(facts, place, form),
        interval=lambda place, form="plain": interval(facts, place, form),
        pictures={name: picture(image) for name, image in report.pictures.items()},
        curves=training_curves(facts["history"]),
        bars=recall_bars(facts["metrics"][facts["split"]]),
        headline=MULTI_LABEL_HEADLINE if facts["multi_label"] else HEADLINE,
        reliability=None
        if facts["multi_label"]
        else Markup(
            charts.reliability_diagram(f"Reliability on {facts['split']}", facts["reliability"])
        ),
        matrix_classes=MATRIX_CLASSES,
        skipped=render_skipped(facts["run"], facts["metrics"]),
    )


def words(name: str) -> str:
    """A figure's or option's name as a person says it."""
    return WORDS.get(name, name.replace("_", " "))


def pointer_key(name: str) -> str:
    """A key as a JSON pointer has it (RFC 6901)."""
    return name.replace("~", "~0").replace("/", "~1")


def look_up(facts: dict[str, Any], place: str) -> Any:
    """The value at a JSON pointer without its first slash, such as metrics/test/accuracy."""
    value: Any = facts
    for key in place.split("/"):
        key = key.replace("~1", "/").replace("~0", "~")
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


def render_value(value: float | int | None, form: str) -> str:
    """A figure as the page shows it: four decimals, or in percent with one."""
    return (
        f"{100 * value:.1f}%" if form == "percent" and value is not None else render_figure(value)
    )


def figure(facts: dict[str, Any], place: str, form: str = "plain") -> Markup:
    """An element that shows the figure at a place of report.json, and says which it is."""
    text = render_value(look_up(facts, place), form)
    return Markup('<data value="{}" class="{}">{}</data>').format(place, form, text)


def interval(facts: dict[str, Any], place: str, form: str = "plain") -> Markup:
    """The interval [low, high] at a place of report.json, as two figures; nothing where there is none."""
    try:
        ends = look_up(facts, place)
    except KeyError:
        return Markup("")
    if ends is None:
        return Markup("")
    low, high = (figure(facts, f"{place}/{end}", form) for end in (0, 1))
    return Markup('<span class="interval">[{}, {}]</span>').format(low, high)


def picture(image: np.ndarray) -> dict[str, Any]:
    """A picture [H, W, 3] uint8 as the page embeds it: source, and whether its pixels are to be seen."""
    shown = Image.fromarray(image)
    small = max(shown.size) <= 64
    shown.thumbnail((MAX_SIDE, MAX_SIDE))
    file = io.BytesIO()
    shown.save(file, "PNG" if small else "JPEG", **({} if small else {"quality": 85}))
    kind = "png" if small else "jpeg"
    encoded = base64.b64encode(file.getvalue()).decode()
    return {"source": f"data:image/{kind};base64,{encoded}", "small": small}


def training_curves(history: list[dict[str, float | None]]) -> list[Markup]:
    """Loss, validation accuracy and learning rate over the epochs, as far as the run kept them."""

    def points(key: str) -> list[tuple[float, float]]:
        logs = (log for log in history if log.get(key) is not None and "epoch" in log)
        return [(log["epoch"], log[key]) for log in logs]

    loss = {"train": points("loss"), "validation": points("eval_cross_entropy")}
    curves = [
        ("Loss", {name: line for name, line in loss.items() if line}, "loss"),
        ("Validation accuracy", {"accuracy": points("eval_accuracy")}, "accuracy"),
        ("Validation mAP", {"mAP": points("eval_average_precision_macro")}, "mAP"),
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


def recall_bars(metrics: dict[str, Any]) -> Markup:
    """Each class's recall with its interval."""
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
        title = f"The {MATRIX_CLASSES} classes of lowest recall"
    return Markup(charts.interval_bars(title, rows, "recall, with 95% interval"))

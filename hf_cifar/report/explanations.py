"""explanations.html: the explained images with their maps and checks, as one self-contained page."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from PIL import Image

from hf_cifar.errors import UserError
from hf_cifar.explain.explainer import Explainer, Explanation
from hf_cifar.explain.sanity import SIMILAR, STEPS, Curves, doubts, summarize
from hf_cifar.report import charts
from hf_cifar.report.page import picture, render_template
from hf_cifar.runs.folder import (
    EXPLANATION_FILES,
    new_folder,
    refuse_other_files,
    write_json,
    write_text,
)
from hf_cifar.text import render_table

logger = logging.getLogger(__name__)
PAGE, FACTS, PICTURES = EXPLANATION_FILES
FILTERS = f"{PICTURES}/filters.png"
MAX_SIDE = 224  # pixels of a picture in the page; the files keep their size


class Note(NamedTuple):
    """What a method is called, what its picture shows, and when it misleads."""

    words: str
    shows: str
    misleads: str


NOTES = {
    "grad_cam": Note(
        "Grad-CAM",
        "Where the last feature maps support the class.",
        "Its positions are as coarse as these maps, and smoothing makes them look finer than they are.",
    ),
    "attention_rollout": Note(
        "Attention roll-out",
        "Which patches the output attends to, through all blocks.",
        "It is the same for every class, and a patch with high attention may not affect the logit.",
    ),
    "integrated_gradients": Note(
        "Integrated gradients",
        "How much each pixel moves the logit from that of the mean colour to that of the image.",
        "It is noisy, single pixels mean little, and pixels of the mean colour never count.",
    ),
    "occlusion": Note(
        "Occlusion",
        "How far the logit falls when a window of the image is covered.",
        "A covered image is unlike any training image, and evidence that is visible twice seems unimportant.",
    ),
    "lime": Note(
        "LIME",
        "The weights of superpixels in a linear model of the logit, fitted to images without some of them.",
        "It depends on the superpixels and on chance, and a linear model may fit badly.",
    ),
    "shap": Note(
        "SHAP",
        "The mean effect of each superpixel on the logit, over the orders of adding them.",
        "It is an estimate from few samples, and images without most parts are unlike those of training.",
    ),
    "feature_maps": Note(
        "Feature maps",
        "The channels that vary most, for six layers from the first (top) to the last.",
        "What a channel responds to cannot be read from one image.",
    ),
}


class Subject(NamedTuple):
    """An image to explain. image: uint8 [H, W, 3], or the error that it cannot be read. truth: its label, if
    known."""

    name: str
    image: np.ndarray | UserError
    truth: str | None = None


def write_explanations(
    folder: Path, title: str, explainer: Explainer, subjects: Iterable[Subject]
) -> dict[str, Any]:
    """Explain images, and write the page, its facts and the pictures into a folder in place of earlier ones.

    Nothing changes unless all is written. Returns the facts, with `unreadable` images by name.
    Raises: UserError if no image can be read, or the folder is not writable.
    """
    refuse_other_files(folder, EXPLANATION_FILES)  # which would be lost
    with new_folder(folder) as unfinished:
        return _write(unfinished, title, explainer, subjects)


def _write(
    folder: Path, title: str, explainer: Explainer, subjects: Iterable[Subject]
) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    shown: dict[str, dict[str, Any]] = {}  # pictures in the page by file
    unreadable: dict[str, str] = {}
    explained: list[Explanation] = []
    for subject in subjects:
        if isinstance(subject.image, UserError):
            unreadable[subject.name] = str(subject.image)
            continue
        found = explainer.explain(subject.image)
        files = {name: f"{PICTURES}/{len(rows) + 1:04}-{name}.png" for name in found.pictures}
        for name, file in files.items():
            _save(folder / file, found.pictures[name], shown)
        rows.append(
            {"name": subject.name, "truth": subject.truth, **_facts_of(found), "files": files}
        )
        found.pictures.clear()
        explained.append(found)
    if not rows:
        raise UserError(
            f"none of the {len(unreadable)} images can be read: {_first(unreadable)}; pass other images"
        )
    facts = {
        "title": title,
        "methods": [name for name in explainer.methods if name != "filters"],
        "layer": _layer_of(explainer),
        "images": rows,
        "unreadable": unreadable,
        "sanity": _summaries(explained),
        "filters": None if explainer.filters is None else explainer.filters[1],
    }
    if explainer.filters is not None:
        _save(folder / FILTERS, explainer.filters[0], shown)
    write_json(folder / FACTS, facts)
    write_text(folder / PAGE, render_explanations(facts, shown))
    return facts


def _save(path: Path, drawn: np.ndarray, shown: dict[str, dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(drawn).save(path)
    shown[f"{PICTURES}/{path.name}"] = picture(drawn, max(MAX_SIDE, min(drawn.shape[1], 340)))


def _first(unreadable: dict[str, str]) -> str:
    name, reason = next(iter(unreadable.items()))
    return f"{name}: {reason}"


def _layer_of(explainer: Explainer) -> dict[str, Any] | None:
    if explainer.layer is None:
        return None
    height, width = explainer.layer.layout.grid
    return {"name": explainer.layer.name, "height": height, "width": width}


def _facts_of(found: Explanation) -> dict[str, Any]:
    """The numbers of an explanation, without its pictures."""
    facts: dict[str, Any] = {
        "prediction": found.prediction,
        "score": found.score,
        "explained": found.explained,
        "explained_score": found.explained_score,
        "feature_layers": list(found.feature_layers),
        "random": None,
        "checks": {},
    }
    if found.chance is None:
        return facts
    facts["random"] = _areas(found.chance)
    for name, check in found.checks.items():
        facts["checks"][name] = {
            **_areas(check.curves),
            "correlation": check.correlation,
            "doubts": doubts(check, found.chance),
        }
    return facts


def _areas(curves: Curves) -> dict[str, float]:
    return dict(zip(curves._fields, curves.areas, strict=True))


def _summaries(explained: list[Explanation]) -> dict[str, dict[str, Any]]:
    """Summarise the checks of each method; empty without checks."""
    chances = [found.chance for found in explained if found.chance is not None]
    return {
        name: summarize([found.checks[name] for found in explained], chances)
        for name in (explained[0].checks if chances else ())
    }


def render_explanations(facts: dict[str, Any], pictures: dict[str, dict[str, Any]]) -> str:
    """Render the page. pictures: see `picture`, by the names of their files."""
    return render_template(
        "explanations.html",
        facts,
        pictures=pictures,
        notes=NOTES,
        filters=FILTERS,
        similar=SIMILAR,
        curves={name: _charts(name, each) for name, each in facts["sanity"].items()},
    )


def _charts(name: str, summary: dict[str, Any]) -> list[Markup]:
    """Draw the mean curves of a method, and those of random orders."""
    drawn = []
    for curve in Curves._fields:
        series = {
            words: [(step / STEPS, value) for step, value in enumerate(summary[curve][key])]
            for words, key in ((NOTES[name].words, "curve"), ("random order", "random_curve"))
        }
        title = f"{NOTES[name].words}, {curve}"
        labels = (f"share of the image: {curve}", "probability of the class")
        drawn.append(Markup(charts.line_chart(title, series, *labels, from_zero=True)))
    return drawn


def render_summary(facts: dict[str, Any]) -> str:
    """Render the checks as a table for a terminal; empty without checks."""
    rows = [
        [
            NOTES[name].words,
            *(
                f"{each[curve]['area']:.3f} ({each[curve]['random_area']:.3f})"
                for curve in Curves._fields
            ),
            "-" if each["correlation"] is None else f"{each['correlation']:.2f}",
            each["verdict"],
        ]
        for name, each in facts["sanity"].items()
    ]
    header = ["method", "deletion (random)", "insertion (random)", "correlation", "verdict"]
    return render_table(header, rows) if rows else ""

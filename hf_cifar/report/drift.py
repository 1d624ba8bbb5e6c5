"""drift.json and drift.html: two samples of images compared, by a model's outputs for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from hf_cifar.audit.two_sample import ks_test, mmd_test, neighbour_distances
from hf_cifar.evaluation.calibration import fit_temperature
from hf_cifar.evaluation.intervals import mean_interval, wilson
from hf_cifar.evaluation.label_free import estimated_accuracy
from hf_cifar.evaluation.outcome import Outcome
from hf_cifar.evaluation.predictions import outcome_of
from hf_cifar.report import charts
from hf_cifar.report.facts import label_names
from hf_cifar.report.page import picture, render_template
from hf_cifar.text import listed, render_table

SEED = 0  # of the permutations
NEIGHBOUR = 5  # whose distance says how strange an image is
RARE = 0.01  # share of the reference images that count as further away than usual
POINTS = 101  # of a drawn distribution
ENOUGH = 500  # images show small differences too, see docs/techniques.md
SHOWN_CLASSES, SUMMARY_CLASSES = 30, 10  # in the plot, and on a terminal
SAMPLES = {"reference": "validation", "new": "new images"}


@dataclass(frozen=True, eq=False)
class Outputs:
    """A model's outputs for a sample of images. features: [N, D]; outcome: with logits [N, K]."""

    features: np.ndarray
    outcome: Outcome


def run_tests(
    reference: Outputs, new: Outputs, names: Sequence[str], alpha: float, seed: int = SEED
) -> dict[str, Any]:
    """Test whether two samples have the same distribution; the probability of a false alarm is at most alpha.

    Each of the two tests gets half of it, and each class an equal part of the first half (Bonferroni).
    """
    level = alpha / 2
    probabilities = [each.outcome.probabilities for each in (reference, new)]
    statistics, p_values = ks_test(*probabilities)
    first, level_of_class = int(np.argmin(p_values)), level / len(p_values)
    discrepancy = mmd_test(reference.features, new.features, level, seed)
    return {
        "ks": {
            "class": names[first], "statistic": float(statistics[first]), "p": float(p_values[first]),
            "level": level_of_class, "drift": bool(p_values[first] <= level_of_class),
            "statistics": statistics.tolist(), "p_values": p_values.tolist(),
        },
        "mmd": {**discrepancy._asdict(), "level": level, "drift": discrepancy.p <= level},
    }  # fmt: skip


def compare_outputs(
    reference: Outputs,
    new: Outputs,
    id2label: dict[int, str],
    alpha: float,
    gallery_size: int = 0,
) -> dict[str, Any]:
    """Compare two samples: tests, verdict, classes, confidence, distances, and the positions of the strangest
    new images, as plain values."""
    samples = {"reference": reference, "new": new}
    names = list(id2label.values())
    tests = run_tests(reference, new, names, alpha)
    calibrated, temperature = calibrated_outcomes(samples)
    confidences = {name: each.probabilities_of(each.predicted) for name, each in calibrated.items()}
    distances = distances_to(samples)
    facts = {
        "alpha": alpha,
        "num_images": {name: len(each.features) for name, each in samples.items()},
        "multi_label": reference.outcome.multi_label,
        "tests": tests,
        "drift": tests["ks"]["drift"] or tests["mmd"]["drift"],
        "classes": class_facts(samples, names, tests["ks"]),
        "temperature": temperature,
        "confidence": {name: mean(each) for name, each in confidences.items()},
        "accuracy": accuracy_facts(calibrated),
        "distance": distance_facts(distances),
        "curves": {
            "confidence": {name: distribution(each) for name, each in confidences.items()},
            "distance": {name: distribution(each) for name, each in distances.items()},
        },
        "strangest": [
            {
                "position": int(position),
                "distance": float(distances["new"][position]),
                "prediction": label_names(new.outcome.predicted[position], id2label),
                "confidence": float(confidences["new"][position]),
            }
            for position in np.argsort(-distances["new"], kind="stable")[:gallery_size]
        ],
    }
    return {**facts, "verdict": verdict(facts)}


Samples = Mapping[str, Outputs]


def class_facts(
    samples: Samples, names: Sequence[str], test: dict[str, Any]
) -> list[dict[str, Any]]:
    """The share of images for which each class is predicted, and the test of its probability."""
    counts = {}
    for name, each in samples.items():
        found = each.outcome.predicted
        is_predicted = found if found.ndim == 2 else found[:, None] == np.arange(len(names))
        counts[name] = is_predicted.sum(axis=0)
    return [
        {
            "name": label,
            "share": {
                name: share(int(counts[name][k]), len(each.features)) for name, each in samples.items()
            },
            "statistic": test["statistics"][k], "p": test["p_values"][k],
            "drift": test["p_values"][k] <= test["level"],
        }
        for k, label in enumerate(names)
    ]  # fmt: skip


def share(hits: int, count: int) -> dict[str, Any]:
    """A share of images with its 95% interval."""
    return {"value": hits / count, "interval": wilson(hits, count).tolist()}


def mean(values: np.ndarray) -> dict[str, Any]:
    """The mean of a value of each image, 0..1, with its 95% interval."""
    return {"value": float(values.mean()), "interval": mean_interval(values).clip(0, 1).tolist()}


def calibrated_outcomes(samples: Samples) -> tuple[dict[str, Outcome], float]:
    """Return the outcomes calibrated on the labels of the reference, and the temperature, which is about 1
    for a calibrated run; multi-label outcomes are not changed."""
    outcomes = {name: each.outcome for name, each in samples.items()}
    reference = outcomes["reference"]
    if reference.multi_label:
        return outcomes, 1.0
    temperature = fit_temperature(reference.logits, reference.labels)
    scaled = {
        name: outcome_of(each.logits / temperature, each.labels) for name, each in outcomes.items()
    }
    return scaled, temperature


def accuracy_facts(outcomes: Mapping[str, Outcome]) -> dict[str, Any] | None:
    """The accuracy on the reference, and its estimate for the new images; None for multi-label data."""
    reference, new = outcomes["reference"], outcomes["new"]
    if reference.multi_label:
        return None
    value, interval = estimated_accuracy(
        reference.probabilities, reference.correct, new.probabilities
    )
    return {
        "reference": share(int(reference.correct.sum()), len(reference.correct)),
        "new": {"value": value, "interval": interval.tolist()},
    }


def distances_to(samples: Samples) -> dict[str, np.ndarray]:
    """The distance of each image to its k-th nearest reference image, features scaled to length 1 (Sun et al.
    2022)."""
    features = {
        name: each.features
        / np.maximum(np.linalg.norm(each.features, axis=1, keepdims=True), 1e-12)
        for name, each in samples.items()
    }
    return {
        name: neighbour_distances(each, features["reference"], NEIGHBOUR, same=name == "reference")
        for name, each in features.items()
    }


def distance_facts(distances: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The distance that only few reference images exceed, and the shares that exceed it."""
    usual = float(np.quantile(distances["reference"], 1 - RARE))
    beyond = {name: share(int((each > usual).sum()), len(each)) for name, each in distances.items()}
    return {"neighbour": NEIGHBOUR, "usual": usual, "beyond": beyond}


def distribution(values: np.ndarray) -> list[list[float]]:
    """Points [value, share of values up to it] of a distribution function."""
    shares = np.linspace(0, 1, POINTS)
    return [[float(x), float(y)] for x, y in zip(np.quantile(values, shares), shares, strict=True)]


def verdict(facts: dict[str, Any]) -> str:
    """Say in words whether there is drift, and which test found it."""
    tests, found = facts["tests"], []
    if tests["ks"]["drift"]:
        drifted = sorted(
            (each for each in facts["classes"] if each["drift"]), key=lambda each: each["p"]
        )
        names = listed((each["name"] for each in drifted), 3)
        found.append(f"scores of {names} ({p_value(tests['ks']['p'], 'p = ')})")
    if tests["mmd"]["drift"]:
        found.append(f"features ({p_value(tests['mmd']['p'], 'p = ')})")
    if found:
        where = ", and its ".join(found)
        return (
            f"Drift: these images are not like those of the run, according to the model's {where}."
        )
    count = facts["num_images"]["new"]
    size = "" if count >= ENOUGH else "; so few images only show large differences"
    return f"No drift found in {count:,} images{size}."


def p_value(value: float, intro: str = "") -> str:
    """Render a p-value or a level after `intro`: `0.012`, or `< 1e-6`, which then replaces an equals sign."""
    small = value < 1e-6
    return (intro.replace("= ", "") if small else intro) + ("< 1e-6" if small else f"{value:.2g}")


def render_page(facts: dict[str, Any], pictures: Mapping[int, np.ndarray]) -> str:
    """Render the page; every number names its place in drift.json. pictures: by position, uint8 [H, W, 3]."""
    curves = {
        name: {
            words: [(x, y) for x, y in facts["curves"][name][sample]]
            for sample, words in SAMPLES.items()
        }
        for name in ("confidence", "distance")
    }
    labels = {"confidence": "confidence", "distance": "distance to the run's images"}
    plots = {
        name: Markup(
            charts.line_chart(
                name.capitalize(), series, labels[name], "share of images up to it", from_zero=True
            )
        )
        for name, series in curves.items()
    }
    return render_template(
        "drift.html",
        facts,
        plots={**plots, "shares": shares_plot(facts["classes"])},
        pictures={position: picture(image) for position, image in pictures.items()},
        p_value=p_value,
        shown_classes=SHOWN_CLASSES,
    )


def shares_plot(classes: Sequence[dict[str, Any]]) -> Markup:
    """Draw the predicted share of each class in both samples; if there are many, those that differ most."""

    def gap(each: dict[str, Any]) -> float:
        return abs(each["share"]["new"]["value"] - each["share"]["reference"]["value"])

    chosen = sorted(classes, key=gap, reverse=True)[:SHOWN_CLASSES]
    rows = {
        each["name"]: [
            (each["share"][name]["value"], each["share"][name]["interval"]) for name in SAMPLES
        ]
        for each in classes
        if each in chosen
    }
    title = "Predicted shares"
    return Markup(
        charts.interval_dots(
            title, list(SAMPLES.values()), rows, "share of images, with 95% interval"
        )
    )


ESTIMATE = "the estimated accuracy is only valid for images of the run's classes"


def render_summary(facts: dict[str, Any]) -> str:
    """Render the samples, the classes and the verdict for a terminal."""

    def cell(found: dict[str, Any]) -> str:
        low, high = found["interval"]
        return f"{found['value']:.4f} [{low:.4f}, {high:.4f}]"

    def row(name: str, place: dict[str, Any], p: str = "-") -> list[str]:
        return [name, *(cell(place[sample]) for sample in SAMPLES), p]

    rows = [["images", *(f"{facts['num_images'][sample]:,}" for sample in SAMPLES), "-"]]
    rows.append(row("mean confidence", facts["confidence"]))
    if facts["accuracy"]:
        rows.append(row("accuracy (new: estimate)", facts["accuracy"]))
    rows.append(row("unusually far", facts["distance"]["beyond"]))
    ranked = sorted(facts["classes"], key=lambda each: each["p"])[:SUMMARY_CLASSES]
    rows += [row(f"share of {each['name']}", each["share"], p_value(each["p"])) for each in ranked]
    rows.append(["features", "-", "-", p_value(facts["tests"]["mmd"]["p"])])
    level = {name: p_value(each["level"]) for name, each in facts["tests"].items()}
    return "\n".join(
        [
            render_table(["95% intervals", *SAMPLES.values(), "p"], rows),
            "",
            f"there is drift if p is at most {level['ks']} for a class, or {level['mmd']} for the features",
            facts["verdict"],
            *([ESTIMATE] if facts["accuracy"] else []),
        ]
    )

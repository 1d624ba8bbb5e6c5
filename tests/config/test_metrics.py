"""hf_cifar.config.metrics: a row of the table is enough for a metric to be computed and shown."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from markupsafe import escape

from hf_cifar.config import metrics as table
from hf_cifar.config.evaluation import ReportConfig
from hf_cifar.config.metrics import (
    BEST_METRICS,
    METRICS,
    Metric,
    best_metrics,
    is_multi_label,
    metrics_of,
    shown,
    training_metrics,
    words,
)
from hf_cifar.evaluation.comparison import compare_predictions, render_comparison
from hf_cifar.evaluation.evaluate_metrics import compute_training_metrics, evaluate_metric
from hf_cifar.evaluation.metrics import COUNT_METRICS, ratio
from hf_cifar.evaluation.predictions import Predictions
from hf_cifar.report.facts import Report, build_report
from hf_cifar.report.page import render_page

NAMES = dict(enumerate(("cat", "dog", "owl", "bee", "ant", "elk")))


def predictions(multi_label, seed=0):
    generator = np.random.default_rng(seed)
    truth = np.random.default_rng(9).random((150, 6)) < 0.4
    labels = truth.astype(np.uint8) if multi_label else truth.argmax(axis=1)
    logits = generator.normal(size=(150, 6)) + 2 * (truth if multi_label else np.eye(6)[labels])
    return Predictions("test", np.arange(150), labels, logits.astype(np.float32), NAMES)


def training_metrics_of(made):
    return compute_training_metrics(SimpleNamespace(predictions=made.logits, label_ids=made.labels))


def page_of(folder, made):
    made.save(folder)
    report = build_report(folder, ReportConfig(gallery_size=0))
    logs = training_metrics_of(made)
    history = [{"epoch": e, **{f"eval_{name}": v for name, v in logs.items()}} for e in (1.0, 2.0)]
    return render_page(Report(report.facts | {"history": history}, report.pictures))


@pytest.mark.parametrize("multi_label", [False, True])
def test_every_row_is_computed_with_an_interval_and_nothing_else_is(multi_label):
    found = predictions(multi_label).metrics
    numbers = [name for name, value in found.items() if isinstance(value, (int, float))]
    assert numbers == ["num_images", *metrics_of(multi_label=multi_label)]
    assert is_multi_label(found) is multi_label
    for name in metrics_of(multi_label=multi_label):
        low, high = found["intervals"][name]
        assert low <= found[name] <= high, name
        bounds = METRICS[name].unit.split("..")
        if len(bounds) == 2:
            assert float(bounds[0]) <= low and high <= float(bounds[1]), name


@pytest.mark.parametrize("multi_label", [False, True])
def test_training_computes_what_it_shows(multi_label):
    found = training_metrics_of(predictions(multi_label))
    assert {*metrics_of(multi_label=multi_label, place="training")} <= found.keys()
    assert found.keys() == best_metrics(multi_label=multi_label).keys() - {"loss"}


@pytest.mark.parametrize("multi_label", [False, True])
def test_places_show_their_metrics(multi_label, tmp_path):
    made = predictions(multi_label)
    headline = shown("headline", made.metrics)
    compared = shown("comparison", made.metrics)
    assert headline == metrics_of(multi_label=multi_label, place="headline")
    text = render_comparison(compare_predictions(made, predictions(multi_label, seed=1)), "ab")
    rows = [line.split()[0] for line in text.split("\n\n")[0].splitlines()[1:]]
    assert rows == ["num_images", *compared]
    page = page_of(tmp_path, made)
    top = page[page.index('<dl class="headline">') : page.index("</dl>")]
    for name in metrics_of(multi_label=multi_label):
        assert f'<th scope="row">{escape(words(name))}</th>' in page
        assert (f'value="metrics/test/{name}"' in top) == (name in headline)
    for name in metrics_of(multi_label=multi_label, place="training"):
        assert name == "cross_entropy" or f"Validation {words(name)}" in page


def test_the_direction_of_the_best_checkpoint():
    assert {name for name, larger in BEST_METRICS.items() if not larger} == {
        "cross_entropy",
        "loss",
    }
    assert set(BEST_METRICS) == {*training_metrics(), "balanced_accuracy", "loss"}


def test_metrics_have_words_besides_their_names():
    for name in METRICS:
        assert "_" not in words(name)
    assert len({row.words for row in METRICS.values()}) == len(METRICS)
    assert words("ece_uncalibrated") == "calibration error (ECE) before calibration"
    assert (words("num_images"), words("f1"), words("precision")) == ("images", "F1", "precision")


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_metric_is_added_by_a_function_and_a_row(multi_label, monkeypatch, tmp_path):
    """Jaccard's index over all decisions, the example in CONTRIBUTING."""

    def jaccard_micro(counts):
        hits, predicted, actual = (each.sum(axis=-1) for each in counts)
        return ratio(hits, predicted + actual - hits)

    row = Metric("jaccard_micro", "micro Jaccard", single_label=table.EVERYWHERE,
                 multi_label=table.EVERYWHERE)  # fmt: skip
    monkeypatch.setitem(COUNT_METRICS, "jaccard_micro", jaccard_micro)
    monkeypatch.setitem(METRICS, "jaccard_micro", row)
    made = predictions(multi_label)
    low, high = made.metrics["intervals"]["jaccard_micro"]
    assert low < made.metrics["jaccard_micro"] < high
    assert "jaccard_micro" in shown("headline", made.metrics)
    assert "jaccard_micro" in render_comparison(compare_predictions(made, made), "ab")
    assert evaluate_metric("jaccard_micro", multi_label=multi_label)
    page = page_of(tmp_path, made)
    assert "Validation micro Jaccard" in page and 'value="metrics/test/jaccard_micro"' in page
    made.save(tmp_path)
    assert "jaccard_micro" in json.loads((tmp_path / "metrics.json").read_text())["test"]


def test_the_table_imports_without_torch():
    code = (
        "import sys, hf_cifar.config.metrics; print({'torch', 'numpy', 'scipy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

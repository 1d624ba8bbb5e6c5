"""A real run of a tiny network on real digits, its report, and its page in a browser."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shutil

import numpy as np
import pytest

from hf_cifar.cli import main
from hf_cifar.config.evaluation import ReportConfig
from hf_cifar.errors import UserError
from hf_cifar.evaluation import intervals, resampling
from hf_cifar.evaluation.comparison import compare_runs
from hf_cifar.evaluation.predictions import Predictions
from hf_cifar.report.facts import build_report
from hf_cifar.report.page import (
    look_up,
    pointer_key,
    race_curves,
    render_page,
    render_value,
    training_curves,
)

HISTORY = [
    {"epoch": 0.5, "step": 10, "loss": 2.0, "learning_rate": 1e-3},
    {"epoch": 1.0, "step": 20, "loss": 1.0, "learning_rate": 5e-4},
    {"epoch": 1.0, "step": 20, "eval_accuracy": 0.6, "eval_cross_entropy": 1.2},
    {"train_runtime": 3.0},
]


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A finished run with everything that a report can show."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    argv = [
        "finetune", "--model_name_or_path", "scratch/article_mlp", "--dataset_name", "bundled/digits",
        "--output_dir", str(folder), "--num_train_epochs", "1", "--precision", "fp32", "--use_cpu",
        "--learning_rate", "1e-3", "--disable_tqdm", "true", "--do_predict", "--logging_steps", "5",
        "--save_strategy", "no", "--load_best_model_at_end", "false", "--memory_format", "contiguous",
    ]  # fmt: skip
    assert main(argv) == 0
    argv = ["evaluate", "--model_name_or_path", str(folder), "--split", "test", "--use_cpu"]
    assert main([*argv, "--corruptions", "60"]) == 0
    assert main(["report", str(folder), "--gallery_size", "6"]) == 0
    return folder


@pytest.fixture(scope="session")
def facts(run):
    return json.loads((run / "report.json").read_text())


def test_report_collects_the_facts_of_the_run(run, facts):
    metrics = json.loads((run / "metrics.json").read_text())
    assert facts["metrics"] == metrics
    assert (facts["title"], facts["split"]) == ("digits", "test")
    assert (facts["dataset"], facts["model"]) == ("bundled/digits", "scratch/article_mlp")
    assert facts["run"]["split_hash"] == json.loads((run / "run.json").read_text())["split_hash"]
    assert (
        sum(part["num_images"] for part in facts["reliability"])
        == facts["metrics"]["test"]["num_images"]
    )
    assert "before the end of training" in facts["role"]
    wrong = sum(pair["num_images"] for pair in facts["confused_pairs"])
    assert 0 < wrong <= 355 * (1 - metrics["test"]["accuracy"]) + 1e-9


def test_galleries_show_the_right_images(run, facts):
    predictions = Predictions.load(run, "test")
    predicted = dict(
        zip(predictions.row_ids.tolist(), predictions.logits.argmax(axis=1), strict=True)
    )
    truth = dict(zip(predictions.row_ids.tolist(), predictions.labels.tolist(), strict=True))
    assert len(facts["worst_errors"]) == len(facts["least_confident_hits"]) == 6
    for row in facts["worst_errors"]:
        assert predicted[row["row_id"]] != truth[row["row_id"]]
        assert row["confidence"] > row["label_probability"]
    for row in facts["least_confident_hits"]:
        assert predicted[row["row_id"]] == truth[row["row_id"]]
        assert row["truth"] == row["prediction"] == predictions.id2label[truth[row["row_id"]]]


def test_slices_and_corruptions_cover_all_images(facts):
    for parts in facts["slices"].values():
        total = sum(part["num_images"] * part["accuracy"] for part in parts if part)
        assert total / 355 == pytest.approx(facts["metrics"]["test"]["accuracy"])
    corruptions = facts["corruptions"]
    assert corruptions["num_images"] == 60 and len(corruptions["accuracy"]) == 15
    values = [value for row in corruptions["accuracy"].values() for value in row]
    assert corruptions["mean"] == pytest.approx(np.mean(values))
    assert min(values) < corruptions["clean"] <= 1


def test_no_local_path_is_in_the_report(run):
    for name in ("report.html", "report.json"):
        text = (run / name).read_text()
        assert str(run.parent) not in text and os.path.expanduser("~") not in text


def test_page_says_what_the_source_is(run, tmp_path):
    folder = tmp_path / "digits"
    shutil.copytree(run, folder)
    facts = json.loads((folder / "run.json").read_text())
    assert facts["source"] == {
        "description": None, "num_images": {"train": 1442, "test": 355}, "left_out": {}, "rows_left_out": {},
    }  # fmt: skip
    facts["source"]["description"] = (
        "photos: 2 classes from folders, 60 images; left out: 1 file (1 .txt)"
    )
    (folder / "run.json").write_text(json.dumps(facts))
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert f"<p>Source: {facts['source']['description']}.</p>" in page
    assert "<p>Source" not in (run / "report.html").read_text()


def test_report_without_the_data(run, tmp_path, caplog):
    folder = tmp_path / "alone"
    shutil.copytree(run, folder)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("bundled/digits", "/nowhere/digits"))
    report = build_report(folder, ReportConfig())
    assert report.pictures == {} and report.facts["slices"] is None
    assert "nowhere" in caplog.text and "nowhere" not in json.dumps(report.facts)
    assert "images were not available" in render_page(report)


def test_changed_data_is_not_shown(run, tmp_path, caplog):
    folder = tmp_path / "changed"
    shutil.copytree(run, folder)
    predictions = Predictions.load(folder, "test")
    dataclasses.replace(predictions, labels=predictions.labels[::-1].copy()).save(folder)
    assert build_report(folder, ReportConfig()).facts["pictures"] is False
    assert "the test images of bundled/digits have changed" in caplog.text


def test_report_from_predictions_only(tmp_path, draw):
    logits, labels = draw("plain")
    names = {number: f"a/b~{number} <i>" for number in range(8)}
    Predictions("validation", np.arange(300), labels, logits, names).save(tmp_path)
    report = build_report(tmp_path, ReportConfig())
    assert report.facts["run"] == {} and report.facts["history"] == []
    page = render_page(report)
    assert "a/b~3 &lt;i&gt;" in page and "<i>" not in page
    assert "Held out from training" not in page and "used to choose" not in page  # unknown


def test_folder_without_predictions_is_a_one_line_error(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "is not the folder of a run; pass the" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    assert main(["report", str(tmp_path)]) == 2
    assert "models are in its folders run; pass" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "run")]) == 2
    assert "no predictions in" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "missing")]) == 2
    assert main(["report"]) == 2
    assert main(["report", "--gallery_size", "-1", str(tmp_path)]) == 2


def test_intervals_are_reused_unless_metrics_have_changed(run, tmp_path, monkeypatch):
    draws = []

    def counted(*args, resamples=resampling.resamples):
        draws.append(args)
        return resamples(*args)

    monkeypatch.setattr(resampling, "resamples", counted)
    monkeypatch.setattr(intervals, "resamples", counted)
    folder = tmp_path / "again"
    shutil.copytree(run, folder)
    saved = json.loads((folder / "metrics.json").read_text())
    assert build_report(folder, ReportConfig()).facts["metrics"] == saved
    assert compare_runs([run, folder])["second"] == saved["test"]
    assert draws == []
    stale = saved | {"test": saved["test"] | {"accuracy": 0.0}}
    (folder / "metrics.json").write_text(json.dumps(stale))
    assert build_report(folder, ReportConfig()).facts["metrics"] == saved
    assert len(draws) == 3  # two calibration errors, and the means and areas, of test only
    (folder / "metrics.json").unlink()
    assert build_report(folder, ReportConfig()).facts["metrics"] == saved
    assert len(draws) == 9


def test_damaged_file_is_named(run, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(run, folder)
    (folder / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        build_report(folder, ReportConfig())


def test_places_in_the_report_are_json_pointers():
    facts = {"a/b": [{"c~d": 0.5}]}
    place = "/".join((pointer_key("a/b"), "0", pointer_key("c~d")))
    assert place == "a~1b/0/c~0d" and look_up(facts, place) == 0.5
    assert (render_value(0.5, "percent"), render_value(None, "percent")) == ("50.0%", "-")


def test_curves_show_the_logged_history():
    loss, accuracy, rate = training_curves(HISTORY)
    assert "train from 2 to 1; validation from 1.2 to 1.2" in loss
    assert "accuracy from 0.6 to 0.6" in accuracy
    assert "learning rate from 0.001 to 0.0005" in rate
    assert training_curves([]) == []


def test_a_race_is_a_line_for_each_rung():
    rungs = [
        {"steps": 20, "rates": [1e-4, 1e-3, 1e-2], "losses": [2.0, 1.5, None]},
        {"steps": 40, "rates": [1e-4, 1e-3], "losses": [1.8, 1.2]},
    ]
    (curve,) = race_curves({"rungs": rungs})
    assert "after 20 steps from 2 to 1.5; after 40 steps from 1.8 to 1.2" in curve
    assert race_curves(None) == []
    diverged = {"rungs": [{"steps": 20, "rates": [1.0], "losses": [None]}]}
    assert race_curves(diverged) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_page_opens_from_disk_and_fits_its_width(browser, run, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    requests, errors_shown = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: errors_shown.append(message.text))
    page.on("pageerror", lambda error: errors_shown.append(str(error)))
    page.goto(f"file://{run / 'report.html'}")
    assert [url for url in requests if not url.startswith("data:")] == [page.url]
    assert errors_shown == []
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert page.evaluate("document.images.length") >= 12
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    outside = page.evaluate(
        """width => [...document.querySelectorAll('body *')]
            .filter(e => !e.closest('.scroll') && !e.closest('svg') && !e.classList.contains('skip'))
            .filter(e => e.getBoundingClientRect().right > width + 0.5)
            .map(e => e.tagName + '.' + e.className)""",
        width,
    )
    assert outside == []
    page.close()


def test_every_number_on_the_page_is_from_the_report(browser, run, facts):
    page = browser.new_page()
    page.goto(f"file://{run / 'report.html'}")
    shown = page.eval_on_selector_all(
        "data", "all => all.map(d => [d.value, d.className, d.innerText])"
    )
    assert len(shown) > 150
    for place, form, text in shown:
        assert text == render_value(look_up(facts, place), form), place
    headline = page.inner_text(".headline .first dd")
    assert headline.startswith(f"{100 * facts['metrics']['test']['accuracy']:.1f}%")
    page.close()


def test_page_is_accessible_by_keyboard_and_screen_reader(browser, run):
    page = browser.new_page()
    page.goto(f"file://{run / 'report.html'}")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.eval_on_selector_all("img", "all => all.every(i => i.alt)")
    assert page.eval_on_selector_all("th", "all => all.every(t => t.scope)")
    assert page.eval_on_selector_all(
        ".scroll", "all => all.every(s => s.tabIndex == 0 && s.ariaLabel)"
    )
    assert page.eval_on_selector_all(
        "svg", "all => all.every(s => s.querySelector('title').textContent)"
    )
    levels = page.eval_on_selector_all("h1, h2, h3", "all => all.map(h => +h.tagName[1])")
    assert levels[0] == 1 and all(b - a <= 1 for a, b in itertools.pairwise(levels))
    ids = page.eval_on_selector_all("[id]", "all => all.map(e => e.id)")
    assert len(ids) == len(set(ids))
    for link in page.eval_on_selector_all("nav a", "all => all.map(a => a.hash.slice(1))"):
        assert link in ids
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(browser, run, scheme):
    """The contrast is at least 4.5 to 1, as required by WCAG 2.1 (1.4.3)."""
    page = browser.new_page(color_scheme=scheme)
    page.goto(f"file://{run / 'report.html'}")
    style = page.evaluate(
        """() => { const s = getComputedStyle(document.documentElement);
            return Object.fromEntries(['page', 'card', 'ink', 'soft', 'blue', 'red']
                .map(n => [n, s.getPropertyValue('--' + n).trim()])) }"""
    )

    def luminance(colour):
        channels = [int(c, 16) / 255 for c in re.findall("..", colour.lstrip("#"))]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return np.dot(linear, [0.2126, 0.7152, 0.0722])

    for text in ("ink", "soft", "blue", "red"):
        for behind in ("page", "card"):
            light, dark = sorted((luminance(style[text]), luminance(style[behind])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, behind)
    page.close()


def test_page_can_be_printed(browser, run, tmp_path):
    page = browser.new_page()
    page.goto(f"file://{run / 'report.html'}")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    pdf = page.pdf(path=str(tmp_path / "report.pdf"))
    assert (
        pdf.startswith(b"%PDF")
        and 2 <= pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") <= 20
    )
    page.close()

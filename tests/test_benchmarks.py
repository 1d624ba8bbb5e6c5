"""benchmarks/: every peer trains, and what was measured becomes a table."""

import json
import math

import pytest

from benchmarks import measure, table
from benchmarks.peers import (
    Task,
    ceiling,
    image_folder,
    ours,
    plain,
    small_pictures,
    timm_pattern,
)


@pytest.fixture
def results(tmp_path, monkeypatch):
    for module in (measure, table):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(table, "ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize(("unit", "ratio"), [("images/s", 2.0), ("s", 0.5)])
def test_ratios_are_of_interleaved_rounds(results, unit, ratio):
    order = []

    def variant(name, figures):
        iterator = iter(figures)
        return lambda: order.append(name) or next(iterator)

    measure.compare(
        "speed",
        {"ours": variant("ours", [20, 22, 90]), "plain": variant("plain", [10, 11, 30])},
        unit,
    )
    assert order == ["ours", "plain"] * 3
    (record,) = map(json.loads, (results / "results" / "cpu.jsonl").read_text().splitlines())
    assert record["ratios"]["plain"]["median"] == ratio
    assert record["figures"]["ours"] == {"median": 22, "low": 20, "high": 90}
    assert record["n"] == 3
    assert record["versions"]["torch"]


def test_the_table_holds_the_newest_of_each(results):
    for figure in (10.0, 30.0):
        measure.compare("speed", {"ours": lambda f=figure: f, "plain": lambda: 10.0}, rounds=1)
    table.main()
    page = (results / "docs" / "benchmarks.md").read_text()
    assert "| speed | plain | 10 (10-10) images/s | 3 (3-3) |" in page
    assert page.count("| speed | ours |") == 1


def test_every_peer_trains(tmp_path):
    task = Task("scratch/article_cnn", 32, 8, 2, str(small_pictures(tmp_path / "data", 120)))
    run, setting = ours(task)
    images = image_folder(task, tmp_path / "images")
    peers = [run, plain(task, use_cpu=True), ceiling(task, setting), timm_pattern(task, images, 0)]
    for peer in peers:
        assert 0 < peer() < math.inf

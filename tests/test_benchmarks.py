"""benchmarks/: every peer trains, and measurements become a table."""

import dataclasses
import functools
import json
import time

import numpy as np
import psutil
import pytest
import torch
from tiny import tiny_run

from benchmarks import (
    accuracy,
    batch_prediction,
    checkpoint,
    correctness,
    exported,
    gpu,
    measure,
    noise,
    race,
    reject,
    scaling,
    serving,
    split_cifar,
    studies,
    table,
)
from benchmarks.peers import (
    WARM_UP,
    Task,
    chosen_setting,
    image_folder,
    small_pictures,
    train_as,
)
from benchmarks.turns import CONTEXT, workers

pytestmark = pytest.mark.slow  # each starts processes that compute
CONTEXT.set_forkserver_preload(["benchmarks.peers", "benchmarks.serving"])  # imported once for all


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

    def variant(name, values):
        iterator = iter(values)
        return lambda: order.append(name) or next(iterator)

    measure.compare(
        "speed",
        {"ours": variant("ours", [20, 22, 90]), "plain": variant("plain", [10, 11, 30])},
        unit,
    )
    assert order == [
        "ours",
        "plain",
        "plain",
        "ours",
        "ours",
        "plain",
    ]  # each round starts with another one
    (record,) = map(json.loads, (results / "results" / "cpu.jsonl").read_text().splitlines())
    assert record["ratios"]["plain"]["median"] == ratio
    assert record["figures"]["ours"] == {"median": 22, "low": 20, "high": 90}
    assert record["n"] == 3
    assert record["versions"]["torch"]


def test_the_table_has_the_newest_record_of_each_benchmark(results):
    for value in (10.0, 30.0):
        measure.compare("speed", {"ours": lambda v=value: v, "plain": lambda: 10.0}, rounds=1)
    (results / "docs" / "techniques.md").write_text("# Techniques\n")
    table.main()
    page = (results / "docs" / "benchmarks.md").read_text()
    assert "| speed | plain | 10 (10-10) images/s | 3 (3-3) | 1 |" in page
    assert page.count("| speed | ours |") == 1


def test_the_tables_of_techniques_are_written_again():
    values = {"none": [0.5, 0.52], "warm-up": [0.6, 0.62]}
    record = {
        "benchmark": "schedule, article_cnn", "unit": "accuracy", "n": 2, "values": values,
        "device": "NVIDIA H200",
        "differences": {"warm-up": {"mean": 0.1, "interval": [0.05, 0.15]}},
    }  # fmt: skip
    page = "text\n\n<!-- measured: schedule -->\n\n| old | table |\n| --- | --- |\n\nmore text\n"
    written = table.techniques_page(page, [record])
    assert written == (
        "text\n\n<!-- measured: schedule -->\n\n"
        "| accuracy on test | article_cnn, n = 2, NVIDIA H200 |\n| --- | --- |\n"
        "| none | 0.5100 ± 0.0141 |\n| warm-up | 0.6100 ± 0.0141, +0.1000 (+0.0500 to +0.1500) |\n\n"
        "more text\n"
    )
    assert table.techniques_page(written, [record]) == written
    missing = table.techniques_page(page, [])
    assert missing == "text\n\n<!-- measured: schedule -->\n\nNot measured yet.\n\nmore text\n"
    assert table.techniques_page(missing, [record]) == written


def test_what_is_rejected_becomes_a_table(results, stripes, tiny_vit, monkeypatch):
    for name in ("NOISE_IMAGES", "DIGITS", "MOST_TILES"):
        monkeypatch.setattr(reject, name, 6)
    tiny_run(results / "run", stripes, tiny_vit, "--train_val_split", "0.3", "--reject")
    reject.compare("tiny", [results / "run"])
    (record,) = map(json.loads, (results / "results" / "cpu.jsonl").read_text().splitlines())
    rules = record["runs"][0]
    assert set(rules) == {"confidence alone", "distance alone", "both"}
    for found in rules.values():
        assert found["test images kept"]["num_images"] == 22
        assert found["photographs rejected"]["num_pictures"] == len(found["by picture"]) == 16
        low, high = found["digits rejected"]["interval"]
        assert 0 <= low <= found["digits rejected"]["share"] <= high <= 1
    page = table.techniques_page("<!-- measured: reject -->\n\nNot measured yet.\n", [record])
    assert "| share of images | tiny, n = 1 |" in page and "| both: digits rejected | " in page


def test_what_becomes_of_several_runs_becomes_a_table(results, stripes, tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "RUNS", 2)
    monkeypatch.setattr(studies, "FOLDS", 2)
    options = {
        "dataset_name": stripes, "model_name_or_path": "scratch/article_cnn", "num_train_epochs": 1,
        "use_cpu": "true",
    }  # fmt: skip
    together = studies.combine(options, 0, tmp_path / "combine")
    folds = studies.kfold(options, 0, tmp_path / "kfold")
    teacher = str(tmp_path / "kfold" / "fold-1")
    taught = studies.distil(options, 0, tmp_path / "distil", teacher)
    assert len(together) == 8 and len(folds) == 5
    assert list(taught) == ["alone", "teacher", "teacher, temperature 4", "teacher, feature hint"]
    assert all(0 <= value <= 1 for found in (together, folds, taught) for value in found.values())
    studies.record("kfold, tiny", {name: [v, v + 0.1] for name, v in folds.items()}, None)
    (record,) = map(json.loads, (results / "results" / "cpu.jsonl").read_text().splitlines())
    page = table.techniques_page("<!-- measured: kfold -->\n\nNot measured yet.\n", [record])
    assert "| accuracy on test | tiny, n = 2 |" in page and "| student of the ensemble | " in page


def test_the_table_of_races_compares_the_picks_with_the_best_run():
    record = {
        "benchmark": "race: article_cnn, digits", "picks": {"default": 0.01, "race": 0.02},
        "sweep": {"0.01": {"test": 0.6}, "0.1": {"test": 0.9}}, "best": {"test": 0.9},
        "loss": {"default": {"test": 0.3}, "race": {"test": -0.02}},
    }  # fmt: skip
    page = "<!-- measured: race -->\n\nNot measured yet.\n"
    assert table.techniques_page(page, [record]) == (
        "<!-- measured: race -->\n\n| accuracy on test | best of the sweep | default | race |\n"
        "| --- | --- | --- | --- |\n"
        "| article_cnn, digits | 0.9000 at 0.1 | 0.6000 at 0.01 | 0.9200 at 0.02 |\n"
    )
    assert table.techniques_page(page, []) == page


def test_a_range_test_suggests_the_steepest_descent_and_a_tenth_of_the_minimum():
    """The loss falls most steeply at 1e-3, and has its minimum at about 1e-2; smoothing delays both."""
    rates = np.geomspace(1e-6, 1, 600)
    x = np.log10(rates)
    losses = 2 - 1 / (1 + np.exp(-6 * (x + 3))) + np.maximum(0, x + 2) ** 2
    found = race.suggestions(rates, losses)
    assert 1e-3 <= found["range test, steepest"] <= 1.5e-3
    assert 1e-3 <= found["range test, minimum / 10"] <= 1.5e-3


def test_every_way_to_serve_gives_the_same_labels(tmp_path, stripes, tiny_vit):
    tiny_run(tmp_path / "run", stripes, tiny_vit, "--probe_images", "0")
    speeds, same = exported.compare_served(
        str(tmp_path / "run"), str(stripes / "test"), rounds=1, folder=tmp_path / "results"
    )
    assert len(speeds) == 5
    assert same == {"predict, torch": 1.0, "pipeline": 1.0}


def test_servers_are_compared_under_load(tmp_path, stripes, tiny_vit):
    tiny_run(tmp_path / "run", stripes, tiny_vit, "--probe_images", "0")
    rates = serving.compare_servers(
        str(tmp_path / "run"),
        str(stripes / "test"),
        rounds=1,
        seconds=0.3,
        limit=1,
        folder=tmp_path,
    )
    assert {"hf-cifar serve, ONNX", "hf-cifar serve, run", "FastAPI, pipeline"} <= set(rates)
    assert all(rate > 0 for (rate,) in rates.values())


def test_two_processes_predict_what_one_does(tmp_path, stripes, tiny_vit):
    tiny_run(tmp_path / "run", stripes, tiny_vit, "--probe_images", "0")
    speeds = batch_prediction.compare_processes(
        str(tmp_path / "run"), str(stripes), 102, rounds=1, folder=tmp_path / "results"
    )
    assert list(speeds) == ["2 processes", "1 process"]


def test_every_peer_trains(tmp_path):
    data = str(small_pictures(tmp_path / "data", 120))
    task = Task(
        "scratch/article_cnn", 32, 8, dataset_name=data, num_steps=WARM_UP + 2,
        images=str(image_folder(data, tmp_path / "images")),
    )  # fmt: skip
    task = dataclasses.replace(task, setting=chosen_setting(task))
    assert task.setting.precision in ("fp32", "bf16")
    for peer in ("ours", "ceiling", "plain", "timm"):
        steps = []
        train_as(peer, task, lambda steps=steps: steps.append(None))
        assert len(steps) == WARM_UP + 2, peer


def sleepy(seconds, turn):
    """Work in steps of a fixed duration."""
    while True:
        time.sleep(seconds)
        turn()


def fails(turn):
    turn()
    raise ValueError("after a step")


def wait_until_stopped(process):
    deadline = time.monotonic() + 20  # a signal takes a moment to arrive on a busy machine
    while process.status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline, f"process {process.pid} is {process.status()}"
        time.sleep(0.01)


def test_processes_work_only_during_their_turns(tmp_path):
    works = {n: functools.partial(sleepy, n) for n in (0.01, 0.04)}
    with workers(works, warm_up=2, seconds=0.2) as started:
        pids = [worker._process.pid for worker in started.values()]
        for seconds, worker in started.items():
            wait_until_stopped(psutil.Process(worker._process.pid))
            assert 0 < worker.turn() <= 1 / seconds
            assert worker.peak_mb > 10
    assert not any(map(psutil.pid_exists, pids))
    with (
        pytest.raises(SystemExit, match="ended before its turns did"),
        workers({"a": fails}, 2, 0.2),
    ):
        pass


@pytest.mark.slow
def test_time_to_accuracy_of_complete_commands(results, stripes, monkeypatch):
    arguments = [
        "accuracy", "--model_name_or_path", "scratch/article_cnn", "--dataset_name", str(stripes),
        "--image_size", "32", "--target", "0.4", "--epochs", "1", "--plain_epochs", "1",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", arguments)
    accuracy.main()
    (record,) = map(json.loads, (results / "results" / "cpu.jsonl").read_text().splitlines())
    runs = record["runs"]
    assert set(runs) == {"ours", "plain"}
    assert all(run["accuracy"] > 0.2 and run["epochs"] >= 1 for run in runs.values())
    ratio = runs["plain"]["seconds"] / runs["ours"]["seconds"]
    assert record["ratios"]["plain"]["median"] == pytest.approx(ratio, rel=0.01)
    monkeypatch.setattr("sys.argv", [*arguments, "--target", "1.1", "--max_epochs", "1"])
    with pytest.raises(SystemExit, match=r"ours does not reach 1\.1 in 1 epochs"):
        accuracy.main()


@pytest.mark.slow
def test_the_gpu_benchmark_in_tiny_form(tmp_path, monkeypatch, capsys):
    only = "correctness: [tr]|training article_cnn|fine-tuning"
    monkeypatch.setattr("sys.argv", ["gpu", "--tiny", "--output", str(tmp_path), "--only", only])
    gpu.main()
    output = capsys.readouterr().out
    (path,) = tmp_path.glob("*.jsonl")
    records = {record["benchmark"]: record for record in map(json.loads, path.open())}
    checks = [record for name, record in records.items() if name.startswith("correctness")]
    assert len(checks) == 2 and all(record["passed"] for record in checks)
    training = records["training article_cnn"]
    assert set(training["ratios"]) == {"ceiling", "plain"}
    assert set(training["peak_mb"]) == {"ours", "ceiling", "plain"}
    assert training["flops_per_image"] > 1e4
    assert "| training article_cnn |" in output
    assert 0 <= records["fine-tuning efficientnet_lite0, complete command"]["accuracy"] <= 1


def test_the_gpu_benchmark_needs_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_:
        gpu.main()
    assert exit_.value.code == 2
    assert "there is no GPU" in capsys.readouterr().err


def test_a_failed_check_fails_its_part(tmp_path):
    bench = gpu.Bench(tmp_path, True, "", "", 1, "")
    bad = [correctness.Check("a", 0.1, 1.0), correctness.Check("b", float("nan"), 1.0)]
    with pytest.raises(AssertionError, match="1 of 2 checks failed"):
        gpu.check("some", lambda _: iter(bad))(bench)
    (record,) = map(json.loads, next(tmp_path.glob("*.jsonl")).open())
    assert not record["passed"]
    assert "| correctness: some | all checks | 1 of 2 passed |  | 1 |" in table.table([record])
    assert bench.rows[0][0] == "b"


def test_an_unreached_accuracy_is_reported():
    short, enough = (
        accuracy.reach("a run", lambda epochs: [0.2 * epochs, 0.9], target, 1, 3)
        for target in (0.9, 0.4)
    )
    assert (short["epochs"], enough["epochs"]) == (3, 2)
    found = accuracy.record({**enough, "seconds": 2}, {**short, "seconds": 8}, 0.4)
    assert found["ratios"]["plain"]["median"] == 4
    found = accuracy.record({**short, "seconds": 2}, {**enough, "seconds": 8}, 0.5)
    assert found["ratios"]["plain, at 0.4000 after 2 epochs"]["median"] == 4


@pytest.mark.slow
def test_peak_memory_of_complete_commands(tmp_path, monkeypatch):
    data = str(small_pictures(tmp_path / "data", 100))
    monkeypatch.setattr(scaling, "MODEL", "scratch/article_cnn")
    monkeypatch.setattr(scaling, "MEMORY_STEPS", "2")
    assert 100 < scaling.ours_memory(data) < 20_000
    assert 100 < scaling.plain_memory(data) < 20_000


def test_both_kinds_of_checkpoints_are_saved(results, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["checkpoint", "--model", "scratch/article_cnn", "--rounds", "1"]
    )
    checkpoint.main()
    (record,) = map(json.loads, (results / "results" / "cpu.jsonl").read_text().splitlines())
    assert record["unit"] == "s"
    assert set(record["figures"]) == {
        "ours", "ours, until complete", "stock Trainer", "stock Trainer, flushed",
    }  # fmt: skip
    assert all(value["median"] > 0 for value in record["figures"].values())


def test_noise_is_planted_in_train_and_validation_only(stripes):
    clean = noise.open_splits(str(stripes), 60)
    data, wrong = noise.versions(clean, seed=1)
    assert len(wrong) == 12
    labels = {name: np.array(each["train"]["label"]) for name, each in data.items()}
    noisy = labels["noisy labels"]
    assert np.flatnonzero(labels["clean labels"] != noisy).tolist() == wrong.tolist()
    assert np.array_equal(labels["--clean_labels drop"], noisy)
    kept = np.setdiff1d(np.arange(60), wrong)
    assert np.array_equal(labels["wrong labels known, left out"], labels["clean labels"][kept])
    for name, each in data.items():
        assert each["test"]["label"] == clean["test"]["label"]
        changed = np.array(each["validation"]["label"]) != np.array(clean["validation"]["label"])
        assert changed.sum() == (0 if name == "clean labels" else round(0.2 * len(changed)))
    assert not np.array_equal(noise.versions(clean, seed=2)[1], wrong)


def test_the_share_of_the_loss_that_is_recovered(results, monkeypatch):
    seeds = iter(
        [dict(zip((*noise.VARIANTS, "precision", "recall"), each, strict=True)) for each in (
            (0.8, 0.6, 0.7, 0.78, 0.9, 0.8), (0.82, 0.62, 0.74, 0.8, 0.7, 0.8),
        )]
    )  # fmt: skip
    monkeypatch.setattr(noise, "measure_seed", lambda *arguments: next(seeds))
    noise.compare({"train": range(5)}, "article_cnn", 2)
    (record,) = map(json.loads, (results / "results" / "cpu.jsonl").read_text().splitlines())
    assert record["recovered"]["--clean_labels drop"] == 0.55
    assert record["differences"]["--clean_labels drop"]["mean"] == 0.11
    assert record["doubted"] == {"precision": [0.9, 0.7], "recall": [0.8, 0.8]}


def test_the_noise_benchmark_trains_every_variant(results, stripes, monkeypatch):
    options = {"model_name_or_path": "scratch/article_cnn", "image_size": 32, "num_train_epochs": 2}
    monkeypatch.setitem(noise.MODELS, "tiny", {**options, "precision": "fp32"})
    found = noise.measure_seed(noise.open_splits(str(stripes), None), "tiny", 0)
    assert found.keys() == {*noise.VARIANTS, "precision", "recall"}
    assert all(0 <= value <= 1 for value in found.values())


def test_the_loss_of_der_plus_plus_and_its_reservoir():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    labels = torch.tensor([0, 1])
    first = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.0, 1.0]])
    second = torch.tensor([[0.0, 3.0]]), torch.tensor([0])
    found = split_cifar.der_plus_plus_loss(logits, labels, first, second, 0.2, 0.5)
    own = (np.log1p(np.exp(-2)) + np.log1p(np.exp(-1))) / 2
    expected = own + 0.2 * (1 + 4) / 2 + 0.5 * np.log1p(np.exp(3))
    assert found.item() == pytest.approx(expected, abs=1e-6)

    counts = np.zeros(50)
    for seed in range(400):
        reservoir = split_cifar.Reservoir(10, seed)
        for start in range(0, 50, 5):
            rows = torch.arange(start, start + 5)
            reservoir.add(rows, rows, rows[:, None].float())
        images, kept, stored = reservoir.draw(10)
        assert torch.equal(images, kept) and torch.equal(stored[:, 0].long(), kept)
        counts[kept.numpy()] += 1
    # Each row is kept with probability 10 / 50: 80 times, with a standard deviation of 8.
    assert np.abs(counts - 80).max() < 32


def test_updates_become_a_table():
    runs = [
        {"500 stored": {"lost": lost, "old": 0.8, "new": 0.7, "all": 0.75}} for lost in (0.01, 0.03)
    ]
    record = {
        "benchmark": "update, two classes after eight", "n": 2, "runs": runs,
        "figures": {"500 stored": {}},
    }  # fmt: skip
    assert "| 500 stored | 0.0200 ± 0.0141 | 0.8000 ± 0.0000 |" in table.updates([record])
    one = record | {"n": 1, "runs": record["runs"][:1]}
    assert "| 500 stored | 0.0100 | 0.8000 |" in table.updates([one])
    assert table.updates([]) == table.MISSING

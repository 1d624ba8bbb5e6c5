"""Training curves: in run.json, in TensorBoard and in trackio."""

import json
import math
import shutil
import sys

import pytest
from tiny import tiny_run

from hf_cifar import UserError
from hf_cifar.record import plain_history


def run(folder, data, model, *flags):
    return tiny_run(folder, data, model, "--logging_steps", "3", "--do_predict", *flags)


def history_of(folder):
    return json.loads((folder / "run.json").read_text())["history"]


def column(history, key):
    """Return {step: value} of the records that have the key."""
    return {record["step"]: record[key] for record in history if key in record}


@pytest.fixture(scope="module")
def tracked(tmp_path_factory, stripes, tiny_vit):
    folder = tmp_path_factory.mktemp("tracked") / "run"
    run(folder, stripes, tiny_vit, "--report_to", "tensorboard")
    return folder


def test_the_history_is_in_run_json(tracked):
    history = history_of(tracked)
    steps = [3, 6, 9, 12, 15, 18]
    for key in ("loss", "learning_rate", "grad_norm"):
        assert list(column(history, key)) == steps
    assert column(history, "epoch")[18] == 2
    assert list(column(history, "eval_accuracy")) == [9, 18]
    assert "train_runtime" in history[-1]


def test_the_history_of_a_resumed_run_is_complete(tracked, tmp_path, stripes, tiny_vit):
    folder = tmp_path / "again"
    shutil.copytree(tracked, folder)
    for path in (folder / "checkpoint-18", folder / "runs"):
        shutil.rmtree(path)
    for name in ("run.json", "metrics.json", "model.safetensors"):
        (folder / name).unlink()
    run(folder, stripes, tiny_vit, "--resume_from_checkpoint", "last")
    uninterrupted, resumed = history_of(tracked), history_of(folder)
    for key in ("loss", "learning_rate", "grad_norm", "eval_accuracy", "eval_cross_entropy"):
        assert column(resumed, key) == column(uninterrupted, key)


def test_values_that_are_not_finite_become_null():
    history = [{"grad_norm": math.inf, "loss": 1.5, "step": 1}]
    assert plain_history(history) == [{"grad_norm": None, "loss": 1.5, "step": 1}]


def test_tensorboard_reads_the_curves(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = (tracked / "runs").rglob("events.*")
    events = EventAccumulator(str(file)).Reload()
    history = history_of(tracked)
    for tag, key in {
        "train/loss": "loss",
        "train/learning_rate": "learning_rate",
        "train/grad_norm": "grad_norm",
        "eval/accuracy": "eval_accuracy",
        "eval/cross_entropy": "eval_cross_entropy",
    }.items():
        drawn = {event.step: event.value for event in events.Scalars(tag)}
        assert drawn == pytest.approx(column(history, key), rel=1e-6)
    assert not any(tag.startswith("test/") for tag in events.Tags()["scalars"])


def test_trackio_keeps_the_curves_on_this_machine(tmp_path, stripes, tiny_vit, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    trackio = pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    folder = tmp_path / "run"
    run(folder, stripes, tiny_vit, "--report_to", "trackio", "--project", "stripes")
    assert SQLiteStorage.get_runs("stripes") == [str(folder)]
    records = SQLiteStorage.get_logs("stripes", str(folder))
    history = history_of(folder)
    for name, key in {"train/loss": "loss", "eval/accuracy": "eval_accuracy"}.items():
        drawn = {r["train/global_step"]: r[name] for r in records if name in r}
        assert drawn == pytest.approx(column(history, key))
    # The final predictions would open it again, and record those of validation as test.
    assert trackio.context_vars.current_run.get() is None


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio"])
def test_a_tracker_that_is_not_installed_names_the_extra(
    tracker, tmp_path, stripes, tiny_vit, monkeypatch
):
    monkeypatch.setitem(sys.modules, tracker, None)
    message = rf"{tracker} is not installed; run: pip install 'hf-cifar\[track\]'"
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", stripes, tiny_vit, "--report_to", tracker)
    assert not (tmp_path / "run").exists()

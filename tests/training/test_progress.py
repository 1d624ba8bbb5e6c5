"""hf_cifar.training.progress: the line of an evaluation, and the end of diverging training."""

import math
from types import SimpleNamespace

import pytest

from hf_cifar.config.metrics import metrics_of, words
from hf_cifar.errors import UserError
from hf_cifar.training.progress import StopAtNaN, TrainingLines, evaluation_line

ARGS = SimpleNamespace(learning_rate=0.1, metric_for_best_model=None)


def state(step=5):
    return SimpleNamespace(global_step=step, max_steps=10, is_world_process_zero=True)


def test_the_line_of_single_label_metrics():
    logs = {"eval_accuracy": 0.5, "eval_cross_entropy": 1.25, "eval_loss": 9.0, "epoch": 2.0}
    line = "epoch 2.00: validation accuracy 0.5000, cross-entropy 1.2500"
    assert evaluation_line(2.0, logs, "accuracy") == line
    logs["eval_balanced_accuracy"] = 0.25
    assert evaluation_line(2.0, logs, None) == line
    assert (
        evaluation_line(2.0, logs, "eval_balanced_accuracy") == line + ", balanced accuracy 0.2500"
    )


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_line_shows_the_metrics_of_the_table(multi_label):
    names = metrics_of(multi_label=multi_label, place="training")
    line = evaluation_line(None, {f"eval_{name}": 0.25 for name in names}, None)
    assert line == "epoch 0.00: validation " + ", ".join(f"{words(name)} 0.2500" for name in names)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_nan_validation_loss_ends_training(value):
    with pytest.raises(UserError, match=r"eval_cross_entropy is (nan|inf) at step 5; .* than 0\.1"):
        StopAtNaN().on_log(ARGS, state(), None, logs={"eval_cross_entropy": value})
    StopAtNaN().on_log(ARGS, state(), None, logs={"eval_cross_entropy": 1.0})
    StopAtNaN().on_log(ARGS, state(), None, logs={"loss": value})


def test_requested_lines_stay_lines_on_a_terminal(monkeypatch):
    monkeypatch.setattr("hf_cifar.progress.shows_bars", lambda: True)
    lines = TrainingLines()
    lines.on_train_begin(ARGS, state(), None)
    assert lines._shown._bar is None


def test_lines_for_logs_and_pipes(capsys):
    lines = TrainingLines()
    lines.on_log(ARGS, state(), None, logs={"loss": 0.5, "learning_rate": 1e-3})
    lines.on_log(ARGS, state(), None, logs={"eval_accuracy": 0.5, "epoch": 1.0})
    lines.on_train_begin(ARGS, state(), None)
    lines.on_train_begin(ARGS, state(step=10), None)
    assert capsys.readouterr().out.splitlines() == [
        "step 5/10: loss 0.500, learning rate 1.0e-03",
        "epoch 1.00: validation accuracy 0.5000",
        "all 10 steps are done; raise --num_train_epochs to train longer",
    ]

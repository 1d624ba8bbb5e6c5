"""Studies of many runs, of whose processes one is killed: the others take over its runs."""

import json
import os
import random
import signal
import time

import pytest
from faults.rig import digest, ended, in_child, start
from tiny import tiny_config, tiny_run

from hf_cifar.config.studies import SearchConfig, UpdateConfig
from hf_cifar.evaluation.predictions import Predictions
from hf_cifar.runs.folder import RunFolder
from hf_cifar.studies.kfold import cross_validate
from hf_cifar.studies.optuna_study import open_study
from hf_cifar.studies.search import run_search
from hf_cifar.studies.update import update_run
from hf_cifar.studies.update_options import config_of_update

FOLDS = 4


@pytest.fixture(scope="module")
def validates(stripes, tiny_vit):
    """A function (folder) -> function that cross-validates into it, as a process does."""
    flags = (
        "--save_strategy",
        "steps",
        "--save_steps",
        "3",
        "--calibrate",
        "false",
        "--precision",
        "fp32",
    )
    return lambda folder: (
        lambda: cross_validate(tiny_config(folder, stripes, tiny_vit, *flags), FOLDS) and None
    )


@pytest.fixture(scope="module")
def undisturbed(validates, tmp_path_factory):
    """The weights of all folds, their predictions, and the seconds that one process took."""
    folder = tmp_path_factory.mktemp("undisturbed") / "study"
    began = time.monotonic()
    assert in_child(validates(folder)) == 0
    return results_of(folder), time.monotonic() - began


def results_of(folder):
    """The weights of each fold, and the predictions out of fold as bytes."""
    weights = [digest(folder / f"fold-{n}" / "model.safetensors") for n in range(1, FOLDS + 1)]
    pooled = Predictions.load(folder, "out_of_fold")
    return weights, pooled.row_ids.tobytes(), pooled.logits.tobytes()


def test_kill_of_one_of_two_processes_at_random_times(
    validates, undisturbed, tmp_path, record_result
):
    expected, seconds = undisturbed
    draw, good = random.Random(0), 0
    for number in range(10):
        folder = tmp_path / str(number)
        pair = [start(validates(folder), tmp_path / f"{number}-{n}.log") for n in range(2)]
        time.sleep(draw.uniform(0.1, 0.9) * seconds)
        os.kill(pair[0], signal.SIGKILL)
        first, second = map(ended, pair)
        good += (first in (0, -signal.SIGKILL), second) == (True, 0) and results_of(
            folder
        ) == expected
    record_result(
        "-",
        "kill -9 of one of two processes of `kfold`, at random times",
        "the other one finishes all folds; the same weights and predictions, to the bit",
        good,
        10,
    )


def test_kill_of_both_processes(validates, undisturbed, tmp_path, record_result):
    expected, seconds = undisturbed
    draw, good = random.Random(1), 0
    for number in range(5):
        folder = tmp_path / str(number)
        for _ in range(2):
            pair = [start(validates(folder)) for _ in range(2)]
            time.sleep(draw.uniform(0.1, 0.7) * seconds)
            for pid in pair:
                os.kill(pid, signal.SIGKILL)
            [ended(pid) for pid in pair]
        good += in_child(validates(folder)) == 0 and results_of(folder) == expected
    record_result(
        "-",
        "kill -9 of both processes of `kfold`, two times in a row",
        "the same command continues; the same weights and predictions, to the bit",
        good,
        5,
    )


TRIALS = 24


@pytest.fixture(scope="module")
def searches(stripes, tiny_vit):
    """A function (folder) -> function that searches in it, as a process does; a trial takes a third of a
    second."""
    flags = (
        "--max_steps", "8", "--save_strategy", "steps", "--save_steps", "2", "--calibrate", "false",
        "--probe_images", "0", "--precision", "fp32",
    )  # fmt: skip
    options = SearchConfig(n_trials=TRIALS)
    return lambda folder: (
        lambda: run_search(tiny_config(folder, stripes, tiny_vit, *flags), options) and None
    )


def state_of(folder):
    """The trials by state in the journal, the trials with a result in their folders, and the weights of the
    winner."""
    trials = open_study(folder, None, RunFolder(folder).study()["name"], "maximize").trials
    in_storage = {trial.number: trial.value for trial in trials if trial.state.name == "COMPLETE"}
    in_folders = {
        facts["number"]: facts["value"]
        for path in folder.glob("trial-*")
        if (facts := RunFolder(path).trial())["state"] == "complete"
    }
    states = {trial.state.name for trial in trials}
    return trials, states, in_storage, in_folders


def longest_wait(folder, killed):
    """The longest time in seconds, after a moment, in which the surviving process worked on no trial."""
    trials = [RunFolder(path).trial() for path in folder.glob("trial-*")]
    spans = sorted((each["started"], each["finished"]) for each in trials)
    last = (folder / "best" / "config.yaml").stat().st_mtime
    waits, ended = [], killed
    for began, finished in [*spans, (last, last)]:
        if finished > killed:
            waits.append(began - ended)
            ended = max(ended, finished)
    return max(waits, default=0.0)


def test_search_kill_of_one_of_two_processes(searches, tmp_path, record_result):
    began = time.monotonic()
    assert in_child(searches(tmp_path / "alone")) == 0
    seconds = time.monotonic() - began
    draw, good, waits = random.Random(2), 0, []
    for number in range(20):
        folder = tmp_path / str(number)
        pair = [start(searches(folder), tmp_path / f"{number}-{n}.log") for n in range(2)]
        time.sleep(draw.uniform(0.05, 0.45) * seconds)
        before = state_of(folder)[3] if (folder / "study.json").exists() else {}
        killed = time.time()
        os.kill(pair[0], signal.SIGKILL)
        first, second = map(ended, pair)
        trials, states, in_storage, in_folders = state_of(folder)
        waits.append(longest_wait(folder, killed))
        good += (
            (first in (0, -signal.SIGKILL), second) == (True, 0)
            and len(trials) == TRIALS
            and states <= {"COMPLETE", "PRUNED"}
            and in_storage == in_folders
            and before.items() <= in_folders.items()
            and len({str(trial.params) for trial in trials}) == TRIALS
            and (folder / "best" / "run.json").is_file()
            and waits[-1] < 5
        )
    record_result(
        "-",
        "kill -9 of one of two processes of `search`, 24 trials, at random times",
        "no finished trial is lost or duplicated, and none is left running; the other process waits less "
        f"than 5 s (measured: {max(waits):.1f})",
        good,
        20,
    )


def test_kill_of_an_update(stripes, tiny_vit, colours, tmp_path_factory, tmp_path, record_result):
    run = tmp_path_factory.mktemp("old") / "run"
    tiny_run(run, stripes, tiny_vit, "--num_train_epochs", "1")
    flags = ["--save_strategy", "steps", "--save_steps", "3", "--calibrate", "false"]

    def updates(folder):
        given = ["--dataset_name", str(colours), "--output_dir", str(folder), *flags]
        own = UpdateConfig(replay=20, compare_anew=True)
        config = config_of_update(RunFolder(run), [*given, "--precision", "fp32"])
        return lambda: update_run(run, config, own) and None

    def results(folder):
        runs = [folder, folder / "anew"]
        shown = json.loads(RunFolder(folder).update_path.read_text())
        shown.pop("seconds")
        return [digest(each / "model.safetensors") for each in runs], shown["splits"]

    began = time.monotonic()
    assert in_child(updates(tmp_path / "whole")) == 0
    seconds, expected = time.monotonic() - began, results(tmp_path / "whole")
    draw, good = random.Random(2), 0
    for number in range(10):
        folder = tmp_path / str(number)
        pid = start(updates(folder))
        time.sleep(draw.uniform(0.1, 0.9) * seconds)
        os.kill(pid, signal.SIGKILL)
        ended(pid)
        good += in_child(updates(folder)) == 0 and results(folder) == expected
    record_result(
        "-",
        "kill -9 of `update --compare_anew`, at random times",
        "the same command continues; the same weights and accuracies, to the bit",
        good,
        10,
    )

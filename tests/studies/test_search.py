"""hf_cifar.studies.search: trials as runs, proposed by optuna, and the winner trained again."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import optuna
import pytest
from command_lines import run_commands
from tiny import tiny_options

from hf_cifar import RunConfig, UserError, finetune_classifier
from hf_cifar.cli import main
from hf_cifar.config.space import Choices, Range, space_of
from hf_cifar.config.studies import SearchConfig
from hf_cifar.data.splits import DataSource
from hf_cifar.report.search import render_summary
from hf_cifar.runs.folder import RunFolder, write_json
from hf_cifar.runs.listing import list_runs
from hf_cifar.runs.lock import claimed_run
from hf_cifar.studies.optuna_study import (
    JournalLock,
    add_trial,
    ask,
    build_sampler,
    distributions_of,
    grid_of,
    open_study,
)
from hf_cifar.studies.search import run_search
from hf_cifar.studies.search_plan import Search, join
from hf_cifar.studies.trials import begin_trial, run_trial
from hf_cifar.studies.workers import best_trial, best_trials, next_trial

SPACE = "learning_rate: {low: 1e-4, high: 2e-2, log: true}\nlr_scheduler_type: [linear, cosine]\n"


def argv_of(folder, data, model, *flags):
    return tiny_options(
        folder, data, model, "--precision", "fp32", "--probe_images", "0", "--num_train_epochs", "1", *flags,
    )  # fmt: skip


def config(*args):
    return RunConfig.parse(argv_of(*args))


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def proposals(summary):
    return [trial["parameters"] for trial in summary["trials"]]


def opened(folder, url=None):
    return open_study(folder, url, RunFolder(folder).study()["name"], "maximize")


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    path = tmp_path_factory.mktemp("space") / "space.yaml"
    path.write_text(SPACE)
    return str(path)


@pytest.fixture(scope="module")
def study(tmp_path_factory, stripes, tiny_vit, space):
    folder = tmp_path_factory.mktemp("search") / "study"
    argv = argv_of(folder, stripes, tiny_vit, "--do_predict", "--check_leakage")
    assert main(["search", "--n_trials", "5", "--space", space, *argv]) == 0
    return folder


def test_a_trial_is_the_single_run_with_its_options(study, tmp_path, stripes, tiny_vit):
    trial = RunFolder(study / "trial-2").trial()
    flags = [f"--{name}={value}" for name, value in trial["parameters"].items()]
    finetune_classifier(config(tmp_path / "run", stripes, tiny_vit, *flags))
    assert weights(study / "trial-2") == weights(tmp_path / "run")
    assert trial["value"] == RunFolder(study / "trial-2").metrics()["validation"]["accuracy"]
    assert list(trial["evaluations"]) == ["100"]


def test_only_the_winner_reads_test(study):
    for number in range(5):
        folder = RunFolder(study / f"trial-{number}")
        assert list(folder.metrics()) == ["validation"]
        options = folder.options()
        assert not options["do_predict"] and not options["check_leakage"]
        assert not folder.checkpoints()
    assert list(RunFolder(study / "best").metrics()) == ["validation", "test"]


def test_the_winner_is_the_best_trial_and_its_recipe_is_that_run(study, tmp_path):
    summary = json.loads((study / "search.json").read_text())
    number = summary["best"]["number"]
    values = [trial["value"] for trial in summary["trials"]]
    tied = [trial for trial, value in enumerate(values) if value == max(values)]
    metrics = [RunFolder(study / f"trial-{k}").metrics()["validation"] for k in tied]
    entropies = [found["cross_entropy"] for found in metrics]
    assert number == tied[entropies.index(min(entropies))]
    assert weights(study / "best") == weights(study / f"trial-{number}")
    argv = ["--config", str(study / "best.yaml"), "--output_dir", str(tmp_path / "again")]
    assert main(["finetune", *argv]) == 0
    assert weights(tmp_path / "again") == weights(study / "best")


def test_the_page_shows_every_trial(study):
    page = (study / "search.html").read_text()
    for title in ("History", "Parallel coordinates", "learning_rate", "lr_scheduler_type"):
        assert title in page
    summary = json.loads((study / "search.json").read_text())
    for place in re.findall(r'<data value="([^"]+)"', page):
        value = summary
        for key in place.split("/"):
            value = value[int(key)] if isinstance(value, list) else value[key]
    assert page.count("<td class=\"words\">complete</td>") == 5  # fmt: skip


def test_the_same_command_changes_nothing_and_more_trials_continue(
    study, tmp_path, stripes, tiny_vit, space, capsys
):
    folder = tmp_path / "study"
    shutil.copytree(study, folder)
    runs = [path for path in folder.rglob("run.json")]
    before = {path: path.stat().st_mtime_ns for path in runs}
    argv = argv_of(folder, stripes, tiny_vit, "--do_predict", "--check_leakage")
    assert main(["search", "--n_trials", "5", "--space", space, *argv]) == 0
    assert {path: path.stat().st_mtime_ns for path in runs} == before
    assert "5 complete" in capsys.readouterr().out
    assert main(["search", "--n_trials", "6", "--space", space, *argv]) == 0
    assert len(opened(folder).trials) == 6
    assert before.items() >= {p: p.stat().st_mtime_ns for p in runs if "trial" in str(p)}.items()


def test_a_better_trial_replaces_the_winner(study, tmp_path, stripes, tiny_vit, space, caplog):
    folder = tmp_path / "study"
    shutil.copytree(study, folder)
    winner = RunFolder(study / "best").trial()
    write_json(folder / "best" / "trial.json", winner | {"number": 99})
    (folder / "best" / "notes.txt").touch()
    flags = ("--do_predict", "--check_leakage")
    run_search(config(folder, stripes, tiny_vit, *flags), SearchConfig(n_trials=5, space=space))
    assert f"trial {winner['number']} replaces trial 99 as the winner" in caplog.text
    assert RunFolder(folder / "best").trial() == winner
    assert not (folder / "best" / "notes.txt").exists()
    assert weights(folder / "best") == weights(study / "best")


def test_a_process_that_waited_keeps_the_winner_of_another_that_has_found_a_better_trial(
    study, tmp_path, stripes, tiny_vit, space, caplog
):
    folder = tmp_path / "study"
    shutil.copytree(study, folder)
    flags = ("--do_predict", "--check_leakage")
    asked, found = config(folder, stripes, tiny_vit, *flags), []
    options = SearchConfig(n_trials=5, space=space)
    waiting = threading.Thread(target=lambda: found.append(run_search(asked, options)))
    with claimed_run(folder / "best"):
        (folder / "best" / "run.json").unlink()  # another process is at it
        waiting.start()
        while "ranked by accuracy" not in caplog.text:
            time.sleep(0.05)
        time.sleep(1)  # it has seen the five trials now, and waits for the winner
        number, trials = RunFolder(folder / "best").trial()["number"], opened(folder)
        shutil.copytree(folder / f"trial-{number}", folder / "trial-5")
        better = RunFolder(folder / "trial-5").trial() | {"number": 5, "value": 1.5}
        write_json(folder / "trial-5" / "trial.json", better)
        add_trial(trials, better, space_of(space, asked))
        write_json(
            folder / "best" / "trial.json", {"number": 5, "parameters": better["parameters"]}
        )
        shutil.copy(study / "best" / "run.json", folder / "best")
    waiting.join()
    assert found[0]["best"]["number"] == 5
    assert RunFolder(folder / "best").trial()["number"] == 5
    assert "training the winner" not in caplog.text


def test_a_search_for_a_winner_on_test_needs_a_test_split(tmp_path, tiny_vit, colours, space):
    asked = config(tmp_path / "study", colours, tiny_vit, "--do_predict")
    with pytest.raises(UserError, match="test"):
        run_search(asked, SearchConfig(n_trials=1, space=space))
    assert not (tmp_path / "study").exists()


def test_a_lost_journal_is_rebuilt_and_the_search_continues_as_if_it_had_not_been_lost(
    study, tmp_path, stripes, tiny_vit, space, caplog
):
    folder = tmp_path / "study"
    shutil.copytree(study, folder)
    (folder / "journal.log").unlink()
    shutil.rmtree(folder / "trial-1")
    options = SearchConfig(n_trials=6, space=space)
    flags = ("--do_predict", "--check_leakage")
    summary = run_search(config(folder, stripes, tiny_vit, *flags), options)
    assert "the storage has 0 of 5 trials" in caplog.text
    # The number of the trial that is lost is not given again, and another one takes its place.
    numbers = [trial["number"] for trial in summary["trials"]]
    assert numbers == [0, 2, 3, 4, 5, 6]
    kept, trials = opened(study).trials, opened(folder).trials
    for number in (0, 2, 3, 4):
        assert trials[number].value == kept[number].value
        assert trials[number].params == kept[number].params
        assert trials[number].intermediate_values == kept[number].intermediate_values


def test_a_damaged_journal_is_moved_aside(study, tmp_path, stripes, tiny_vit, space, caplog):
    folder = tmp_path / "study"
    shutil.copytree(study, folder)
    lines = (folder / "journal.log").read_text().splitlines(keepends=True)
    (folder / "journal.log").write_text("".join([*lines[:5], "{broken\n", *lines[5:]]))
    flags = ("--do_predict", "--check_leakage")
    run_search(config(folder, stripes, tiny_vit, *flags), SearchConfig(n_trials=5, space=space))
    assert "journal.damaged" in caplog.text and (folder / "journal.damaged").is_file()
    assert [t.value for t in opened(folder).trials] == [t.value for t in opened(study).trials]


@pytest.mark.parametrize("state", ["stopped", "running"])
def test_a_rebuilt_study_continues_the_trials_that_have_not_ended(tmp_path, state):
    study, given = open_study(tmp_path, None, "name", "maximize"), {"a": Choices((1, 2))}
    add_trial(study, {"state": state, "parameters": {"a": 2}, "evaluations": {"50": 0.5}}, given)
    trial = study.trials[0]
    assert (trial.state.name, trial.params) == ("RUNNING", {"a": 2})
    assert trial.intermediate_values == {50: 0.5}


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_proposals_are_those_of_optuna(sampler, tmp_path):
    given = {
        "x": Range(1e-3, 1.0, log=True),
        "n": Range(1, 9, whole=True),
        "c": Choices(("a", None)),
    }

    def value(parameters):
        return (parameters["x"] - 0.1) ** 2 + parameters["n"] + (parameters["c"] == "a")

    write_json(tmp_path / "study.json", {"name": "ours"})
    ours = open_study(tmp_path, None, "ours", "minimize")
    for _ in range(25):
        trial = ask(ours, sampler, given, seed=7)
        ours.tell(trial, value(trial.params))

    theirs = optuna.create_study(direction="minimize", sampler=build_sampler(sampler, 7, 0))

    def objective(trial):
        x, n = trial.suggest_float("x", 1e-3, 1.0, log=True), trial.suggest_int("n", 1, 9)
        return value({"x": x, "n": n, "c": trial.suggest_categorical("c", ["a", None])})

    def next_sampler(study, trial):
        study.sampler = build_sampler(sampler, 7, trial.number + 1)

    theirs.optimize(objective, n_trials=25, callbacks=[next_sampler])
    assert [t.params for t in ours.trials] == [t.params for t in theirs.trials]


@pytest.mark.slow
def test_a_grid_has_every_combination_once(tmp_path, stripes, tiny_vit):
    path = tmp_path / "space.yaml"
    path.write_text("learning_rate: [1e-3, 5e-3]\nflip: [0, 0.5]\n")
    options = SearchConfig(sampler="grid", space=str(path))
    folder = tmp_path / "study"
    found = proposals(run_search(config(folder, stripes, tiny_vit), options))
    combinations = grid_of({"learning_rate": Choices((1e-3, 5e-3)), "flip": Choices((0.0, 0.5))})
    assert found == list(combinations) and len(found) == 4
    assert len(proposals(run_search(config(folder, stripes, tiny_vit), options))) == 4


def test_a_combination_that_a_dead_process_has_queued_is_not_queued_again(tmp_path):
    given = {"a": Choices((1, 2)), "b": Choices((1, 2))}
    study = open_study(tmp_path, None, "grid", "minimize")
    study.enqueue_trial(next(grid_of(given)))
    for _ in range(4):
        study.tell(ask(study, "grid", given, 0), 0.0)
    assert [trial.params for trial in study.trials] == list(grid_of(given))


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_no_combination_of_lists_is_proposed_twice(sampler, tmp_path):
    given = {"a": Choices((1, 2, None)), "b": Choices(("x", "y", "z", "w"))}
    study = open_study(tmp_path, None, "lists", "minimize")
    for number in range(12):
        study.tell(ask(study, sampler, given, 0), float(number % 5))
    found = [trial.params for trial in study.trials]
    assert sorted(map(str, found)) == sorted(map(str, grid_of(given)))
    assert found != list(grid_of(given))  # the sampler chooses the order


@pytest.mark.slow
def test_a_bad_trial_is_pruned(tmp_path, stripes, tiny_vit, caplog):
    caplog.set_level("INFO")
    path = tmp_path / "space.yaml"
    path.write_text("learning_rate: [5e-3, 6e-3, 7e-3, 8e-3, 9e-3, 1e-9]\n")
    options = SearchConfig(sampler="grid", space=str(path))
    flags = ("--num_train_epochs", "4", "--metric_for_best_model", "loss")
    summary = run_search(config(tmp_path / "study", stripes, tiny_vit, *flags), options)
    assert summary["metric"] == "cross_entropy"
    assert [trial["state"] for trial in summary["trials"]] == ["complete"] * 5 + ["pruned"]
    last = summary["trials"][5]
    at = max(map(int, last["evaluations"]))
    assert at < 100 and last["value"] == last["evaluations"][str(at)]
    assert f"trial 5: cross_entropy {last['value']:.4f} at {at}%, pruned" in caplog.text
    states = {record["run"].rpartition("/")[2]: record["state"] for record in list_runs([tmp_path])}
    assert states["trial-5"] == "pruned" and states["trial-0"] == states["best"] == "finished"
    assert not RunFolder(tmp_path / "study" / "trial-5").checkpoints()
    # The first trial and the winner say how they are set up.
    lines = [record.getMessage() for record in caplog.records if "models" in record.name]
    assert set(Counter(lines).values()) == {2}


@pytest.mark.slow
def test_an_interrupted_search_says_how_it_continues(tmp_path, stripes, tiny_vit):
    argv = argv_of(tmp_path / "study", stripes, tiny_vit, "--num_train_epochs", "500")
    command = [sys.executable, "-m", "hf_cifar", "search", *argv]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "study" / "trial-0" / "trial.json").is_file() and process.poll() is None:
        time.sleep(0.1)
    process.terminate()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert errors.splitlines()[-1] == "hf-cifar: stopped by SIGTERM; the same command continues"


@pytest.mark.slow
def test_a_time_limit_stops_a_trial_at_a_checkpoint_where_the_same_command_continues(
    tmp_path, stripes, tiny_vit, space
):
    flags = ("--num_train_epochs", "60", "--eval_strategy", "no", "--save_strategy", "no")
    asked = config(tmp_path / "study", stripes, tiny_vit, *flags)
    folder = RunFolder(tmp_path / "study" / "trial-0")
    for limit in ("2s", "4s", "8s", "16s"):  # a busy machine needs longer to begin
        with pytest.raises(UserError, match="no trial is complete yet; pass a longer --time_limit"):
            run_search(asked, SearchConfig(time_limit=limit, space=space))
        if folder.checkpoints():
            break
    assert folder.trial()["state"] == "stopped" and len(folder.checkpoints()) == 1
    assert not folder.facts()
    summary = run_search(asked, SearchConfig(n_trials=1, space=space))
    assert summary["trials"][0]["state"] == "complete"
    single = [f"--{name}={value}" for name, value in folder.trial()["parameters"].items()]
    finetune_classifier(config(tmp_path / "run", stripes, tiny_vit, *flags, *single))
    assert weights(tmp_path / "run") == weights(folder.path)


@pytest.mark.slow
def test_without_a_number_of_trials_a_time_limit_ends_the_search(
    tmp_path, stripes, tiny_vit, space
):
    options = SearchConfig(time_limit="4s", space=space)
    summary = run_search(config(tmp_path / "study", stripes, tiny_vit), options)
    states = [trial["state"] for trial in summary["trials"]]
    assert states.count("complete") >= 1 and set(states) <= {"complete", "pruned", "stopped"}


def test_a_trial_of_a_process_that_died_before_its_folder_was_there(
    study, tmp_path, stripes, tiny_vit, space
):
    folder = tmp_path / "study"
    folder.mkdir()
    flags = ("--do_predict", "--check_leakage")
    shutil.copy(study / "study.json", folder)
    options, theirs = SearchConfig(n_trials=2, space=space), opened(folder)
    theirs.ask(
        distributions_of({"lr_scheduler_type": Choices(("linear", "cosine"))})
    )  # and no rate yet
    summary = run_search(config(folder, stripes, tiny_vit, *flags), options)
    assert [trial["state"] for trial in summary["trials"]] == ["complete"] * 2
    assert {trial.state.name for trial in opened(folder).trials} == {"COMPLETE"}


def test_a_trial_that_has_ended_but_was_not_told(study, tmp_path, stripes, tiny_vit, space):
    folder = tmp_path / "study"
    shutil.copytree(study, folder)
    journal = (folder / "journal.log").read_text().splitlines(keepends=True)
    ends = [n for n, line in enumerate(journal) if json.loads(line)["op_code"] == 6]
    (folder / "journal.log").write_text("".join(journal[: ends[-1]]))  # and half a line after it
    with (folder / "journal.log").open("a") as file:
        file.write(journal[ends[-1]][:20])
    assert opened(folder).trials[-1].state.name == "RUNNING"
    trained = (folder / "trial-4" / "run.json").stat().st_mtime_ns
    flags = ("--do_predict", "--check_leakage")
    run_search(config(folder, stripes, tiny_vit, *flags), SearchConfig(n_trials=5, space=space))
    assert [t.value for t in opened(folder).trials] == [t.value for t in opened(study).trials]
    assert (folder / "trial-4" / "run.json").stat().st_mtime_ns == trained


def test_a_resumed_trial_keeps_its_own_setting(study, tmp_path, stripes, tiny_vit, space):
    folder = tmp_path / "study"
    shutil.copytree(study, folder)
    (folder / "journal.log").unlink()
    shutil.rmtree(folder / "best")
    shared = RunFolder(folder).study()
    shared["options"]["precision"] = "auto"
    write_json(folder / "study.json", shared)
    # Both measured their own: the first trial, which has ended, and another one, which has not.
    trial = RunFolder(folder / "trial-1")
    facts, before = trial.trial(), trial.load_config()
    shutil.rmtree(trial.path)
    trial.path.mkdir()
    write_json(trial.trial_path, facts | {"state": "stopped"})
    trial.save_config(before.with_training(precision="bf16", memory_format="channels_last"))
    flags = ("--do_predict", "--check_leakage", "--precision", "auto")
    asked = config(folder, stripes, tiny_vit, *flags)
    run_search(asked, SearchConfig(n_trials=6, space=space))

    def setting(number):
        train = RunFolder(folder / f"trial-{number}").load_config().train
        return train.precision, train.memory_format

    assert setting(1) == ("bf16", "channels_last")
    assert setting(5) == setting(0) == ("fp32", before.train.memory_format)


def test_later_trials_wait_for_the_setting_of_the_first(tmp_path, stripes, tiny_vit, space):
    asked = config(tmp_path / "study", stripes, tiny_vit)
    options = SearchConfig(n_trials=3, space=space)
    search = Search(
        asked, options, space_of(space, asked), DataSource(asked.data), "accuracy", None
    )
    search.folder.path.mkdir()
    join(search)
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        assert next_trial(search, first).number == 0
        assert next_trial(search, second) == "wait"
        begin_trial(search.trial_folder(0), 0, {})
        search.trial_folder(0).save_config(asked)
        assert next_trial(search, second).number == 1
    # Nobody is working on them now, and the first one has no setting again.
    search.trial_folder(0).config_path.unlink()
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        assert next_trial(search, first).number == 0
        assert next_trial(search, second) == "wait"


def test_a_trial_that_kills_its_processes_fails(study, tmp_path, stripes, tiny_vit, space):
    folder = tmp_path / "study"
    folder.mkdir()
    shutil.copy(study / "study.json", folder)
    opened(folder).ask()
    (folder / "trial-0").mkdir()
    died = {"number": 0, "state": "running", "parameters": {}, "starts": 3, "checkpoint": None}
    write_json(folder / "trial-0" / "trial.json", died)
    flags = ("--do_predict", "--check_leakage")
    options = SearchConfig(n_trials=2, space=space)
    summary = run_search(config(folder, stripes, tiny_vit, *flags), options)
    assert [trial["state"] for trial in summary["trials"]] == ["failed", "complete"]
    reason = "3 processes have died in this trial without a new checkpoint"
    assert summary["trials"][0]["reason"] == reason


@pytest.mark.slow
def test_trials_that_fail(tmp_path, stripes, tiny_vit, caplog):
    path = tmp_path / "space.yaml"
    path.write_text("learning_rate: [5e-3, 1000]\noptim: [adamw_torch, sgd]\n")
    options = SearchConfig(n_trials=9, space=str(path))
    flags = ("--max_grad_norm", "0", "--warmup_steps", "0", "--num_train_epochs", "3")
    summary = run_search(config(tmp_path / "study", stripes, tiny_vit, *flags), options)
    assert "--n_trials 9: the space has only 4 combinations" in caplog.text
    states = [trial["state"] for trial in summary["trials"]]
    assert "failed" in states and states.count("complete") >= 2 and len(states) == 4
    failed = summary["trials"][states.index("failed")]
    assert failed["parameters"]["learning_rate"] == 1000 and "diverged" in failed["reason"]
    shown = render_summary(summary, RunFolder(tmp_path / "study"))
    number = states.count("complete")
    assert f"the best of {number} complete trials on validation" in shown
    assert "importance: unknown; too few complete trials" in shown
    assert "Importance: unknown; too few" in (tmp_path / "study" / "search.html").read_text()
    assert f"trial {failed['number']}: failed after" in caplog.text


def test_options_that_exclude_each_other_only_together_fail_one_trial(tmp_path, stripes, tiny_vit):
    path = tmp_path / "space.yaml"
    path.write_text("freeze: [backbone, none]\ndropout: [0, 0.1]\nmixup_alpha: [0, 0.2]\n")
    options = SearchConfig(sampler="grid", n_trials=4, space=str(path))
    asked = config(
        tmp_path / "study", stripes, tiny_vit, "--mixup_alpha", "0.2", "--max_steps", "1"
    )
    trials = run_search(asked, options)["trials"]
    assert [trial["state"] for trial in trials] == ["complete", "complete", "failed", "complete"]
    parameters = {"freeze": "backbone", "dropout": 0.1, "mixup_alpha": 0.0}
    assert trials[2]["parameters"] == parameters and "--dropout" in trials[2]["reason"]
    assert RunFolder(tmp_path / "study" / "trial-2").trial()["number"] == 2


def test_evaluations_are_written_when_they_are_made(tmp_path, stripes, tiny_vit):
    asked = config(
        tmp_path / "run",
        stripes,
        tiny_vit,
        "--num_train_epochs",
        "2",
        "--lr_scheduler_type",
        "constant",
    )
    folder, seen = RunFolder(tmp_path / "run"), []
    folder.path.mkdir()
    facts = begin_trial(folder, 0, {})

    def evaluated(percent, value):
        seen.append((folder.trial(), {str(percent): value}))
        return False

    run_trial(asked, DataSource(asked.data), facts, "accuracy", evaluated, None)
    (first, at_half), (second, at_end) = seen
    assert first["evaluations"] == at_half and second["evaluations"] == at_half | at_end
    assert first["state"] == "running" and 0 < first["seconds"] < second["seconds"]


@pytest.mark.parametrize("entropies", [(0.5, 0.4, 0.6), (None, None, None)])
def test_the_winner_among_equal_trials_has_the_lowest_cross_entropy(
    entropies, tmp_path, stripes, tiny_vit
):
    asked = config(tmp_path / "study", stripes, tiny_vit)
    space = {"learning_rate": Choices((1e-3, 2e-3, 3e-3, 4e-3))}
    found = Search(asked, SearchConfig(), space, DataSource(asked.data), "accuracy", None)
    found.folder.path.mkdir()
    join(found)
    for number, (value, entropy) in enumerate(
        zip((0.9, 0.9, 0.9, 0.8), (*entropies, 0.1), strict=True)
    ):
        trial = ask(found.study, "grid", space, 0)
        folder = found.trial_folder(number)
        folder.path.mkdir()
        write_json(folder.trial_path, {"number": number, "state": "complete", "value": value})
        if entropy is not None:
            write_json(folder.metrics_path, {"validation": {"cross_entropy": entropy}})
        found.study.tell(trial, value)
    assert best_trial(found).number == (1 if entropies[0] else 0)
    assert len(best_trials(found)) == 3


def test_a_search_in_which_all_fails_ends(tmp_path, stripes, tiny_vit):
    path = tmp_path / "space.yaml"
    path.write_text("layer_decay: {low: 0.5, high: 0.9}\n")
    flags = ("--model_name_or_path", "scratch/article_mlp")
    with pytest.raises(UserError, match=r"no trial is complete yet \(2 failed, .* has no stages"):
        run_search(
            config(tmp_path / "two", stripes, tiny_vit, *flags),
            SearchConfig(n_trials=2, space=str(path)),
        )
    with pytest.raises(UserError, match=r"5 trials in a row failed: .* has no stages"):
        run_search(
            config(tmp_path / "study", stripes, tiny_vit, *flags), SearchConfig(space=str(path))
        )


@pytest.mark.slow
def test_a_database(tmp_path, stripes, tiny_vit, space):
    options = SearchConfig(n_trials=3, space=space, storage=f"sqlite:///{tmp_path}/study.db")
    folder = tmp_path / "study"
    summary = run_search(config(folder, stripes, tiny_vit), options)
    assert len(summary["trials"]) == 3 and not (folder / "journal.log").exists()
    trials = opened(folder, options.storage).trials
    assert [trial.value for trial in trials] == [trial["value"] for trial in summary["trials"]]
    (tmp_path / "study.db").unlink()
    run_search(config(folder, stripes, tiny_vit), options)
    assert [t.value for t in opened(folder, options.storage).trials] == [t.value for t in trials]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "--storage takes a database URL, such as"),
        ("mysql+pymysql://me:secret@localhost/db", "No module named 'pymysql'; install the driver"),
        ("sqlite:////nowhere/study.db", "unable to open database file"),
    ],
)
def test_a_database_that_cannot_be_opened(tmp_path, url, message):
    with pytest.raises(UserError, match=message) as found:
        open_study(tmp_path, url, "name", "maximize")
    assert "secret" not in str(found.value)


def test_multiple_labels_are_ranked_by_average_precision(tmp_path, tiny_vit, lights, space):
    asked = config(tmp_path / "study", lights, tiny_vit, "--max_steps", "2")
    summary = run_search(asked, SearchConfig(n_trials=2, space=space))
    assert summary["metric"] == "average_precision_macro"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "2"], "--seeds does not work with hf-cifar search"),
        (["--push_to_hub"], "--push_to_hub pushes one model"),
        (["--n_trials", "0"], "--n_trials is 0; it must be at least 1"),
        (["--time_limit", "soon"], "--time_limit is 'soon'; it takes a time above 0"),
        (["--sampler", "grid"], "--sampler grid needs a list of choices .* learning_rate has a range"),
        (["--sampler", "random"], "--sampler differs from that of the search in"),
        (["--no_prune"], "--prune differs from that of the search in"),
        (["--num_train_epochs", "3"], "--num_train_epochs is 3.0, but the search in .* began with 1.0"),
        (["--flip", "0.1"], "--flip is 0.1, but the search in .* began with 0.5"),
        (["--metric_for_best_model", "loss"], "--metric_for_best_model differs from that of the search"),
        (["--n_trial", "3"], "unknown option --n_trial .nearest: --n_trials"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_change_nothing(
    study, stripes, tiny_vit, space, flags, message, capsys
):
    before = {path: path.stat().st_mtime_ns for path in study.rglob("*") if path.is_file()}
    argv = argv_of(study, stripes, tiny_vit, "--do_predict", "--check_leakage")
    assert main(["search", "--n_trials", "5", "--space", space, *argv, *flags]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert {p: p.stat().st_mtime_ns for p in study.rglob("*") if p.is_file()} == before


def test_mistakes_in_the_space_are_found_without_torch(tmp_path, stripes, tiny_vit):
    spaces = {
        "learning_rate: {low: 1, high: 0.5}": "learning_rate: low is 1 and high is 0.5",
        "seed: [1, 2]": "seed cannot be searched",
    }
    commands = []
    for number, text in enumerate(spaces):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text)
        argv = argv_of(tmp_path / "study", stripes, tiny_vit)
        commands.append((None, ["search", "--space", str(path), *argv]))
    commands.append((None, ["search", "--sampler", "grid", *argv_of(tmp_path, stripes, tiny_vit)]))
    messages = [*spaces.values(), "--sampler grid needs a list of choices"]
    for done, message in zip(run_commands(commands, dict(os.environ)), messages, strict=True):
        assert done.status == 2 and message in done.stderr and done.stderr.count("\n") == 1
        assert done.loaded_torch is False


def test_the_usage_names_recipe_and_config(capsys):
    with pytest.raises(SystemExit):
        main(["search", "--help"])
    usage = capsys.readouterr().out.partition("\n\n")[0]
    assert "--recipe NAME" in usage and "--config FILE" in usage


def test_the_summary_and_the_page_show_no_local_folders(study, stripes, tiny_vit):
    summary = json.loads((study / "search.json").read_text())
    assert (summary["data"], summary["model"]) == (stripes.name, tiny_vit.name)
    assert summary["run"] == "study"
    for name in ("search.json", "search.html"):
        assert str(stripes.parent) not in (study / name).read_text()


def test_a_launcher_is_refused(study, stripes, tiny_vit, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="start the same command several times, without a launcher"):
        run_search(config(study, stripes, tiny_vit))


def test_a_folder_of_trials_is_refused_for_a_run(study, stripes, tiny_vit):
    with pytest.raises(UserError, match="holds runs of hf-cifar search"):
        finetune_classifier(config(study, stripes, tiny_vit))


def test_a_lock_removes_the_line_that_a_process_died_in(tmp_path):
    path = tmp_path / "journal.log"
    for content, kept in (("a\nb", "a\n"), ("a\n", "a\n"), ("b", ""), ("", "")):
        path.write_text(content)
        lock = JournalLock(path)
        lock.acquire()
        lock.release()
        assert path.read_text() == kept

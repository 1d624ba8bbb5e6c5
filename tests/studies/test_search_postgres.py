"""hf-cifar search in two processes that share a study in a real PostgreSQL server."""

import os
import signal
import subprocess
import sys
import time

import pytest
from tiny import tiny_options

from hf_cifar.runs.folder import RunFolder
from hf_cifar.studies.optuna_study import open_study

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="the server is run on Linux and macOS"),
]
TRIALS = 8


@pytest.fixture(scope="module")
def url():
    from postgres import missing_programs, postgres_server

    if missing := missing_programs():
        pytest.skip(f"no {missing[0]}; it is in Debian's package postgresql")
    with postgres_server() as found:
        yield found


def test_two_processes_share_a_study_and_one_is_killed(url, tmp_path, stripes, tiny_vit):
    folder = tmp_path / "study"
    command = [
        sys.executable, "-m", "hf_cifar", "search", "--n_trials", str(TRIALS), "--storage", url,
        *tiny_options(folder, stripes, tiny_vit, "--precision", "fp32", "--probe_images", "0"),
    ]  # fmt: skip
    logs = [(tmp_path / f"{n}.log").open("wb") for n in range(2)]
    both = [subprocess.Popen(command, stdout=log, stderr=log) for log in logs]
    # Once each of them has a trial.
    while (
        len({RunFolder(path).trial().get("worker") for path in folder.glob("trial-*")} - {None}) < 2
    ):
        assert all(process.poll() is None for process in both)
        time.sleep(0.05)
    os.kill(both[0].pid, signal.SIGKILL)
    assert [process.wait() for process in both] == [-signal.SIGKILL, 0]
    for log in logs:
        log.close()
    trials = open_study(folder, url, RunFolder(folder).study()["name"], "maximize").trials
    assert len(trials) == TRIALS and {t.state.name for t in trials} <= {"COMPLETE", "PRUNED"}
    for trial in trials:
        facts = RunFolder(folder / f"trial-{trial.number}").trial()
        assert (facts["parameters"], facts["state"]) == (trial.params, trial.state.name.lower())
    assert "its process has ended" in (tmp_path / "1.log").read_text()
    assert not (folder / "journal.log").exists() and (folder / "best" / "run.json").is_file()
    assert "tests@" not in (folder / "study.json").read_text()

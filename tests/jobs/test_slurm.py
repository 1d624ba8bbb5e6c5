"""hf_cifar.jobs.slurm: the batch script, and real jobs on a Slurm of one node."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_lines import run_commands
from hub_server import TOKEN
from slurm_cluster import finished, missing_programs, output, slurm_cluster, wait_until
from tiny import tiny_options

from hf_cifar.cli import main

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Slurm runs on Linux")


@pytest.fixture(scope="module")
def cluster():
    """The environment of a shell on a cluster's login node."""
    if missing := missing_programs():
        pytest.skip(
            f"Slurm is not tested: no {', '.join(missing)}; Debian's slurm-wlm and munge have them"
        )
    with slurm_cluster() as environment:
        path = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
        yield environment | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def submit(environment, argv, token=None):
    (done,) = run_commands([(token, ["finetune", *argv])], environment)
    return done


def number_of(done):
    assert done.status == 0, done.stderr
    return re.findall(r"submitted job (\d+)", done.stdout)


def options(folder, stripes, tiny_vit, *flags):
    return tiny_options(folder, stripes, tiny_vit, "--job", "slurm", *flags)


def test_dry_run_shows_the_script_and_writes_nothing(
    tmp_path, stripes, tiny_vit, capsys, monkeypatch
):
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch
    flags = ["--slurm_options", "partition=gpu", "gres=gpu:1 --exclusive", "--dry_run"]
    assert main(["finetune", *options(tmp_path / "run", stripes, tiny_vit, *flags)]) == 0
    shown = capsys.readouterr().out
    assert f"sbatch --parsable {tmp_path}/run/slurm/job.sh" in shown
    for line in (
        "--partition=gpu",
        "--gres=gpu:1",
        "--exclusive",
        f"--output={tmp_path}/run/slurm/%j.log",
    ):
        assert f"  #SBATCH {line}\n" in shown
    assert "nothing was submitted" in shown and "array" not in shown
    command = next(line for line in shown.splitlines() if line.startswith("  exec"))
    assert f"-m hf_cifar finetune --dataset_name {stripes}" in command
    for name in ("--job", "--slurm_options", "--dry_run"):
        assert f"{name} " not in command
    assert not (tmp_path / "run").exists()


def test_an_array_has_a_task_for_each_seed_and_a_job_that_collects(
    tmp_path, stripes, tiny_vit, capsys
):
    flags = ["--seeds", "3", "--seed", "7", "--run_name", "a b", "--dry_run"]
    assert main(["finetune", *options(tmp_path / "run", stripes, tiny_vit, *flags)]) == 0
    shown = capsys.readouterr().out
    assert "  #SBATCH --array=0-2\n" in shown
    task = f"--seed 9 --seeds 1 --output_dir {tmp_path}/run/seed-9 --run_name 'a b/seed-9'"
    assert f"      2) run=({task}) ;;\n" in shown
    assert "sbatch --parsable --dependency=afterok:JOB --kill-on-invalid-dep=yes" in shown
    assert '--resume_from_checkpoint last "${run[@]}"' in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--flavor", "a10g-small"], "--flavor has no effect without --job hf_jobs"),
        (
            ["--job", "slurm", "--job_timeout", "1h"],
            "--job_timeout has no effect without --job hf_jobs",
        ),
        (["--slurm_options", "partition=x"], "--slurm_options has no effect without --job slurm"),
        (["--dry_run"], "--dry_run has no effect without --job; leave it out"),
        (["--job", "kubernetes"], "--job does not take 'kubernetes'; it takes hf_jobs, slurm"),
        (
            ["--job", "slurm", "--slurm_options", "array=0-9"],
            "--slurm_options array=0-9 would replace",
        ),
        (
            ["--job", "slurm", "--slurm_option", "x"],
            "unknown option --slurm_option (nearest: --slurm_options)",
        ),
        (["--job", "slurm", "--hub_token", TOKEN], "--hub_token would be readable in the job"),
        (["--job", "slurm", "--seeds", "2", "--push_to_hub"], "--push_to_hub pushes one model"),
        (["--job", "slurm", "--dataset_name", "./nowhere"], "no data set ./nowhere"),
        (["--job", "slurm"], "--job slurm needs sbatch, which is not on PATH"),
    ],
)
def test_what_cannot_work_is_one_line(
    flags, message, tmp_path, stripes, tiny_vit, capsys, monkeypatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    argv = tiny_options(tmp_path / "run", stripes, tiny_vit, *flags)
    assert main(["finetune", *argv]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("hf-cifar: error: ") and message in error
    assert TOKEN not in error
    assert not (tmp_path / "run").exists()


def test_a_process_of_a_launcher_submits_nothing(tmp_path, stripes, tiny_vit, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["finetune", *options(tmp_path / "run", stripes, tiny_vit)]) == 2
    assert "--job cannot be used under a launcher" in capsys.readouterr().err


@pytest.mark.slow
def test_a_job_runs_and_is_found(cluster, tmp_path, stripes, tiny_vit, capsys):
    folder = tmp_path / "a run's"  # a name that a shell would split
    done = submit(cluster, options(folder, stripes, tiny_vit), token=TOKEN)
    (number,) = number_of(done)
    assert f"tail -F {folder}/slurm/{number}.log" in done.stdout
    assert f"scancel {number}" in done.stdout
    assert finished(number, cluster) == ["COMPLETED"]
    log = (folder / "slurm" / f"{number}.log").read_text()
    assert "validation accuracy" in log
    for text in (log, done.stdout, done.stderr, (folder / "slurm" / "job.sh").read_text()):
        assert TOKEN not in text
    saved = (folder / "config.yaml").read_text()
    assert not re.search("^(job|flavor|job_timeout|slurm_options|dry_run):", saved, re.MULTILINE)
    assert main(["runs", str(tmp_path), "--json"]) == 0
    (record,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (record["run"], record["state"]) == (str(folder), "finished")


@pytest.mark.slow
def test_an_array_runs_every_seed_and_collects_their_results(
    cluster, tmp_path, stripes, tiny_vit, capsys
):
    done = submit(cluster, options(tmp_path / "run", stripes, tiny_vit, "--seeds", "2"))
    array, collect = number_of(done)
    assert finished(array, cluster) == ["COMPLETED", "COMPLETED"]
    assert finished(collect, cluster) == ["COMPLETED"]
    summary = json.loads((tmp_path / "run" / "seeds.json").read_text())
    assert (
        summary["seeds"] == [42, 43]
        and summary["metrics"]["validation"]["accuracy"]["num_runs"] == 2
    )
    assert main(["runs", str(tmp_path), "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {(each["seed"], each["state"]) for each in records} == {
        (42, "finished"),
        (43, "finished"),
    }


@pytest.mark.slow
def test_a_job_that_slurm_starts_again_resumes(cluster, tmp_path, stripes, tiny_vit):
    folder = tmp_path / "run"
    flags = ["--num_train_epochs", "60", "--save_strategy", "epoch", "--eval_strategy", "epoch"]
    (number,) = number_of(submit(cluster, options(folder, stripes, tiny_vit, *flags)))
    wait_until(lambda: any(folder.glob("checkpoint-*")), 90)
    output(["scontrol", "requeue", number], cluster)
    # Slurm would wait for two minutes.
    wait_until(lambda: "PENDING" in output(["squeue", "-h", "-j", number, "-o", "%T"], cluster), 60)
    output(["scontrol", "update", f"JobId={number}", "StartTime=now"], cluster)
    assert finished(number, cluster) == ["COMPLETED"]
    log = (folder / "slurm" / f"{number}.log").read_text()
    assert re.search(r"resum\w+ .*checkpoint-\d+", log)
    assert json.loads((folder / "run.json").read_text())["epochs"] == 60


@pytest.mark.slow
def test_a_refused_job_is_one_line_and_leaves_nothing(cluster, tmp_path, stripes, tiny_vit):
    flags = ["--slurm_options", "partition=nowhere"]
    done = submit(cluster, options(tmp_path / "run", stripes, tiny_vit, *flags))
    assert done.status == 2
    (error,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert "sbatch did not take the job" in error and "nowhere" in error
    assert not (tmp_path / "run").exists()


def test_an_array_is_cancelled_if_the_job_after_it_is_refused(
    tmp_path, stripes, tiny_vit, capsys, monkeypatch
):
    programs = {
        "sbatch": 'case "$*" in *collect*) echo "no such limit" >&2; exit 1 ;; *) echo 7 ;; esac',
        "scancel": f'echo "$*" > {tmp_path}/cancelled',
    }
    for name, line in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert main(["finetune", *options(tmp_path / "run", stripes, tiny_vit, "--seeds", "2")]) == 2
    assert "sbatch did not take the job: no such limit" in capsys.readouterr().err
    assert (tmp_path / "cancelled").read_text() == "7\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_script_starts_a_process_for_each_gpu(tmp_path, stripes, tiny_vit, capsys):
    # Two processes on a CPU stand for those of two GPUs.
    argv = options(tmp_path / "run", stripes, tiny_vit, "--dry_run")
    assert main(["finetune", *argv]) == 0
    script = capsys.readouterr().out.partition("job.sh:\n")[2].partition("\nnothing was")[0]
    environment = {
        **os.environ, "SLURM_GPUS_ON_NODE": "2", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == 2

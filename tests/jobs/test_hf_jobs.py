"""hf_cifar.jobs.hf_jobs: what is staged and posted, the log, and the result, with a local Hub."""

import dataclasses
import io
import json
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import safetensors.numpy
import yaml
from command_lines import run_commands
from hub_server import READ_TOKEN, TOKEN, Hub, Repo, hub_environment
from job_machine import Machine
from tiny import tiny_options, tiny_run

from hf_cifar.config.run import CONFIGS

REPOSITORY = "me/hf-cifar-jobs"


@pytest.fixture
def hub(tmp_path):
    with Hub() as hub:
        yield hub


def job_options(stripes, model, *flags):
    return [
        "finetune", *tiny_options("outputs/stripes", stripes, model), "--job", "hf_jobs",
        "--flavor", "cpu-basic", "--hub_model_id", "stripes", *flags,
    ]  # fmt: skip


def submit_all(hub, tmp_path, commands):
    """Run (token, argv) in one process."""
    return run_commands(commands, hub_environment(tmp_path / "home", hub.endpoint), cwd=tmp_path)


def submit(hub, tmp_path, argv):
    (done,) = submit_all(hub, tmp_path, [(TOKEN, argv)])
    return done


def error_line(done):
    assert done.status == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("hf-cifar: error")]
    return line


@pytest.mark.slow
def test_a_job_runs_the_command_on_staged_files_and_pushes_the_result(
    hub, tmp_path, stripes, tiny_vit
):
    hub.machine = Machine(tmp_path / "machine")
    done = submit(hub, tmp_path, job_options(stripes, tiny_vit, "--job_timeout", "90m"))
    assert done.status == 0, done.stdout + done.stderr

    repo = hub.repos["datasets", REPOSITORY]
    assert repo.private
    (job,) = hub.jobs.values()
    (volume,) = job.spec["volumes"]
    assert (volume["type"], volume["source"], volume["revision"]) == (
        "dataset",
        REPOSITORY,
        repo.sha,
    )
    staged = {
        path.removeprefix(f"{volume['path']}/"): content for path, content in repo.files.items()
    }
    wheel = "hf_cifar-0.1.0-py3-none-any.whl"
    model = f"model/{tiny_vit.name}"
    assert sorted(staged) == sorted([
        "config.yaml", f"data/{stripes.name}.zip", wheel, f"{model}/config.json",
        f"{model}/model.safetensors", f"{model}/preprocessor_config.json",
    ])  # fmt: skip
    with zipfile.ZipFile(io.BytesIO(staged[f"data/{stripes.name}.zip"])) as archive:
        names = sorted(str(path.relative_to(stripes)) for path in stripes.rglob("*.png"))
        assert sorted(archive.namelist()) == names

    options = yaml.safe_load(staged["config.yaml"])
    assert options["dataset_name"] == f"/inputs/data/{stripes.name}.zip"
    assert options["model_name_or_path"] == f"/inputs/{model}"
    assert (options["push_to_hub"], options["hub_model_id"]) == (True, "me/stripes")
    assert not {"job", "flavor", "job_timeout", "slurm_options", "dry_run", "hub_token"} & {
        *options
    }

    assert job.spec["flavor"] == "cpu-basic" and job.spec["timeoutSeconds"] == 5400
    assert job.spec["dockerImage"].startswith("ghcr.io/astral-sh/uv:")
    assert job.spec["command"][-3:] == ["finetune", "--config", "/inputs/config.yaml"]
    assert not any("--job" in part for part in job.spec["command"])
    assert job.spec["secrets"] == {"HF_TOKEN": TOKEN}

    # The secret is nowhere else: not in what is shown, staged, posted or logged.
    posted = {name: value for name, value in job.spec.items() if name != "secrets"}
    for text in (done.stdout, done.stderr, json.dumps(posted), *job.lines):
        assert TOKEN not in text
    assert not any(TOKEN.encode() in content for content in staged.values())

    assert all(line in done.stdout for line in job.lines[1:])
    assert "epoch 2.00: validation accuracy" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("finished; the model is on the Hub: me/stripes")
    pushed = hub.repos["models", "me/stripes"].files
    assert {"model.safetensors", "config.json", "metrics.json", "README.md"} <= {*pushed}
    for hidden in (str(stripes.parent), str(tmp_path)):
        assert not any(hidden.encode() in content for content in pushed.values())

    # The same command here ends with the same weights.
    tiny_run(tmp_path / "here", stripes, tiny_vit)
    here = safetensors.numpy.load_file(tmp_path / "here" / "model.safetensors")
    there = safetensors.numpy.load(pushed["model.safetensors"])
    assert here.keys() == there.keys()
    assert all(np.array_equal(here[name], there[name]) for name in here)


@pytest.mark.slow
def test_a_failed_job_is_status_1_with_its_last_lines(hub, tmp_path, stripes, tiny_vit):
    hub.machine = Machine(tmp_path / "machine")
    # This machine cannot know: the job's has no GPU.
    argv = job_options(stripes, tiny_vit, "--fp16")
    done = submit(hub, tmp_path, argv)
    assert done.status == 1, done.stdout + done.stderr
    first, *last = done.stderr[done.stderr.index("hf-cifar: error: job ") :].splitlines()
    assert first.endswith("ended: ERROR (exit status 2); its last lines:")
    assert "fp16 needs a GPU" in last[-1]
    assert "me/stripes" not in {repo_id for _, repo_id in hub.repos}


def test_a_dry_run_shows_everything_and_sends_nothing(hub, tmp_path, stripes, tiny_vit):
    done = submit(hub, tmp_path, job_options(stripes, tiny_vit, "--dry_run"))
    assert done.status == 0, done.stderr
    assert not done.loaded_torch
    shown = done.stdout
    assert "machine     HF Jobs, cpu-basic, as me, at most 6h" in shown
    assert "result      me/stripes, new, private" in shown
    assert "secrets     HF_TOKEN, not shown" in shown and TOKEN not in shown
    assert f"  data/{stripes.name}.zip" in shown
    assert f"  dataset_name: /inputs/data/{stripes.name}.zip" in shown
    assert f"MB for the new private data set repository {REPOSITORY}, in " in shown
    assert "nothing was sent" in shown
    assert not hub.jobs and not hub.repos
    assert not [each for each in hub.requests if not each.startswith("GET")]


def test_every_option_that_config_yaml_lacks_is_refused_or_written_otherwise():
    """The job reads its options from config.yaml."""
    unsaved = {
        each.name
        for config in CONFIGS
        for each in dataclasses.fields(config)
        if not each.metadata["saved"]
    }
    refused, written_as_precision = (
        {"seeds", "resume_from_checkpoint", "hub_token"},
        {"bf16", "fp16"},
    )
    assert unsaved == refused | written_as_precision | {"disable_tqdm"}  # a job has no terminal


def test_the_same_job_uploads_nothing_again(hub, tmp_path, stripes, tiny_vit):
    def finish(job, hub):
        job.stage = "COMPLETED"

    hub.machine = finish
    done = submit_all(hub, tmp_path, [(TOKEN, job_options(stripes, tiny_vit))] * 2)
    assert [each.status for each in done] == [0, 0]
    first, second = hub.jobs.values()
    assert first.spec["volumes"] == second.spec["volumes"]
    assert hub.repos["datasets", REPOSITORY].num_commits == 1


def test_hub_names_and_a_table_of_labels(hub, tmp_path, stripes):
    hub.repos["models", "them/vit"] = Repo({"config.json": b"{}"})
    hub.repos["datasets", "them/photos"] = Repo()
    photos = tmp_path / "photos"
    photos.mkdir()
    images = sorted(stripes.glob("train/*/*.png"))
    for number, image in enumerate(images):
        shutil.copy(image, photos / f"{number}.png")
    rows = [f"{number}.png,{image.parent.name}" for number, image in enumerate(images)]
    for table in (photos / "labels.csv", tmp_path / "table.csv"):
        table.write_text("\n".join(["file,class", *rows]))
    local = job_options("photos", "scratch/article_mlp", "--dry_run")
    commands = [
        job_options("them/photos", "them/vit", "--dry_run", "--flavor", "a10g-largex4"),
        [*local, "--labels_file", "photos/labels.csv"],
        [*local, "--labels_file", "table.csv"],
    ]
    done = submit_all(hub, tmp_path, [(TOKEN, argv) for argv in commands])
    assert [each.status for each in done] == [0, 0, 0], [each.stderr for each in done]
    hub_names, inside, outside = (each.stdout for each in done)
    assert "files       2, " in hub_names and "  dataset_name: them/photos\n" in hub_names
    # A process for each GPU.
    launcher = "python -m torch.distributed.run --standalone --nproc_per_node 4 -m hf_cifar"
    assert launcher in hub_names
    assert "  labels_file: labels.csv\n" in inside and "files       3, " in inside
    assert "  labels_file: /inputs/labels/table.csv\n" in outside and "files       4, " in outside


def test_what_cannot_work_is_one_line(hub, tmp_path, stripes, tiny_vit):
    cases = [
        (["--hub_model_id", ""], TOKEN, "--hub_model_id is missing; pass the repository that the result"),
        (["--flavor", ""], TOKEN, "--flavor is missing; pass the hardware of the job"),
        (["--job_timeout", "soon"], TOKEN, "--job_timeout is 'soon'; pass a number followed by s, m, h or d"),
        (["--seeds", "2"], TOKEN, "--job hf_jobs pushes one model; leave out --seeds"),
        (["--resume_from_checkpoint", "last"], TOKEN, "--resume_from_checkpoint needs a folder on this"),
        (["--hub_token", TOKEN], TOKEN, "--hub_token would be readable in the job"),
        (["--hub_model_id", "audience/x"], TOKEN, "me has no write access to audience"),
        (["--dataset_name", "them/nothing"], TOKEN, "no data set them/nothing on the Hub"),
        ([], READ_TOKEN, "the token of me is read-only"),
        ([], None, "--job hf_jobs needs a token; run: hf auth login, or set HF_TOKEN"),
    ]  # fmt: skip
    commands = [(token, job_options(stripes, tiny_vit, *flags)) for flags, token, _ in cases]
    for done, (_, _, message) in zip(submit_all(hub, tmp_path, commands), cases, strict=True):
        assert message in error_line(done)
        assert not done.loaded_torch
        assert TOKEN not in done.stderr + done.stdout
    assert not hub.jobs and not hub.repos


def test_a_public_repository_gets_no_files(hub, tmp_path, stripes, tiny_vit):
    hub.repos["datasets", REPOSITORY] = Repo(private=False)
    line = error_line(submit(hub, tmp_path, job_options(stripes, tiny_vit)))
    assert f"{REPOSITORY} is public, and local files would be uploaded to it" in line
    assert not hub.repos["datasets", REPOSITORY].files and not hub.jobs


def test_refusals_of_the_hub(hub, tmp_path, stripes, tiny_vit):
    hub.faults["create", REPOSITORY] = [403]
    hub.faults["commit", REPOSITORY] = [403]
    hub.faults["jobs", "me"] = [402]
    hub.faults["logs", "me"] = [404]
    upload = (
        f"the files of the job cannot be uploaded to {REPOSITORY}: the token has no write access"
    )
    messages = [
        upload,
        upload,
        "HF Jobs refused the job: this requires a paid account",
        "cannot be read",
    ]
    commands = [(TOKEN, job_options(stripes, tiny_vit))] * 4
    lines = [error_line(done) for done in submit_all(hub, tmp_path, commands)]
    assert all(message in line for message, line in zip(messages, lines, strict=True)), lines
    assert "the job goes on; follow it: hf jobs logs --follow" in lines[-1]
    assert len(hub.jobs) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_detaches_and_does_not_cancel(hub, tmp_path, stripes, tiny_vit, number):
    def speak(job, hub):
        job.lines.append("epoch 1.00")

    hub.machine = speak
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_cifar", *job_options(stripes, tiny_vit)],
        env=hub_environment(tmp_path / "home", hub.endpoint), cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # Tests may run in the background of a shell, which ignores SIGINT there.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    shown = []
    while not shown or "epoch 1.00" not in shown[-1]:
        shown.append(process.stdout.readline())
        assert shown[-1], process.communicate()
    process.send_signal(number)
    start = time.monotonic()
    out, errors = process.communicate(timeout=30)
    assert time.monotonic() - start < 10
    assert process.returncode == 0, errors
    ((job_id, job),) = hub.jobs.items()
    assert (
        f"detached; job {job_id} goes on; follow it: hf jobs logs --follow {job_id}; "
        f"cancel it: hf jobs cancel {job_id}" in out
    )
    assert job.stage == "RUNNING"
    assert not [each for each in hub.requests if "cancel" in each]

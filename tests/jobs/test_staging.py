"""hf_cifar.jobs.staging: the files that a job gets."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tiny import tiny_config

from hf_cifar.config.run import RunConfig
from hf_cifar.errors import UserError
from hf_cifar.jobs.job import Job, check_job, job_name
from hf_cifar.jobs.staging import build_wheel, extras_of, files_below, pack, stage_run

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_wheel_installs_and_has_the_code_of_this_package(tmp_path):
    wheel = build_wheel(tmp_path)
    site = tmp_path / "site"
    uv = Path(sys.executable).with_name("uv")
    subprocess.run(
        [uv, "pip", "install", "--offline", "--no-cache", "--no-deps", "--python", sys.executable,
         "--target", site, f"hf-cifar[bundled] @ file://{wheel}"],
        check=True, capture_output=True,
    )  # fmt: skip
    here = {
        path.relative_to(ROOT): path.read_bytes()
        for path in (ROOT / "hf_cifar").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name: (site / name).read_bytes() for name in here} == here
    done = subprocess.run(
        [site / "bin" / "hf-cifar", "recipes"], env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0 and "quickstart" in done.stdout


def test_equal_folders_make_equal_files(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "ä b.txt").write_text("text")
        (tmp_path / name / ".hidden").write_text(name)
        os.utime(tmp_path / name / "deep" / "ä b.txt", (0, hash(name) % 10**9))
        pack(tmp_path / f"{name}.zip", files_below(tmp_path / name))
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        assert archive.namelist() == ["deep/ä b.txt"]


@pytest.mark.skipif(sys.platform != "linux", reason="names are text elsewhere")
def test_a_name_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/caf\xe9.png")).write_bytes(b"")
    with pytest.raises(UserError, match="is not valid Unicode and cannot be uploaded; rename it"):
        pack(tmp_path / "out.zip", files_below(tmp_path / "in"))


def test_a_run_of_hub_names_stages_options_and_the_package_alone(tmp_path):
    config = RunConfig.of(dataset_name="them/photos", model_name_or_path="them/vit")
    files, there = stage_run(config, "/inputs", tmp_path)
    assert there == config
    assert [*files] == ["config.yaml", "hf_cifar-0.1.0-py3-none-any.whl"]
    assert RunConfig.parse(["--config", str(written(tmp_path, files["config.yaml"]))]) == config


def written(folder, text):
    (folder / "staged.yaml").write_text(text)
    return folder / "staged.yaml"


def test_a_model_is_staged_without_what_only_its_run_needs(tmp_path, stripes, tiny_vit):
    for name in ("config.yaml", "run.json", "optimizer.pt"):
        (tmp_path / name).write_text("local")
    for path in tiny_vit.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "scratch").mkdir()
    files, _ = stage_run(tiny_config("x", stripes, tmp_path), "/inputs", tmp_path / "scratch")
    staged = {Path(name).name for name in files if name.startswith("model/")}
    assert staged == {"config.json", "model.safetensors", "preprocessor_config.json"}


def test_a_table_of_files_of_this_machine_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("file,label\n/here/a.png,cat\n")
    config = RunConfig.of(dataset_name=str(tmp_path / "rows.csv"))
    with pytest.raises(UserError, match="lists files on this machine"):
        stage_run(config, "/inputs", tmp_path)


def test_a_file_of_this_machine_among_other_options_is_refused(tmp_path):
    (tmp_path / "zero.json").write_text("{}")
    config = RunConfig.of(deepspeed=str(tmp_path / "zero.json"))
    with pytest.raises(UserError, match=r"--deepspeed is \S+zero.json, a file on this machine"):
        stage_run(config, "/inputs", tmp_path)


def test_extras_follow_from_the_options(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert extras_of(RunConfig.of(model_name_or_path="them/vit")) == []
    config = RunConfig.of(
        dataset_name="bundled/digits",
        lora_rank=4,
        report_to=["tensorboard"],
        model_name_or_path="a/b",
    )
    assert extras_of(config) == ["bundled", "lora", "track"]


def test_a_job_shows_texts_in_full_and_no_values_of_secrets(tmp_path):
    (tmp_path / "data.zip").write_bytes(b"x" * 2000)
    job = Job(
        job_name("a/b ä"), {"machine": "that one"}, ["run", "a b"], {"A": "1"}, ("KEY",),
        {"script": "one\n\ntwo\n", "data.zip": tmp_path / "data.zip"},
    )  # fmt: skip
    assert job.render() == (
        "job         hf-cifar-a-b--\n"
        "machine     that one\n"
        "command     run 'a b'\n"
        "environment A=1\n"
        "secrets     KEY, not shown\n"
        "files       2, 0.002 MB\n"
        "      0.000 MB  script\n"
        "      0.002 MB  data.zip\n"
        "\n"
        "script:\n"
        "  one\n"
        "\n"
        "  two"
    )
    check_job(RunConfig())

"""hf_cifar.config.jobs: the options of a job are read, and taken out of the command line."""

import dataclasses

import pytest
from transformers import TrainingArguments

from hf_cifar.config.command_line import MISSPELLED
from hf_cifar.config.fields import field_names
from hf_cifar.config.jobs import JobConfig
from hf_cifar.config.run import CONFIGS, RunConfig, split_options
from hf_cifar.errors import UserError
from hf_cifar.text import nearest

NAMES = field_names(JobConfig)


def test_the_options_of_a_job_are_taken_out_and_the_others_are_kept_in_order(tmp_path):
    (tmp_path / "run.yaml").write_text("seed: 3\njob: slurm\nslurm_options: [partition=gpu]\n")
    argv = ["--bf16", "--config", str(tmp_path / "run.yaml"), "--dry_run", "--report_to", "a", "b"]
    job, rest = split_options([JobConfig], argv, "hf-cifar finetune")
    assert job == JobConfig(job="slurm", slurm_options=["partition=gpu"], dry_run=True)
    assert rest == ["--seed", "3", "--bf16", "--report_to", "a", "b"]
    # The rest cannot submit again.
    assert split_options([JobConfig], rest, "hf-cifar finetune") == (JobConfig(), rest)


def test_a_run_has_no_option_of_a_job():
    ours = {name for config in CONFIGS for name in field_names(config)}
    theirs = {each.name for each in dataclasses.fields(TrainingArguments)}
    assert not ours & {*NAMES} and not theirs & {*NAMES}
    assert not {*RunConfig().options()} & {*NAMES}
    # None of their names is taken for a misspelled one of these.
    assert not [name for name in ours | theirs if nearest(name, NAMES, MISSPELLED)]


@pytest.mark.parametrize("given", [["time=1:00", "gres=gpu:1"], ["time=1:00 --gres=gpu:1"]])
def test_options_of_sbatch_may_be_words_or_a_text(given):
    assert JobConfig(job="slurm", slurm_options=given).sbatch_options == ["time=1:00", "gres=gpu:1"]


@pytest.mark.parametrize("given", ["array=1-3", "--output=x", "wrap=ls"])
def test_options_of_sbatch_that_the_job_sets_are_refused(given):
    with pytest.raises(UserError, match="would replace what the job sets itself"):
        JobConfig(job="slurm", slurm_options=[given])

"""hf_cifar.config.other_tools: options of other tools, and what to pass here."""

import dataclasses
import re

import pytest
from transformers import TrainingArguments

from hf_cifar.cli import main
from hf_cifar.config.command_line import WITHOUT_EFFECT
from hf_cifar.config.fields import field_names
from hf_cifar.config.other_tools import INSTEAD, instead
from hf_cifar.config.run import CONFIGS, RunConfig
from hf_cifar.errors import UserError

REAL = {name for each in CONFIGS for name in field_names(each)} | {
    each.name for each in dataclasses.fields(TrainingArguments)
}
NAMES = [name for names in INSTEAD.values() for name in names.split()]


def test_the_table_names_options_that_exist():
    for advice in INSTEAD:
        mentioned = {*re.findall(r"--(\w+)", advice)} - {"top_k", "split", "recipe", "config"}
        assert mentioned <= REAL, advice


def test_no_real_option_counts_as_one_of_another_tool():
    assert not {*NAMES} & REAL
    assert not [name for name in (*REAL, *WITHOUT_EFFECT) if instead(name)]


def test_each_name_has_one_meaning():
    twice = {name for name in NAMES if NAMES.count(name) > 1}
    assert twice == {"batch_size", "batch", "bs", "b"}  # of training, or else of evaluation


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["--lr", "0.1"], "unknown option --lr: pass --learning_rate"),
        (["--train_dir", "a/train"], "--dataset_name with the folder above"),
        (["--data-dir=a"], "--data_dir: pass --dataset_name with the folder"),
        (["--warmup_ratio", "0.1"], "pass --warmup_steps with a share of all steps"),
        (["--overwrite_output_dir"], "pass --output_dir with another folder"),
        (["--batch-size", "64"], "--batch_size: pass --per_device_train_batch_size"),
        (["--batchSize", "64"], "--batchSize: pass --per_device_train_batch_size"),
        (["-b", "64", "-j", "4"], "-b: pass --per_device_train_.*; -j: pass --dataloader_num_w"),
        (["--pretrained"], "--pretrained: leave it out: weights are pretrained unless"),
        (["--no_cuda"], "--no_cuda: pass --use_cpu"),
        (["--gradient_checkpointing", "--amp"], "unknown option --amp: pass --precision bf16"),
        (["data=mnist", "imgsz=64"], "options data: pass --dataset_name; imgsz: pass --image_size"),
        (
            ["--lr", "1", "--flip", "0", "--epochs", "2"],
            "options --lr: .*; --epochs: pass --num_tr",
        ),
    ],
)
def test_the_message_says_what_to_pass_here(tokens, words):
    with pytest.raises(UserError, match=words) as caught:
        RunConfig.parse(tokens)
    assert "nearest" not in str(caught.value) and "\n" not in str(caught.value)


def test_values_that_look_like_names_are_left_alone():
    config = RunConfig.parse(["--optim_args", "momentum=0.9", "--run_name", "lr=3"])
    assert (config.train.optim_args, config.train.run_name) == ("momentum=0.9", "lr=3")


def test_a_yaml_file_of_another_tool_is_read_alike(tmp_path):
    file = tmp_path / "args.yaml"
    file.write_text("learning-rate: 0.1\nbatch-size: 64\nmodel: resnet50\n")
    with pytest.raises(
        UserError, match=r"--batch_size: pass .*; --model: pass --model_name_or_path"
    ):
        RunConfig.parse(["--config", str(file)])
    file.write_text("learning-rate: 0.1\n")
    assert RunConfig.parse(["--config", str(file)]).train.learning_rate == 0.1


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["evaluate", "--batch_size", "8"], "--batch_size: pass --per_device_eval_batch_size"),
        (["predict", "--weights", "x", "a.png"], "--weights: pass --model_name_or_path"),
        (["predict", "--lr", "1"], "unknown option --lr; see --help"),
        (["push", "--repo_id", "a/b", "--lr", "1"], "unknown option --lr; see --help"),
    ],
)
def test_other_commands_advise_their_own_options(command, words, capsys):
    assert main(command) == 2
    assert words in capsys.readouterr().err


def test_a_folder_without_a_flag_is_taken_for_the_data(tmp_path):
    with pytest.raises(UserError, match=re.escape(f"--dataset_name {tmp_path}")):
        RunConfig.parse([str(tmp_path)])

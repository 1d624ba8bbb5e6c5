"""hf_cifar.config.run and hf_cifar.config.command_line: command lines and YAML files."""

import dataclasses
import importlib
import pkgutil
import subprocess
import sys
from typing import get_args

import pytest
import yaml
from transformers import TrainingArguments

import hf_cifar
from hf_cifar.config.command_line import MISSPELLED
from hf_cifar.config.fields import field_names
from hf_cifar.config.recipes import recipe_names
from hf_cifar.config.run import CONFIGS, RunConfig
from hf_cifar.config.training import Optimizer, Schedule
from hf_cifar.errors import UserError
from hf_cifar.plan import settle_evaluation
from hf_cifar.runs.folder import RunFolder
from hf_cifar.text import nearest


def parse(*argv):
    return RunConfig.parse(["--use_cpu", *argv])


def test_option_names_are_unique_across_groups():
    names = [name for c in CONFIGS for name in field_names(c)]
    assert len(names) == len(set(names))


def is_option_class(value):
    if not (isinstance(value, type) and dataclasses.is_dataclass(value)):
        return False
    helps = ["help" in field.metadata for field in dataclasses.fields(value)]
    return value.__module__.startswith("hf_cifar.") and (
        any(helps) or hasattr(value, "_argument_group_name")
    )


def test_every_option_declared_here_has_a_help_text():
    modules = [
        importlib.import_module(found.name)
        for found in pkgutil.walk_packages(hf_cifar.__path__, "hf_cifar.")
    ]
    classes = {value for m in modules for value in vars(m).values() if is_option_class(value)}
    assert {c.__name__ for c in classes} > {"DataConfig", "TrainingConfig", "CompareConfig"}
    for config_class in classes:
        for field in dataclasses.fields(config_class):
            if field.init:
                assert field.metadata.get("help", "").endswith("."), (config_class, field.name)


def test_defaults_are_the_reference_pair():
    config = parse()
    assert config.data.dataset_name == "uoft-cs/cifar10"
    assert config.model.model_name_or_path == "google/vit-base-patch16-224-in21k"
    assert config.train.num_train_epochs is None  # settled by the number of images


def test_yaml_is_a_saved_command_line_and_flags_win(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("flip: 0.25\nlearning_rate: 1e-3\nimage_size: null\nbf16: false\nseed: 7\n")
    config = parse("--seed", "9", "--config", str(file))
    assert (config.augment.flip, config.train.learning_rate) == (0.25, 1e-3)
    assert (config.model.image_size, config.train.seed) == (None, 9)


def test_config_takes_precedence_over_recipe(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("image_size: 96\n")
    config = parse("--config", str(file), "--recipe", "quickstart")
    assert config.model.image_size == 96
    assert config.data.dataset_name == "bundled/digits"


def test_saved_config_is_the_same_run(tmp_path):
    config = parse(
        "--recipe", "quickstart", "--lr_scheduler_type", "cosine_with_min_lr", "--hub_token", "hf_secret",
        "--lr_scheduler_kwargs", '{"min_lr": 1e-6}', "--optim", "sgd", "--optim_args", "momentum=0.9",
        "--freeze", "2", "--no_load_best_model_at_end",
    )  # fmt: skip
    RunFolder(tmp_path).save_config(config)
    text = (tmp_path / "config.yaml").read_text()
    assert "hf_secret" not in text
    again = RunConfig.load(tmp_path / "config.yaml")
    assert again.options() == config.options()
    assert (again.data, again.augment, again.model) == (config.data, config.augment, config.model)
    assert again.train.lr_scheduler_kwargs == {"min_lr": 1e-6}
    assert again.train.load_best_model_at_end is False


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_parses_and_states_what_was_measured(name):
    from hf_cifar.config.recipes import read_recipe

    config = parse("--recipe", name)
    assert set(yaml.safe_load(read_recipe(name))) <= set(config.options())
    comment = "\n".join(line for line in read_recipe(name).splitlines() if line.startswith("#"))
    assert "Measured" in comment or "Published" in comment


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--learning_rat", "1"], ["--learning_rat", "--learning_rate"]),
        (["--learning_rate", "fast"], ["learning_rate", "fast"]),
        (["--learning_rate", "-1"], ["--learning_rate", "-1"]),
        (["--per_device_train_batch_size", "0"], ["--per_device_train_batch_size"]),
        (["--metric_for_best_model", "f1"], ["f1", "accuracy"]),
        (["--hub_strategy", "checkpoint"], ["--hub_strategy"]),
        (["--remove_unused_columns"], ["--remove_unused_columns"]),
        (
            ["--early_stopping_patience", "2", "--eval_strategy", "no"],
            ["--early_stopping_patience"],
        ),
        (["--recipe", "quikstart"], ["quikstart", "quickstart"]),
        (["--recipe"], ["--recipe"]),
        (["--config", "missing.yaml"], ["missing.yaml"]),
        (["--train_val_split", "1.5"], ["--train_val_split", "1.5"]),
        (["--flip", "2"], ["--flip", "2"]),
        (["--freeze", "half"], ["--freeze", "half"]),
        (["--max_train_samples", "0"], ["--max_train_samples"]),
        (["--value_range", "5"], ["--value_range is '5'", "0,4095"]),
        (["--resize_mode", "stretch"], ["--resize_mode", "squash"]),
        (["--max_image_pixels", "0"], ["--max_image_pixels", "178956970"]),
        (["--streaming", "--on_bad_image", "skip"], ["--on_bad_image skip", "--streaming"]),
        (["--image_size", "-1"], ["--image_size"]),
        (["stray"], ["stray"]),
        (["--eval_strategy", "never"], ["never"]),
    ],
)
def test_a_bad_option_is_named_in_one_line(argv, words):
    with pytest.raises(UserError) as caught:
        parse(*argv)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("text", ["- a\n- b\n", "flip: [", "flp: 1\n"])
def test_a_bad_yaml_file_is_an_error(tmp_path, text):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UserError):
        parse("--config", str(file))


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["stray"], "unexpected argument 'stray'"),
        (["--flip", "0.1", "0.2"], "unexpected argument '0.2'"),
        (["--streaming", "maybe"], "--streaming takes true or false, not 'maybe'"),
        (["--no_calibrate", "x"], "unexpected argument 'x'"),
        (["--seed", "1e3"], "--seed takes a whole number, not '1e3'"),
        (["--lr_scheduler_kwargs", "{x"], "--lr_scheduler_kwargs takes a JSON object"),
        (["--precision", "b16"], r"--precision does not take 'b16' \(nearest: bf16\)"),
        (["--learning_rate"], "--learning_rate needs a value"),
        (["--gradient_checkpointing", "maybe"], "gradient_checkpointing.*maybe"),
    ],
)
def test_a_stray_argument_is_refused(tokens, words):
    with pytest.raises(UserError, match=words):
        RunConfig.parse(tokens)


def test_a_value_may_begin_with_a_minus(tmp_path):
    config = parse("--value_range", "-1024,3000", "--output_dir", str(tmp_path))
    assert config.data.value_range == "-1024,3000"
    assert parse("--value_range=-1024,3000").data == config.data
    file = tmp_path / "config.yaml"
    file.write_text("value_range: -1024,3000\n")
    assert parse("--config", str(file)).data == config.data


def test_lists_flags_and_hyphens():
    config = RunConfig.parse(
        ["--report-to", "a", "b", "--streaming", "--flip", "1", "--no_calibrate", "--torch-compile"]
    )
    assert config.train.report_to == ["a", "b"]
    assert config.data.streaming and config.train.torch_compile and not config.train.calibrate


def test_an_option_of_training_arguments_goes_to_the_trainer(tmp_path):
    config = RunConfig.parse(["--gradient_checkpointing", "--adam_beta2", "0.95", "--seed", "3"])
    assert config.trainer == {"gradient_checkpointing": True, "adam_beta2": 0.95}
    RunFolder(tmp_path).save_config(config)
    assert RunConfig.load(tmp_path / "config.yaml").trainer == config.trainer


def test_our_own_options_are_read_without_torch():
    code = (
        "import sys; from hf_cifar.config.run import RunConfig; "
        "RunConfig.parse(['--recipe', 'quickstart', '--seed', '3']); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_options_take_every_optimiser_and_schedule():
    from hf_cifar.training.optimizers import OPTIMIZERS
    from hf_cifar.training.schedules import SCHEDULES

    assert set(get_args(Optimizer)) == OPTIMIZERS.keys()
    assert set(get_args(Schedule)) == SCHEDULES.keys()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], ("epoch", "epoch", True)),
        (["--save_strategy", "steps", "--save_steps", "100"], ("steps", "steps", True)),
        (["--eval_strategy", "steps", "--eval_steps", "50"], ("steps", "steps", True)),
        (["--save_steps", "100"], ("steps", "steps", True)),
        (["--eval_steps", "0.25"], ("steps", "steps", True)),
        (["--eval_strategy", "no"], ("no", "epoch", False)),
        (["--save_strategy", "no"], ("epoch", "no", False)),
        (["--save_strategy", "best"], ("epoch", "best", True)),
        (["--eval_strategy", "epoch", "--save_strategy", "steps"], ("epoch", "steps", False)),
    ],
)
def test_open_options_follow_those_that_are_set(flags, expected):
    settled = settle_evaluation(RunConfig.parse(flags).train)
    names = ("eval_strategy", "save_strategy", "load_best_model_at_end")
    assert tuple(settled[name] for name in names) == expected
    if expected[:2] == ("steps", "steps"):
        assert settled["eval_steps"] == settled["save_steps"] == float(flags[-1])


@pytest.mark.parametrize(
    ("eval_steps", "save_steps", "loads_best"),
    [("50", "100", True), ("100", "150", False), ("0.1", "0.3", True), ("0.2", "100", False)],
)
def test_best_checkpoint_needs_saves_at_evaluations(eval_steps, save_steps, loads_best, caplog):
    caplog.set_level("INFO", logger="hf_cifar")
    flags = ["--eval_steps", eval_steps, "--save_steps", save_steps]
    settled = settle_evaluation(RunConfig.parse(flags).train)
    assert settled["load_best_model_at_end"] is loads_best
    assert (f"every {eval_steps} and {save_steps} steps" in caplog.text) is not loads_best


def test_loading_the_best_needs_a_checkpoint_for_each_evaluation():
    flags = ["--eval_strategy", "epoch", "--save_strategy", "steps", "--load_best_model_at_end"]
    with pytest.raises(UserError, match="--load_best_model_at_end needs a checkpoint for each"):
        settle_evaluation(RunConfig.parse(flags).train)


def test_no_option_of_transformers_looks_like_a_misspelled_one_of_ours():
    ours = [name for each in CONFIGS for name in field_names(each)]
    for field in dataclasses.fields(TrainingArguments):
        if field.name not in ours:
            assert nearest(field.name, ours, MISSPELLED) is None, field.name


def test_a_rate_is_a_number_or_auto():
    def rate(word):
        return RunConfig.parse(["--learning_rate", word]).train.learning_rate

    assert (rate("auto"), rate("1e-3")) == ("auto", 1e-3)
    assert RunConfig.of(learning_rate="auto").train.learning_rate == "auto"
    assert RunConfig.of(learning_rate="0.5").train.learning_rate == 0.5
    assert RunConfig.of(learning_rate=1).train.learning_rate == 1.0
    for wrong in ("fast", "Auto"):
        with pytest.raises(UserError, match=f"takes a number or auto, not '{wrong}'"):
            rate(wrong)
    with pytest.raises(UserError, match="takes a number or auto, not True"):
        RunConfig.of(learning_rate=True)
    with pytest.raises(UserError, match="learning_rate is 0; it must be in 1e-12"):
        rate("0")

"""hf_cifar.config.run and hf_cifar.config.command_line: one command line, one YAML file, one truth."""

import dataclasses
import importlib
import pkgutil

import pytest
import yaml
from transformers import TrainingArguments

import hf_cifar
from hf_cifar.config.command_line import check_values, check_words, trainer_options
from hf_cifar.config.fields import field_names
from hf_cifar.config.recipes import recipe_names
from hf_cifar.config.run import FinetuneConfig, RunConfig
from hf_cifar.config.training import LIGHT_CONFIGS
from hf_cifar.errors import UserError


def parse(*argv):
    return RunConfig.parse(["--use_cpu", *argv])


def test_option_names_are_unique_across_groups():
    names = [name for c in (*LIGHT_CONFIGS, FinetuneConfig) for name in field_names(c)]
    assert len(names) == len(set(names))


def is_option_class(value):
    if not (isinstance(value, type) and dataclasses.is_dataclass(value)):
        return False
    helps = ["help" in field.metadata for field in dataclasses.fields(value)]
    return value.__module__.startswith("hf_cifar.") and (
        any(helps) or hasattr(value, "_argument_group_name")
    )


def test_every_option_of_ours_has_a_help_text():
    modules = [
        importlib.import_module(found.name)
        for found in pkgutil.walk_packages(hf_cifar.__path__, "hf_cifar.")
    ]
    classes = {value for m in modules for value in vars(m).values() if is_option_class(value)}
    assert {c.__name__ for c in classes} > {"DataConfig", "FinetuneConfig", "CompareConfig"}
    inherited = set(TrainingArguments.__dataclass_fields__.values())
    for config_class in classes:
        for field in set(dataclasses.fields(config_class)) - inherited:
            if field.init:
                assert field.metadata.get("help", "").endswith("."), (config_class, field.name)


def test_trainer_options_read_from_source_are_those_of_the_class():
    assert set(trainer_options()) == set(field_names(TrainingArguments))


def test_defaults_are_the_reference_pair():
    config = parse()
    assert config.data.dataset_name == "uoft-cs/cifar10"
    assert config.model.model_name_or_path == "google/vit-base-patch16-224-in21k"
    assert config.train.num_train_epochs == 3


def test_yaml_is_a_saved_command_line_and_flags_win(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("flip: 0.25\nlearning_rate: 1e-3\nimage_size: null\nbf16: false\nseed: 7\n")
    config = parse("--seed", "9", "--config", str(file))
    assert (config.augment.flip, config.train.learning_rate) == (0.25, 1e-3)
    assert (config.model.image_size, config.train.seed) == (None, 9)


def test_config_beats_recipe(tmp_path):
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
    config.save(tmp_path / "config.yaml")
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
        (["--max_image_pixels", "0"], ["--max_image_pixels", "178956970"]),
        (["--streaming", "--on_bad_image", "skip"], ["--on_bad_image skip", "--streaming"]),
        (["--image_size", "-1"], ["--image_size"]),
        (["stray"], ["stray"]),
        (["--eval_strategy", "never"], ["never"]),
    ],
)
def test_a_bad_option_is_one_line_that_names_it(argv, words):
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
    ],
)
def test_a_word_that_no_option_takes(tokens, words):
    kinds = {
        "flip": "float",
        "streaming": "bool",
        "calibrate": "bool",
        "report_to": "str | list[str]",
    }
    check_words(["--report_to", "a", "b", "--streaming", "--flip", "1", "--no_calibrate"], kinds)
    with pytest.raises(UserError, match=words):
        check_words(tokens, kinds)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["--seed", "1e3"], "--seed takes a whole number, not '1e3'"),
        (["--lr_scheduler_kwargs", "{x"], "--lr_scheduler_kwargs takes JSON"),
    ],
)
def test_a_value_is_checked_before_torch_is_imported(tokens, words):
    with pytest.raises(UserError, match=words):
        check_values(tokens, trainer_options())

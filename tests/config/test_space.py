"""hf_cifar.config.space: files of ranges and choices, and the default spaces."""

import pytest

from hf_cifar import RunConfig, UserError
from hf_cifar.config.space import SPACES, Choices, Range, space_of

SCRATCH = {"model_name_or_path": "scratch/article_cnn"}


def space(tmp_path, text, **options):
    path = tmp_path / "space.yaml"
    path.write_text(text)
    return space_of(str(path), RunConfig.of(**SCRATCH | options))


def test_values_have_the_type_of_their_option(tmp_path):
    found = space(
        tmp_path,
        "learning_rate: {low: 1e-4, high: 1, log: true}\n"
        "per_device_train_batch_size: {low: 8, high: 64}\n"
        "label-smoothing-factor: [0, 0.1]\n"
        "optim: [adamw_torch, sgd]\n"
        "weight_decay: [null, 5e-4]\n"
        "adam_beta2: {low: 0.9, high: 0.999}\n"
        "image_size: [32, 48]\n",
    )
    assert found == {
        "learning_rate": Range(1e-4, 1.0, log=True),
        "per_device_train_batch_size": Range(8, 64, whole=True),
        "label_smoothing_factor": Choices((0.0, 0.1)),
        "optim": Choices(("adamw_torch", "sgd")),
        "weight_decay": Choices((None, 5e-4)),
        "adam_beta2": Range(0.9, 0.999),
        "image_size": Choices((32, 48)),
    }
    assert isinstance(found["learning_rate"].high, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: {low: 0.1, high: 1}", r"unknown option --learning_rat \(nearest: --learning_rate"),
        ("learning_rate: {low: 0.1, high: 1e9}", "--learning_rate is 1000000000; it must be in"),
        ("learning_rate: {low: 0.1, high: 0.01}", "low is 0.1 and high is 0.01; low must be below"),
        ("learning_rate: {low: 0.1}", "learning_rate has no high"),
        ("learning_rate: {low: 0.1, hihg: 1}", r"unknown key 'hihg' \(nearest: high"),
        ("learning_rate: {low: a, high: 1}", "learning_rate: 'a' is not a number"),
        ("learning_rate: {low: 0.1, high: 1, log: 2}", "log is true or false, not 2"),
        ("weight_decay: {low: 0, high: 1, log: true}", "low is 0; with log: true it must be above 0"),
        ("optim: {low: 1, high: 2}", "optim does not take a number; give a list"),
        ("optim: [adamw_torch, sdg]", "--optim does not take 'sdg'"),
        ("optim: [sgd]", "a list of at least two choices"),
        ("optim: sgd", "takes a range .* not 'sgd'"),
        ("optim: [sgd, sgd]", "optim has the same choice twice"),
        ("lr_scheduler_kwargs: [{a: 1}, {a: 2}]", "is not a word or a number"),
        ("seed: [1, 2]", "seed cannot be searched: all trials share it"),
        ("split_seed: [1, 2]", "split_seed cannot be searched"),
        ("output_dir: [a, b]", "output_dir cannot be searched"),
        ("hub_token: [a, b]", "hub_token cannot be searched"),
        ("[1, 2]", "must map options to ranges"),
        ("a: [", "is not valid YAML"),
        ("freeze: [none, backbone]\nlayer_decay: [1, 0.8]", "--layer_decay has no effect with --freeze"),
    ],
)  # fmt: skip
def test_mistakes(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as found:
        space(tmp_path, text)
    assert "space.yaml" in str(found.value)


def test_a_missing_file():
    with pytest.raises(UserError, match=r"--space: no file nowhere\.yaml"):
        space_of("nowhere.yaml", RunConfig())


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "a pretrained network"),
        ({"lora_rank": 8}, "adapters"),
        ({"freeze": "backbone"}, "a head on a frozen backbone"),
        (SCRATCH, "random weights"),
    ],
)
def test_the_default_space_is_that_of_the_kind_of_training(options, kind):
    assert space_of(None, RunConfig.of(**options)) == SPACES[kind]


@pytest.mark.parametrize("name", ["optim", "head_solver"])
def test_kinds_without_a_default_space(name):
    options = {"optim": "sgd"}
    if name == "head_solver":
        options = {"head_solver": "lbfgs", "freeze": "backbone"}
    with pytest.raises(UserError, match=r"has no default space; pass --space FILE\.yaml"):
        space_of(None, RunConfig.of(**options))

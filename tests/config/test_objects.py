"""hf_cifar.config.objects: the names of objects, and options given by name in Python."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from PIL import Image

from hf_cifar import DataConfig, ModelConfig, RunConfig, UserError
from hf_cifar.config.objects import InMemory, kind_of, named

PIXELS = np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)
LABELS = [0, 1, 0, 1]


def changed(pixels):
    other = pixels.copy()
    other[2, 3, 3] += 1
    return other


def pictures(pixels):
    return [Image.fromarray(each) for each in pixels]


KINDS = {
    "Dataset": lambda p: Dataset.from_dict({"image": pictures(p), "label": LABELS}),
    "iterable": lambda p: KINDS["Dataset"](p).to_iterable_dataset(),
    "DataFrame": lambda p: pd.DataFrame({"image": pictures(p), "label": LABELS}),
    "arrays": lambda p: (p, np.array(LABELS)),
    "tensors": lambda p: (torch.tensor(p), torch.tensor(LABELS)),
    "columns": lambda p: {"image": list(p), "label": LABELS},
    "pairs": lambda p: list(zip(pictures(p), LABELS, strict=True)),
    "module": lambda p: bfloat16_module(p),
}


def bfloat16_module(pixels):
    module = torch.nn.Linear(4, 1).to(torch.bfloat16)
    module.weight.data = torch.tensor(pixels[:, 3, 3, 0].astype(float))[None].to(torch.bfloat16)
    module.bias.data.zero_()
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_equal_objects_have_equal_names_and_others_another(kind):
    name, same = named(KINDS[kind](PIXELS)), named(KINDS[kind](PIXELS.copy()))
    assert name == same and name.startswith("memory/") and isinstance(name, InMemory)
    other = named(KINDS[kind](changed(PIXELS)))
    assert other != name and kind_of(other) == kind_of(name)


def test_names_and_paths_stay_text(tmp_path):
    assert type(named("a/b")) is str
    assert DataConfig(dataset_name=tmp_path).dataset_name == str(tmp_path)
    with pytest.raises(UserError, match="neither a data set nor"):
        named(object())


def test_a_saved_config_has_the_name_and_not_the_object():
    config = RunConfig(
        data=DataConfig(dataset_name=(PIXELS, LABELS)),
        model=ModelConfig(model_name_or_path=torch.nn.Linear(2, 2)),
    )
    lines = config.to_yaml().splitlines()
    assert f"dataset_name: {config.data.dataset_name}" in lines
    assert any(line.startswith("model_name_or_path: memory/Linear-") for line in lines)


def test_options_by_name_reach_their_class():
    config = RunConfig.of(
        dataset_name="x",
        learning_rate=1e-3,
        flip=1,
        image_size="32",
        adam_beta2=0.9,
        report_to="none",
    )
    assert (config.data.dataset_name, config.train.learning_rate) == ("x", 1e-3)
    assert (config.augment.flip, config.model.image_size) == (1.0, 32)
    assert config.train.report_to == ["none"] and config.trainer == {"adam_beta2": 0.9}
    assert config.with_options(flip=0.5).train == config.train


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"lr": 1e-3, "epochs": 3},
            "--lr: pass --learning_rate; --epochs: pass --num_train_epochs",
        ),
        ({"learning_rat": 1}, r"--learning_rat \(nearest: --learning_rate\)"),
        ({"adam_bta2": 1}, r"--adam_bta2 \(nearest: --adam_beta2\)"),
        ({"flip": "often"}, "--flip takes a number, not 'often'"),
        ({"seed": 1.5}, "--seed takes a whole number, not 1.5"),
        ({"image_size": [32]}, r"--image_size takes a whole number, not \[32\]"),
        ({"do_predict": "maybe"}, "--do_predict takes true or false"),
        ({"precision": "int8"}, "--precision does not take 'int8'"),
        ({"do_train": True}, "--do_train has no effect here"),
    ],
)
def test_a_bad_option_gets_the_hint_of_the_command_line(options, words):
    with pytest.raises(UserError, match=words):
        RunConfig.of(**options)


def test_options_are_read_without_torch():
    code = (
        "import sys; from hf_cifar import DataConfig, RunConfig; RunConfig.of(flip=0.1, seed=3); "
        "DataConfig(dataset_name='x'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

"""hf_cifar.models.files: checks of a model's files before a library reads them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from hf_cifar.errors import UserError
from hf_cifar.models.files import count_weights, model_folder, weight_files


def rewritten(folder, target, **changes):
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


def test_plain_model_passes_all_checks(tiny_vit):
    assert model_folder(str(tiny_vit), None, False) == tiny_vit
    assert weight_files(tiny_vit) == [tiny_vit / "model.safetensors"]


def test_weights_of_shards_are_counted_from_headers(tmp_path):
    for i in (1, 2):
        save_file({f"w{i}": torch.zeros(i, 10)}, tmp_path / f"part{i}.safetensors")
    names = {f"w{i}": f"part{i}.safetensors" for i in (1, 2)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert count_weights(tmp_path) == 30


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "../elsewhere.safetensors", "/etc/x.safetensors"]
)
def test_index_may_only_list_safetensors_in_its_folder(name, tmp_path):
    index = {"weight_map": {"w": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"must list only \.safetensors files in its own folder"):
        weight_files(tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no file named model\.safetensors .* a pickle"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    ("changes", "trust", "words"),
    [
        ({"hidden_size": 10**9}, False, "hidden_size is 1000000000; .*262,144"),
        ({"vision": {"depths": [2, 10**6]}}, False, "depths is 1000000"),
        ({"attn_implementation": "them/kernel"}, False, "requires code from them/kernel"),
        (
            {"auto_map": {"AutoConfig": "them/there--file.Class"}},
            True,
            "the code is in another repository",
        ),
    ],
)
def test_dangerous_config_values_are_refused(changes, trust, words, tiny_vit, tmp_path):
    folder = rewritten(tiny_vit, tmp_path / "model", **changes)
    with pytest.raises(UserError, match=words):
        model_folder(str(folder), None, trust)

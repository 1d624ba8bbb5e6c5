"""hf_cifar.models.files: checks of a model's files before a library reads them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import Hub, hub_environment
from safetensors.torch import load_file, save_file
from tiny import tiny_options, tiny_run

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


def pickled(folder, target, num_shards=1):
    """Copy a model with its weights as pickles."""
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    names = list(weights)
    if num_shards == 1:
        torch.save(weights, target / "pytorch_model.bin")
        return target
    index = {}
    for i in range(num_shards):
        shard = f"pytorch_model-{i + 1:05}-of-{num_shards:05}.bin"
        index |= dict.fromkeys(names[i::num_shards], shard)
        torch.save({name: weights[name] for name in names[i::num_shards]}, target / shard)
    (target / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    return target


def printed_command(message):
    found = message.partition("convert it with: ")[2].partition(", or pass")[0]
    assert "python -c" in found and "\n" not in message
    return found


def run_in_shell(command, environment=None):
    """Run a command as printed; `python` is that of the tests."""
    environment = dict(environment or os.environ)
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("num_shards", [1, 3])
def test_the_printed_command_converts_pickled_weights(num_shards, tiny_vit, stripes, tmp_path):
    folder = pickled(tiny_vit, tmp_path / "it's [my] $model", num_shards)
    with pytest.raises(UserError, match="only a pickle, which can run any code") as caught:
        tiny_run(tmp_path / "run", stripes, folder)
    run_in_shell(printed_command(str(caught.value)), os.environ | {"HF_HUB_OFFLINE": "1"})
    expected, converted = (
        load_file(tiny_vit / "model.safetensors"),
        load_file(weight_files(folder)[0]),
    )
    assert expected.keys() == converted.keys()
    assert all(torch.equal(expected[name], converted[name]) for name in expected)
    tiny_run(tmp_path / "run", stripes, folder, "--max_steps", "1")


def test_shared_and_strided_tensors_are_converted(tmp_path):
    weight = torch.arange(6.0).reshape(2, 3)
    torch.save({"a": weight, "b": weight, "c": weight.T}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError) as caught:
        weight_files(tmp_path)
    run_in_shell(printed_command(str(caught.value)))
    converted = load_file(tmp_path / "model.safetensors")
    assert torch.equal(converted["b"], weight) and torch.equal(converted["c"], weight.T)


def test_the_command_runs_no_code_of_the_pickle(tmp_path):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"a": Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError) as caught:
        weight_files(tmp_path)
    with pytest.raises(AssertionError, match="Weights only load failed"):
        run_in_shell(printed_command(str(caught.value)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_a_pickle_on_the_hub_is_fetched_and_converted(tiny_vit, stripes, tmp_path):
    with Hub() as hub:
        hub.fill("models", "me/old", pickled(tiny_vit, tmp_path / "old"))
        environment = hub_environment(tmp_path / "home", hub.endpoint)
        environment["PYTHONPATH"] = str(Path(__file__).parents[2])
        options = tiny_options(tmp_path / "run", stripes, "me/old", "--max_steps", "1")

        def finetune(**changes):
            code = f"import sys; from hf_cifar.cli import main; sys.exit(main({['finetune', *options]}))"
            return subprocess.run(
                [sys.executable, "-c", code],
                env=environment | changes,
                capture_output=True,
                text=True,
            )

        refused = finetune().stderr.splitlines()[-1]
        fetched, conversion = printed_command(refused).split(" && ")
        assert fetched.startswith("hf download me/old --revision ") and "refs/pr/N" in refused
        run_in_shell(fetched, environment)
        refused = finetune(HF_HUB_OFFLINE="1").stderr.splitlines()[-1]
        assert printed_command(refused) == conversion
    run_in_shell(conversion, environment | {"HF_HUB_OFFLINE": "1"})
    done = finetune(HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr


def test_other_or_missing_weights_are_named(tmp_path):
    (tmp_path / "tf_model.h5").touch()
    with pytest.raises(
        UserError, match=r"found tf_model.h5, which is not read; save .* save_pretrained"
    ):
        weight_files(tmp_path)
    index = {"weight_map": {"w": "pytorch_model-00001-of-00002.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(
        UserError, match=r"lists pytorch_model-00001-of-00002\.bin, which is missing"
    ):
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

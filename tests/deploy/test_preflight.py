"""hf_cifar.deploy.preflight: mistakes in paths are one line, found before torch is imported."""

import os
import re

import pytest
from command_lines import run_commands
from tiny import tiny_run

from hf_cifar.config.deployment import CompressConfig
from hf_cifar.deploy.preflight import UNFINISHED, call_of, check_compress
from hf_cifar.errors import UserError
from hf_cifar.runs.folder import write_json

MISTAKES = {
    "export gone --output new.onnx": "no folder gone",
    "export mine --output new.onnx": "config.json does not exist; pass the --output_dir of a run",
    "export run --output taken.onnx": "taken.onnx exists; pass another --output",
    "export run --output taken.onnx/x/new.onnx": "taken.onnx is not a folder that can be written",
    "quantize unfinished --output new.onnx": "unfinished holds no finished run: no run.json",
    "quantize run --output taken.onnx": "taken.onnx exists; pass another --output",
    "quantize run --output taken.onnx/new.onnx": "taken.onnx is not a folder that can be written",
    "prune unfinished --output_dir new --target_size 0.5": "unfinished holds no finished run",
    "prune run --output_dir run --target_size 0.5": "run holds another run",
    "prune run --output_dir mine --target_size 0.5": "mine holds other files, such as notes.txt",
    "prune run --output_dir taken.onnx --target_size 0.5": "taken.onnx is a file",
    "prune run --output_dir taken.onnx/new --target_size 0.5": "is not a folder that can be written",
    "prune run --output_dir new": "how much to prune is missing",
    "prune run --output_dir new --target_size 0.5 --target_latency 0.5": "are both given; leave one out",
    "compress unfinished --output_dir new": "unfinished holds no finished run",
    "compress run --output_dir new --candidates unfinished": "unfinished holds no finished run",
    "compress run --output_dir mine": "mine holds other files, such as notes.txt",
    "compress run --output_dir taken.onnx/new": "taken.onnx is not a folder that can be written",
    "explain run --output_dir mine": "mine holds other files, such as notes.txt",
    "explain run --output_dir taken.onnx/new": "taken.onnx is not a folder that can be written",
    "explain run gone.png": "no such file or folder: gone.png",
    "explain mine": "config.json does not exist; pass the folder of a run",
}


@pytest.fixture(scope="module")
def run(stripes, tiny_vit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    tiny_run(folder, stripes, tiny_vit, "--max_steps", "1", "--probe_images", "0")
    return folder


def test_mistakes_in_paths_are_found_without_torch(run):
    folder = run.parent
    (folder / "unfinished").mkdir()
    (folder / "unfinished" / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    (folder / "mine").mkdir()
    (folder / "mine" / "notes.txt").write_text("keep")
    (folder / "taken.onnx").write_text("mine")
    before = sorted(folder.rglob("*"))
    commands = [(None, words.split()) for words in MISTAKES]
    found = run_commands(commands, dict(os.environ), cwd=folder)
    for (words, message), command in zip(MISTAKES.items(), found, strict=True):
        assert command.status == 2 and not command.loaded_torch, words
        assert message in command.stderr, (words, command.stderr)
        assert command.stderr.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


def test_only_the_same_call_continues_a_comparison(run, tmp_path):
    config = CompressConfig(str(tmp_path), target_sizes=[0.8])
    write_json(tmp_path / UNFINISHED, call_of(run, config))
    (tmp_path / "original.onnx").write_bytes(b"")
    check_compress(run, config)
    other = CompressConfig(str(tmp_path), target_sizes=[0.9])
    with pytest.raises(UserError, match="holds an unfinished comparison with other options"):
        check_compress(run, other)
    twice = CompressConfig(str(tmp_path), candidates=[str(run)] * 2)
    with pytest.raises(UserError, match=re.escape("--candidates has two runs named run")):
        check_compress(run, twice)

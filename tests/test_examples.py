"""docs/examples: files for engines that are not installed here are parsed and compared with the code."""

import ast
import inspect
import re
import shlex
from pathlib import Path

import yaml

import hf_cifar
from hf_cifar.config.jobs import JobConfig
from hf_cifar.config.run import RunConfig, split_options

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


def test_the_skypilot_task_runs_a_command_that_exists():
    task = yaml.safe_load((EXAMPLES / "skypilot.yaml").read_text())
    assert {*task} == {
        "name", "num_nodes", "workdir", "resources", "file_mounts", "secrets", "setup", "run",
    }  # fmt: skip
    words = shlex.split(re.sub(r'"\$\(.*?\)"', "ADDRESS", task["run"]))
    assert words[0] == "torchrun"
    command = words[words.index("-m") + 1 :]
    assert command[:2] == ["hf_cifar", "finetune"]
    _, argv = split_options([JobConfig], command[2:], "hf-cifar finetune")
    train = RunConfig.parse(argv).train
    assert train.output_dir.startswith(next(iter(task["file_mounts"])))
    assert train.resumes_last and train.push_to_hub and train.hub_model_id


def test_the_ray_script_compiles_and_calls_what_exists():
    source = (EXAMPLES / "ray_train.py").read_text()
    compile(source, "ray_train.py", "exec")
    nodes = list(ast.walk(ast.parse(source)))
    (imported,) = [
        node for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "hf_cifar"
    ]
    assert all(getattr(hf_cifar, alias.name) for alias in imported.names)
    (options,) = [
        node.value for node in nodes
        if isinstance(node, ast.keyword) and node.arg == "train_loop_config"
    ]  # fmt: skip
    names = {key.value for key in options.keys}
    parameters = {"dataset"} & {*inspect.signature(hf_cifar.finetune_classifier).parameters}
    assert RunConfig.of(**dict.fromkeys(names - parameters, "last"))

"""hf_cifar.hub.push: checks and choices that need no Hub."""

import pytest
from hub_server import TOKEN
from huggingface_hub import constants

from hf_cifar.config.training import TrainingConfig
from hf_cifar.errors import UserError
from hf_cifar.hub.push import Target, check_push, files_to_push, prepare_push


def test_push_in_offline_mode_is_refused(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"--push_to_hub needs the network, but HF_HUB_OFFLINE=1"):
        check_push(TrainingConfig(push_to_hub=True, use_cpu=True))


def test_no_network_without_push(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    train = TrainingConfig(use_cpu=True)
    assert check_push(train) is None and prepare_push(train, "no card") is None


def test_repr_of_a_target_has_no_token():
    train = TrainingConfig(use_cpu=True, hub_token=TOKEN, hub_model_id="me/x", hub_revision="v2")
    target = Target.of_run(train)
    assert target == Target("me/x", private=True, revision="v2", token=TOKEN)
    assert TOKEN not in repr(target)


def test_files_to_push_are_the_public_ones(tmp_path):
    kept = [
        "README.md", "config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
        "report.html", "report.json", ".eval_results/x.yaml",
    ]  # fmt: skip
    left = [
        "config.yaml",
        "run.json",
        "checkpoint-7/model.safetensors",
        "predictions/test.parquet",
        "a.bin",
    ]
    for name in kept + left:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert sorted(files_to_push(tmp_path)) == sorted(kept)

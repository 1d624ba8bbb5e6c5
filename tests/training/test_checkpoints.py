"""hf_cifar.training.checkpoints: complete or absent; tests/faults injects the faults."""

import errno
import json
import os
import subprocess

import numpy as np
import pytest
import torch

from hf_cifar.errors import UserError
from hf_cifar.runs.folder import RunFolder
from hf_cifar.training.checkpoints import (
    STAGING,
    SUMS_FILE,
    complete_checkpoint,
    find_damage,
    load_state,
    newest_checkpoint,
    remove_old_checkpoints,
    save_state,
    written_aside,
)
from hf_cifar.training.resumable import IDENTITY_FILE, IMAGES_PER_STEP, check_identity


def write(folder, step, text="weights"):
    with written_aside(folder, step, is_main=True, wait=lambda: None) as staging:
        (staging / "sub").mkdir()
        (staging / "a").write_text(text)
        (staging / "sub" / "b").write_text(text)
    complete_checkpoint(folder, step)
    return folder / f"checkpoint-{step}"


def test_a_state_is_loaded_unchanged(tmp_path):
    state = {
        "step": torch.tensor(3.0),
        0: {"moments": torch.rand(2, 3), "betas": (0.9, 0.999), "empty": None},
        "groups": [{"lr": 1e-3, "fused": True, "name": "weights", "none": []}],
        "large": 2**63 + 1,
        "infinite": float("inf"),
    }
    save_state(tmp_path / "state", state)
    found = load_state(tmp_path / "state")
    assert torch.equal(found.pop("step"), state.pop("step"))
    assert torch.equal(found[0].pop("moments"), state[0].pop("moments"))
    assert found == state
    assert isinstance(found[0]["betas"], tuple)


def test_tensors_keep_their_layout(tmp_path):
    tensors = [
        torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.rand(3, 4).T,
        torch.rand(2, 3, 4).permute(1, 2, 0),
        torch.rand(()),
    ]
    save_state(tmp_path / "state", tensors)
    for before, after in zip(tensors, load_state(tmp_path / "state"), strict=True):
        assert torch.equal(before, after)
        assert before.stride() == after.stride()


def test_two_names_of_one_tensor_are_kept(tmp_path):
    shared = torch.rand(3)
    save_state(tmp_path / "state", [shared, shared[:2]])
    assert torch.equal(load_state(tmp_path / "state")[1], shared[:2])


def test_a_state_with_another_type_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot hold a ndarray"):
        save_state(tmp_path / "state", {"rows": np.zeros(3)})


@pytest.mark.parametrize("content", [b"", b"rubbish", b"\x08" + bytes(7) + b"{}      "])
def test_a_file_of_another_kind_is_named(tmp_path, content):
    (tmp_path / "state").write_bytes(content)
    with pytest.raises(UserError, match="state is not a saved state"):
        load_state(tmp_path / "state")


def test_sha256sum_checks_a_checkpoint(tmp_path):
    checkpoint = write(tmp_path, 3)
    done = subprocess.run(
        ["sha256sum", "--check", "--quiet", SUMS_FILE], cwd=checkpoint, capture_output=True
    )
    assert done.returncode == 0
    assert find_damage(checkpoint) is None


def test_damage_is_described(tmp_path):
    checkpoint = write(tmp_path, 3)
    (checkpoint / "sub" / "b").write_text("weightz")
    assert find_damage(checkpoint) == "sub/b differs from its checksum"
    (checkpoint / "sub" / "b").unlink()
    assert find_damage(checkpoint) == "sub/b is missing"
    (checkpoint / "sub" / "b").write_text("weights")
    (checkpoint / "new").touch()
    assert find_damage(checkpoint) == "new does not belong to it"
    (checkpoint / SUMS_FILE).write_bytes(b"\xff")
    assert "cannot be read" in find_damage(checkpoint)
    (checkpoint / SUMS_FILE).unlink()
    assert find_damage(checkpoint) == f"it has no {SUMS_FILE}"


def test_the_newest_complete_checkpoint_is_found_by_its_step(tmp_path, caplog):
    for step in (2, 10, 9):
        write(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-10" / "a").write_text("other")
    assert [path.name for path in RunFolder(tmp_path).checkpoints()] == [
        "checkpoint-10", "checkpoint-9", "checkpoint-2",
    ]  # fmt: skip
    assert newest_checkpoint(tmp_path).name == "checkpoint-9"
    assert "checkpoint-10 is damaged: a differs from its checksum" in caplog.text
    assert newest_checkpoint(tmp_path / "nowhere") is None


def test_a_failed_save_leaves_the_previous_checkpoint(tmp_path):
    checkpoint = write(tmp_path, 3, "first")
    with (
        pytest.raises(RuntimeError, match="in mid-save"),
        written_aside(tmp_path, 3, is_main=True, wait=lambda: None) as staging,
    ):
        (staging / "a").write_text("second")
        raise RuntimeError("in mid-save")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    assert (checkpoint / "a").read_text() == "first"
    assert write(tmp_path, 3, "third") == checkpoint
    assert (checkpoint / "a").read_text() == "third"
    assert find_damage(checkpoint) is None


def test_a_failed_rename_restores_the_previous_checkpoint(tmp_path, monkeypatch):
    checkpoint = write(tmp_path, 3, "first")
    rename = os.rename

    def full(source, target):
        if source.name == STAGING:
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(UserError, match=r"cannot save a checkpoint at step 3 .*: No space left"):
        write(tmp_path, 3, "second")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    assert (checkpoint / "a").read_text() == "first" and find_damage(checkpoint) is None


def test_tensors_that_share_memory_are_saved_separately(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    state = {"whole": whole, "again": whole, "row": whole[1], "column": whole[:, 2]}
    save_state(tmp_path / "state", state)
    found = load_state(tmp_path / "state")
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor), name


def test_old_checkpoints_are_removed_except_those_to_keep(tmp_path):
    for step in range(1, 6):
        write(tmp_path, step)
    kept = {tmp_path / "checkpoint-5", tmp_path / "checkpoint-2"}
    remove_old_checkpoints(tmp_path, keep=kept, limit=3)
    assert [path.name[-1] for path in RunFolder(tmp_path).checkpoints()] == ["5", "4", "2"]
    remove_old_checkpoints(tmp_path, keep=kept, limit=1)
    assert set(RunFolder(tmp_path).checkpoints()) == kept
    remove_old_checkpoints(tmp_path, keep=kept, limit=None)
    assert set(RunFolder(tmp_path).checkpoints()) == kept


def test_a_change_since_a_checkpoint_is_named(tmp_path):
    (tmp_path / IDENTITY_FILE).write_text(json.dumps({"classes": ["a", "b"], "gone": 1}))
    check_identity(tmp_path, {"classes": ["a", "b"], "new": 2})
    with pytest.raises(
        UserError, match=r"different classes \(\['a', 'b'\] then, \['b', 'a'\] now\)"
    ):
        check_identity(tmp_path, {"classes": ["b", "a"]})


def test_the_number_of_processes_may_change_if_a_step_stays(tmp_path):
    before = {IMAGES_PER_STEP: 8, "processes": 2, "classes": ["a"]}
    (tmp_path / IDENTITY_FILE).write_text(json.dumps(before))
    check_identity(tmp_path, before | {"processes": 1})
    with pytest.raises(UserError, match=r"different images per step \(8 then, 4 now\)"):
        check_identity(tmp_path, before | {IMAGES_PER_STEP: 4, "processes": 1})
    del before[IMAGES_PER_STEP]  # of an older checkpoint
    (tmp_path / IDENTITY_FILE).write_text(json.dumps(before))
    with pytest.raises(UserError, match=r"different processes \(2 then, 1 now\)"):
        check_identity(tmp_path, before | {IMAGES_PER_STEP: 8, "processes": 1})

"""Checkpoints that are cut off, damaged, or of another run."""

import os
import random
import shutil

import pytest
from faults.rig import digest, in_child, kill_at_file_operation, make_trainer, train_on

from hf_cifar.checkpoints import SUMS_FILE, find_damage, newest_checkpoint
from hf_cifar.errors import UserError


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, stripes, tiny_vit):
    """A run of six steps with checkpoints at 4 and 6, and the digest of what it ends with."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return folder, digest(train_on(folder, stripes, tiny_vit).model)


def test_killed_at_every_file_operation_of_a_save(tmp_path, stripes, tiny_vit, undisturbed, figure):
    _, expected = undisturbed
    counted = tmp_path / "counted"

    def count():
        operations = kill_at_file_operation(counted, -1)
        train_on(counted, stripes, tiny_vit)
        (tmp_path / "count").write_text(str(operations()))

    assert in_child(count) == 0
    points = int((tmp_path / "count").read_text())
    assert points > 60
    good = 0
    for point in range(points):
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)

        def killed(folder=folder, point=point):
            kill_at_file_operation(folder, point)
            train_on(folder, stripes, tiny_vit)

        def goes_on(folder=folder):
            return digest(train_on(folder, stripes, tiny_vit).model) != expected

        good += in_child(killed) == -9 and in_child(goes_on) == 0
    figure(7, "kill -9 at every file operation of all saves of a run",
           "goes on unaided, ends with the same bits", good, points)  # fmt: skip


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_resume_from_every_step(tmp_path, stripes, dropout_vit, workers, accumulation, figure):
    flags = [
        "--max_steps", "17", "--save_steps", "1", "--save_total_limit", "99",
        "--dataloader_num_workers", str(workers), "--gradient_accumulation_steps", str(accumulation),
        "--per_device_train_batch_size", "4",
    ]  # fmt: skip
    whole = make_trainer(tmp_path / "run", stripes, dropout_vit, *flags)
    whole.train()
    expected = digest(whole.model)
    good = 0
    for step in range(1, 17):
        resumed = make_trainer(tmp_path / "again", stripes, dropout_vit, *flags)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        good += digest(resumed.model) == expected
        shutil.rmtree(tmp_path / "again")
    figure(8, f"resumed from each of steps 1 to 16: augmentation, mixup, dropout, EMA; {workers} workers, "
           f"accumulation {accumulation}", "the same SHA-256 at the end", good, 16)  # fmt: skip


@pytest.fixture(scope="module")
def dropout_vit(tmp_path_factory):
    """The tiny ViT with dropout."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dropout_vit")
    config = ViTConfig(
        image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, num_labels=3, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "weights cut short": lambda folder: os.truncate(folder / "model.safetensors", 1000),
    "weights gone": lambda folder: (folder / "model.safetensors").unlink(),
    "optimiser state empty": lambda folder: (folder / "optimizer.safetensors").write_bytes(b""),
    "a bit of the optimiser state flipped": lambda folder: _flip(folder / "optimizer.safetensors"),
    "trainer state is rubbish": lambda folder: (folder / "trainer_state.json").write_text("{"),
    "random state gone": lambda folder: (folder / "rng_state_0.safetensors").unlink(),
    "list of sums gone": lambda folder: (folder / SUMS_FILE).unlink(),
}


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path, stripes, tiny_vit, undisturbed, figure, caplog
):
    source, expected = undisturbed
    good = 0
    for damage in DAMAGE.values():
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(source, tmp_path / "run")
        damage(tmp_path / "run" / "checkpoint-6")
        caplog.clear()
        chosen = newest_checkpoint(tmp_path / "run")
        warned = "checkpoint-6 is damaged" in caplog.text
        ends = digest(train_on(tmp_path / "run", stripes, tiny_vit).model)
        whole_again = find_damage(tmp_path / "run" / "checkpoint-6") is None
        good += chosen.name == "checkpoint-4" and warned and ends == expected and whole_again
    figure(9, "the newest checkpoint damaged, each in another way",
           "a warning, goes on from the one before, ends with the same bits", good, len(DAMAGE))  # fmt: skip


def test_every_flipped_byte_is_noticed(undisturbed, figure):
    folder, _ = undisturbed
    draw = random.Random(0)
    checkpoint = newest_checkpoint(folder)
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    good = 0
    for number in range(200):
        path = files[number % len(files)]
        before = path.read_bytes()
        place = draw.randrange(len(before))
        changed = bytearray(before)
        changed[place] ^= draw.randrange(1, 256)
        path.write_bytes(changed)
        good += find_damage(checkpoint) is not None
        path.write_bytes(before)
    assert find_damage(checkpoint) is None
    figure(10, "one byte of a checkpoint changed, in every file", "noticed", good, 200)


def test_save_total_limit_keeps_the_last_whole_checkpoint(tmp_path, stripes, tiny_vit, undisturbed):
    source, expected = undisturbed
    shutil.copytree(source, tmp_path / "run")
    _flip(tmp_path / "run" / "checkpoint-6" / "model.safetensors")
    flags = ["--save_total_limit", "1", "--save_steps", "1"]
    folder = tmp_path / "run"

    def killed_in_the_first_save():
        # The 5th operation on the way of the first save after the fallback.
        trainer = make_trainer(folder, stripes, tiny_vit, *flags)
        kill_at_file_operation(folder, 5)
        trainer.train(resume_from_checkpoint=str(newest_checkpoint(folder)))

    assert in_child(killed_in_the_first_save) == -9
    assert newest_checkpoint(folder).name == "checkpoint-4"
    assert digest(train_on(folder, stripes, tiny_vit, *flags).model) == expected
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-6"]


def test_a_checkpoint_of_other_data_is_refused(tmp_path, stripes, colours, tiny_vit, undisturbed):
    source, _ = undisturbed
    trainer = make_trainer(tmp_path / "run", colours, tiny_vit)
    with pytest.raises(UserError, match=r"is of a run with other split"):
        trainer.train(resume_from_checkpoint=str(source / "checkpoint-4"))

"""Checkpoints that are incomplete, damaged, or from another run."""

import os
import random
import shutil
import signal
import socket
import time

import pytest
from faults.rig import (
    digest,
    ended,
    in_child,
    kill_at_file_operation,
    make_trainer,
    resume,
    resumes_to,
    start_pair,
)
from transformers.trainer_utils import SaveStrategy

from hf_cifar.cli import main
from hf_cifar.errors import UserError
from hf_cifar.runs.folder import RunFolder
from hf_cifar.training.checkpoints import (
    SUMS_FILE,
    find_damage,
    newest_checkpoint,
)


@pytest.fixture(scope="module")
def dropout_vit(save_vit):
    """The tiny ViT with dropout."""
    return save_vit(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, stripes, dropout_vit):
    """The folder of a run of six steps with checkpoints at 4 and 6, and the digest of its final weights."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    return folder, resume(make_trainer(folder, stripes, dropout_vit))


def test_kill_at_every_file_operation_of_a_save(
    tmp_path, stripes, dropout_vit, uninterrupted, record_result
):
    _, expected = uninterrupted
    folder = tmp_path / "run"
    trainer = make_trainer(folder, stripes, dropout_vit)  # trained in forked copies only

    def count():
        operations = kill_at_file_operation(folder, -1)
        trainer.train()
        (tmp_path / "count").write_text(str(operations()))

    assert in_child(count) == 0
    points = int((tmp_path / "count").read_text())
    assert points > 60
    good = 0
    for point in range(points):
        shutil.rmtree(folder, ignore_errors=True)

        def killed(point=point):
            kill_at_file_operation(folder, point)
            trainer.train()

        ends = in_child(killed), resumes_to(expected, trainer)
        good += ends == (-signal.SIGKILL, True)
        if ends != (-signal.SIGKILL, True):
            print(f"file operation {point}: {ends}")
    record_result(
        7,
        "kill -9 at every file operation of a run's saves",
        "resumes unaided and ends bit-identical",
        good,
        points,
    )


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_resume_from_every_step(
    tmp_path, stripes, dropout_vit, workers, accumulation, record_result
):
    trainer = make_trainer(
        tmp_path / "run", stripes, dropout_vit,
        "--max_steps", "17", "--save_steps", "1", "--save_total_limit", "99",
        "--dataloader_num_workers", str(workers), "--gradient_accumulation_steps", str(accumulation),
        "--per_device_train_batch_size", "4",
    )  # fmt: skip

    def uninterrupted_run():
        (tmp_path / "digest").write_text(resume(trainer))

    def resumed(step):
        trainer.args.save_strategy = SaveStrategy.NO
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        return digest(trainer.model) != (tmp_path / "digest").read_text()

    assert in_child(uninterrupted_run) == 0
    good = 0
    for step in range(1, 17):
        good += in_child(lambda step=step: resumed(step)) == 0
    record_result(
        8,
        f"resumed from each of steps 1 to 16: augmentation, mixup, dropout, EMA; {workers} workers, "
        f"accumulation {accumulation}",
        "the same SHA-256 at the end",
        good,
        16,
    )


@pytest.fixture(scope="module")
def uninterrupted_pair(tmp_path_factory, stripes, dropout_vit):
    """The same run in two processes: its folder with all checkpoints, and its duration in seconds."""
    folder = tmp_path_factory.mktemp("pair") / "run"
    began = time.monotonic()
    pair = start_pair(
        pair_run(folder, stripes, dropout_vit, "--save_total_limit", "99"), free_port()
    )
    assert [ended(pid) for pid in pair] == [0, 0]
    return folder, time.monotonic() - began


def pair_run(folder, data, model, *flags, checkpoint=None, expected=None):
    """Return a function for each of two processes: train, and compare the final digest with `expected`."""

    def run(rank):
        trainer = make_trainer(folder, data, model, "--per_device_train_batch_size", "4", *flags)
        found = checkpoint or newest_checkpoint(folder)
        trainer.train(resume_from_checkpoint=str(found) if found else None)
        ends = digest(trainer.model)
        if expected is None and rank == 0:
            (folder / "digest").write_text(ends)
        return expected is not None and ends != expected

    return run


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_kill_of_two_processes_at_random_times(
    tmp_path, stripes, dropout_vit, uninterrupted_pair, record_result
):
    source, seconds = uninterrupted_pair
    expected = (source / "digest").read_text()
    draw = random.Random(0)
    good = 0
    for number in range(8):
        folder = tmp_path / str(number)
        pair = start_pair(pair_run(folder, stripes, dropout_vit), free_port())
        time.sleep(draw.uniform(0.4, 1) * seconds)
        for pid in pair:
            os.kill(pid, signal.SIGKILL)
        [ended(pid) for pid in pair]
        again = pair_run(folder, stripes, dropout_vit, expected=expected)
        good += [ended(pid) for pid in start_pair(again, free_port())] == [0, 0]
    record_result(
        7,
        "kill -9 of two gloo processes at random times",
        "resumes unaided and ends bit-identical",
        good,
        8,
    )


def test_two_processes_resume_from_every_checkpoint(
    tmp_path, stripes, dropout_vit, uninterrupted_pair, record_result
):
    source, _ = uninterrupted_pair
    expected = (source / "digest").read_text()
    checkpoints = RunFolder(source).checkpoints()[1:]
    good = 0
    for checkpoint in checkpoints:
        folder = tmp_path / checkpoint.name
        again = pair_run(folder, stripes, dropout_vit, checkpoint=checkpoint, expected=expected)
        good += [ended(pid) for pid in start_pair(again, free_port())] == [0, 0]
    record_result(
        8,
        "the same with two gloo processes, from steps 2 and 4",
        "the same SHA-256 at the end",
        good,
        len(checkpoints),
    )


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "weights truncated": lambda folder: os.truncate(folder / "model.safetensors", 1000),
    "weights missing": lambda folder: (folder / "model.safetensors").unlink(),
    "optimiser state empty": lambda folder: (folder / "optimizer.safetensors").write_bytes(b""),
    "a bit of the optimiser state flipped": lambda folder: _flip(folder / "optimizer.safetensors"),
    "trainer state is garbage": lambda folder: (folder / "trainer_state.json").write_text("{"),
    "random state missing": lambda folder: (folder / "rng_state_0.safetensors").unlink(),
    "checksums missing": lambda folder: (folder / SUMS_FILE).unlink(),
}


def test_a_damaged_checkpoint_is_skipped_for_the_previous_one(
    tmp_path, stripes, dropout_vit, uninterrupted, record_result, caplog
):
    source, expected = uninterrupted
    folder = tmp_path / "run"
    trainer = make_trainer(folder, stripes, dropout_vit)
    good = 0
    for damage in DAMAGE.values():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        damage(folder / "checkpoint-6")
        caplog.clear()
        chosen = newest_checkpoint(folder)
        warned = "checkpoint-6 is damaged" in caplog.text
        same = resumes_to(expected, trainer)
        repaired = find_damage(folder / "checkpoint-6") is None
        good += chosen.name == "checkpoint-4" and warned and same and repaired
    record_result(
        9,
        "the newest checkpoint damaged in seven ways",
        "a warning; resumes from the previous one and ends bit-identical",
        good,
        len(DAMAGE),
    )


def test_every_changed_byte_is_detected(uninterrupted, record_result):
    folder, _ = uninterrupted
    draw = random.Random(0)
    checkpoint = newest_checkpoint(folder)
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    good = 0
    for number in range(200):
        path = files[number % len(files)]
        before = path.read_bytes()
        changed, place = bytearray(before), draw.randrange(len(before))
        changed[place] ^= draw.randrange(1, 256)
        path.write_bytes(changed)
        good += find_damage(checkpoint) is not None
        path.write_bytes(before)
    assert find_damage(checkpoint) is None
    record_result(
        10, "one byte of a checkpoint changed, in each of its files in turn", "detected", good, 200
    )


def test_save_total_limit_keeps_the_last_intact_checkpoint(
    tmp_path, stripes, dropout_vit, uninterrupted
):
    source, expected = uninterrupted
    folder = tmp_path / "run"
    shutil.copytree(source, folder)
    _flip(folder / "checkpoint-6" / "model.safetensors")
    trainer = make_trainer(
        folder, stripes, dropout_vit, "--save_total_limit", "1", "--save_steps", "1"
    )

    def killed_in_the_first_save():
        kill_at_file_operation(folder, 25)
        resume(trainer)

    assert in_child(killed_in_the_first_save) == -signal.SIGKILL
    assert newest_checkpoint(folder).name in ("checkpoint-4", "checkpoint-5")
    assert resumes_to(expected, trainer)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-6"]


OTHER_OPTIONS = {
    "per_device_train_batch_size": "4", "seed": "7", "learning_rate": "0.1", "weight_decay": "0.5",
    "rotation": "30", "mixup_alpha": "0.9", "ema_decay": "0.5", "freeze": "backbone", "image_size": "32",
    "gradient_accumulation_steps": "2", "optim": "sgd", "train_val_split": "0.2", "max_train_samples": "40",
}  # fmt: skip


def test_a_change_since_the_checkpoint_is_named(
    tmp_path, stripes, colours, tiny_vit, record_result
):
    def command(data, model, *flags):
        return [
            "finetune", "--dataset_name", str(data), "--model_name_or_path", str(model), "--use_cpu",
            "--output_dir", str(tmp_path / "run"), "--per_device_train_batch_size", "8",
            "--learning_rate", "1e-3", "--precision", "fp32", "--max_steps", "4", "--save_strategy", "steps",
            "--save_steps", "2", "--eval_strategy", "no", *flags,
        ]  # fmt: skip

    def error_of(arguments):
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        # In a new process, which has not read the data yet.
        status = in_child(lambda: main([*arguments, "--resume_from_checkpoint", "last"]), log)
        return status, log.read_text()

    data = tmp_path / "data"
    shutil.copytree(stripes, data)
    assert in_child(lambda: main(command(data, tiny_vit))) == 0
    outcomes = [
        (error_of(command(data, tiny_vit, f"--{name}", value)), f"--{name} is {value}")
        for name, value in OTHER_OPTIONS.items()
    ]
    outcomes.append((error_of(command(colours, tiny_vit)), "--dataset_name is"))
    outcomes.append((error_of(command(data, "scratch/article_cnn")), "--model_name_or_path is"))
    image = next((data / "train" / "down").iterdir())
    pixels = image.read_bytes()
    shutil.copy(next((data / "train" / "across").iterdir()), image)
    outcomes.append((error_of(command(data, tiny_vit)), "different pixels of"))
    image.write_bytes(pixels)
    image.rename(data / "train" / "across" / "moved.png")
    outcomes.append((error_of(command(data, tiny_vit)), "different split"))
    right = [status == 2 and wanted in message for (status, message), wanted in outcomes]
    print([outcome for outcome, good in zip(outcomes, right, strict=True) if not good])
    good = sum(right)
    record_result(
        11,
        "resumed with other data, labels, model or options, one change at a time",
        "refused, with the change named in the error",
        good,
        len(outcomes),
    )


def test_a_checkpoint_of_other_data_is_refused(
    tmp_path, stripes, colours, dropout_vit, uninterrupted
):
    source, _ = uninterrupted
    trainer = make_trainer(tmp_path / "run", colours, dropout_vit)
    with pytest.raises(UserError, match=r"belongs to a run with different split"):
        trainer.train(resume_from_checkpoint=str(source / "checkpoint-4"))

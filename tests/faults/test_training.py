"""Faults during training: non-finite losses, memory, disk, signals, killed workers, a second run."""

import os
import random
import resource
import shutil
import signal
import time

import psutil
import pytest
import torch
from faults.rig import digest, ended, in_child, make_trainer, start, wait_for
from safetensors.torch import load_file
from tiny import tiny_options
from transformers import TrainerCallback

from hf_cifar.cli import main
from hf_cifar.errors import UserError
from hf_cifar.runs.folder import RunFolder
from hf_cifar.runs.lock import LOCK_FILE, refuse_in_use
from hf_cifar.training.checkpoints import find_damage, newest_checkpoint


class AtStep(TrainerCallback):
    """Calls a function at the start of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def command(folder, data, model, *flags):
    """Return a command line of a run with evaluations and checkpoints every third step."""
    return ["finetune", *tiny_options(
        folder, data, model, "--num_train_epochs", "3", "--learning_rate", "1e-3",
        "--eval_strategy", "steps", "--eval_steps", "3", "--save_strategy", "steps", "--save_steps", "3",
        "--logging_steps", "1", "--precision", "fp32", *flags,
    )]  # fmt: skip


@pytest.mark.parametrize("kind", ["NaN image", "infinite loss"])
def test_non_finite_losses(tmp_path, stripes, tiny_vit, kind, record_result):
    folder, recorded = tmp_path / "run", tmp_path / "row"
    trainer = make_trainer(folder, stripes, tiny_vit, "--max_steps", "12", "--mixup_alpha", "0")
    draw = random.Random(0)

    def poisoned(step, place):
        def poison(module, inputs, output=None):
            if trainer.state.global_step != step or not module.training:
                return None
            recorded.write_text(str(int(trainer._row_ids[place])))
            if output is None:
                pixel_values = inputs["pixel_values"].clone()
                pixel_values[place] = torch.nan
                return (), {"pixel_values": pixel_values}
            output.logits[place] = torch.inf
            return output

        if kind == "NaN image":
            trainer.model.register_forward_pre_hook(
                lambda module, args, kwargs: poison(module, kwargs), with_kwargs=True
            )
        else:
            trainer.model.register_forward_hook(poison)
        try:
            trainer.train()
        except UserError as error:
            row = f"rows {recorded.read_text()} of train"
            return 0 if row in str(error) and f"step {step + 1} " in str(error) else 3
        return 4

    good = 0
    for _ in range(10):
        shutil.rmtree(folder, ignore_errors=True)
        step, place = draw.randrange(12), draw.randrange(8)
        named = in_child(lambda step=step, place=place: poisoned(step, place)) == 0
        finite = all(
            torch.isfinite(value).all()
            for path in folder.rglob("*.safetensors")
            if "rng" not in path.name
            for value in load_file(path).values()
        )
        good += named and finite and len(RunFolder(folder).checkpoints()) == min(2, step // 2)
    record_result(
        1,
        f"{kind} at a random step",
        "stops in that step and names the row; no checkpoint with it",
        good,
        10,
    )


def test_out_of_memory(tmp_path, stripes, tiny_vit, record_result):
    def too_large(limit):
        def refuse(module, args, kwargs):
            if len(kwargs["pixel_values"]) > limit and module.training:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        return refuse

    trainer = make_trainer(tmp_path / "a", stripes, tiny_vit, "--auto_find_batch_size")
    trainer.model.register_forward_pre_hook(too_large(2), with_kwargs=True)  # refuses 8, then 4
    trainer.train()
    fresh = make_trainer(
        tmp_path / "b", stripes, tiny_vit, "--per_device_train_batch_size", "2",
        "--gradient_accumulation_steps", "4",
    )  # fmt: skip
    fresh.train()
    batch = trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps
    good = batch == (2, 4) and digest(trainer.model) == digest(fresh.model)
    record_result(
        2,
        "out of memory in the first steps, twice (simulated), with `--auto_find_batch_size`",
        "same batch by accumulation; bit-identical to a new run with these settings",
        int(good),
        1,
    )


def test_out_of_memory_in_an_evaluation(tmp_path, stripes, tiny_vit, record_result):
    def refuse(module, args, kwargs):
        if not module.training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    trainer = make_trainer(
        tmp_path, stripes, tiny_vit, "--auto_find_batch_size", "--eval_strategy", "steps",
        "--eval_steps", "2",
    )  # fmt: skip
    trainer.model.register_forward_pre_hook(refuse, with_kwargs=True)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    good = trainer.args.per_device_train_batch_size == 8
    record_result(
        2,
        "out of memory during an evaluation",
        "the training batch size does not change",
        int(good),
        1,
    )


def test_disk_full_in_a_save(tmp_path, stripes, tiny_vit, record_result):
    folder = tmp_path / "run"
    trainer = make_trainer(folder, stripes, tiny_vit)

    def without_room(size):
        def limit():
            trainer.finish_checkpoint()  # the first one, which is hashed while training continues
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        trainer.add_callback(AtStep(3, limit))
        try:
            trainer.train()
        except UserError as error:
            one_line = "cannot save a checkpoint at step 4" in str(error)
            return 0 if one_line and "--resume_from_checkpoint last" in str(error) else 3
        return 4

    assert in_child(lambda: without_room(10**9)) == 4
    largest = max(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    good = 0
    for number in range(20):
        shutil.rmtree(folder)
        size = largest * number // 20
        clear = in_child(lambda size=size: without_room(size)) == 0
        left = [path.name for path in folder.iterdir()]
        good += clear and left == ["checkpoint-2"] and find_damage(folder / "checkpoint-2") is None
    record_result(
        3,
        "disk full during a save, at 20 sizes",
        "one clear line; the previous checkpoint is intact, nothing else is left",
        good,
        20,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals(tmp_path, stripes, tiny_vit, number, record_result):
    draw = random.Random(int(number))
    good = 0
    for run in range(25):
        folder, log = tmp_path / str(run), tmp_path / f"{run}.log"
        pid = start(
            lambda folder=folder: main(command(folder, stripes, tiny_vit, "--max_steps", "400")),
            log,
        )
        assert wait_for(f"step {draw.randrange(1, 12)}/400", log, pid), log.read_text()
        time.sleep(draw.uniform(0, 0.1))
        done = log.read_text().count("loss")
        os.kill(pid, number)
        status = ended(pid)
        checkpoint = newest_checkpoint(folder)
        saved = checkpoint is not None and int(checkpoint.name.split("-")[1]) >= done
        clean = not (folder / "model.safetensors").exists() and not (folder / LOCK_FILE).exists()
        good += status == 128 + number and saved and clean
    record_result(
        4,
        f"{number.name} at a random time during training, evaluations included",
        f"exit status {128 + number}, a checkpoint with every finished step, no model",
        good,
        25,
    )


def test_an_interrupted_evaluation_is_repeated(tmp_path, stripes, tiny_vit):
    """History and best checkpoint after a stop in mid-evaluation and a resume: those of an unstopped run."""
    flags = ["--eval_strategy", "steps", "--eval_steps", "2", "--per_device_eval_batch_size", "2"]

    def stop_in_evaluation(trainer):
        def stop(module, args, kwargs):
            if not module.training and trainer.state.global_step == 4:
                trainer.stop_signals.request.note(signal.SIGTERM)
                trainer.stop_signals.request.note = lambda number: None

        trainer.model.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            trainer.train()
        except KeyboardInterrupt:
            return 143
        return 0

    def history(folder):
        import json

        state = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())
        evaluations = [
            (record["step"], record["eval_loss"])
            for record in state["log_history"]
            if "eval_loss" in record
        ]
        return evaluations, state["best_global_step"], state["best_metric"]

    uninterrupted = make_trainer(tmp_path / "uninterrupted", stripes, tiny_vit, *flags)
    uninterrupted.train()
    interrupted = make_trainer(tmp_path / "interrupted", stripes, tiny_vit, *flags)
    assert in_child(lambda: stop_in_evaluation(interrupted)) == 143
    assert newest_checkpoint(tmp_path / "interrupted").name == "checkpoint-4"
    interrupted.train(resume_from_checkpoint=str(tmp_path / "interrupted" / "checkpoint-4"))
    assert history(tmp_path / "interrupted") == history(tmp_path / "uninterrupted")
    assert digest(interrupted.model) == digest(uninterrupted.model)


def test_a_killed_loader_worker(tmp_path, stripes, tiny_vit, record_result):
    flags = ["--pixel_store", "streamed", "--dataloader_num_workers", "2", "--max_steps", "4000"]
    flags += ["--eval_strategy", "no", "--save_steps", "20"]
    good = 0
    for run in range(10):
        folder, log = tmp_path / str(run), tmp_path / f"{run}.log"
        pid = start(lambda folder=folder: main(command(folder, stripes, tiny_vit, *flags)), log)
        assert wait_for(f"step {run + 2}/", log, pid), log.read_text()
        while len(workers := psutil.Process(pid).children()) < 2:
            time.sleep(0.01)
        workers[run % 2].kill()
        steps = log.read_text().count("step ")
        # A worker that had finished its share of the epoch is not missed: the next epoch starts new ones.
        good += reported_or_continued(log, steps + 9)
        os.kill(pid, signal.SIGKILL)
        ended(pid)
    record_result(
        5,
        "kill -9 of a loader process",
        "reported in one line, or training continues in the next epoch, within 10 s",
        good,
        10,
    )


def reported_or_continued(log, steps):
    """Return True if a run reports the dead process, or reaches step `steps`, within 10 s."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        text = log.read_text()
        if "a loader process was killed" in text or text.count("step ") > steps:
            return True
        time.sleep(0.05)
    return False


def test_a_second_run_in_the_same_folder(tmp_path, stripes, tiny_vit, record_result):
    folder, log = tmp_path / "run", tmp_path / "first.log"
    flags = ["--max_steps", "1000000", "--eval_strategy", "no", "--save_strategy", "no"]
    first = start(lambda: main(command(folder, stripes, tiny_vit, *flags)), log)
    assert wait_for("step 2/", log, first), log.read_text()

    def snapshot():
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}

    before, good = snapshot(), 0
    for number in range(20):
        resume = ["--resume_from_checkpoint", "last"] if number % 2 else []
        own_log = tmp_path / f"{number}.log"
        arguments = command(folder, stripes, tiny_vit, *flags, *resume)
        status = in_child(lambda arguments=arguments: main(arguments), own_log)
        good += (
            status == 2
            and f"in use by process {first} " in own_log.read_text()
            and snapshot() == before
        )
    os.kill(first, signal.SIGKILL)
    ended(first)
    refuse_in_use(folder)  # the lock of a dead process does not count
    assert (folder / LOCK_FILE).exists()
    last = command(
        folder, stripes, tiny_vit, *flags, "--resume_from_checkpoint", "last", "--max_steps", "2"
    )
    assert in_child(lambda: main(last), tmp_path / "last.log") == 0, (
        tmp_path / "last.log"
    ).read_text()
    assert not (folder / LOCK_FILE).exists()
    record_result(
        6,
        "a second run in the folder of a running one",
        "refused, with the first named in the error; no file changed",
        good,
        20,
    )

"""Runs in forked processes that may be killed; torch is imported once."""

import atexit
import contextlib
import gc
import hashlib
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from accelerate.state import AcceleratorState, PartialState
from safetensors import safe_open
from tiny import tiny_trainer

from hf_cifar.training.checkpoints import newest_checkpoint

# Random augmentation and mixing, and an average of the weights.
RANDOM = [
    "--crop_scale", "0.6", "--rotation", "10", "--mixup_alpha", "0.4", "--random_erasing", "0.5",
    "--ema_decay", "0.9",
]  # fmt: skip
STARTED = set()  # processes not waited for yet


@atexit.register
def kill_started():
    for pid in STARTED:
        os.kill(pid, signal.SIGKILL)


def make_trainer(folder, data, model, *flags):
    """A trainer of 6 steps that saves every second one."""
    return tiny_trainer(
        folder, data, model, "--learning_rate", "1e-3", "--eval_strategy", "no", "--save_strategy", "steps",
        "--save_steps", "2", "--save_total_limit", "2", "--max_steps", "6", "--logging_steps", "1000",
        *RANDOM, *flags,
    )  # fmt: skip


def resume(trainer):
    """Train like `--resume_from_checkpoint last`: from the newest intact checkpoint, or from the start.
    Returns the digest of the final weights."""
    checkpoint = newest_checkpoint(trainer.args.output_dir)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return digest(trainer.model)


def resumes_to(expected, trainer):
    """Return True if the run, resumed in another process, ends with the weights of this digest."""
    return in_child(lambda: resume(trainer) != expected) == 0


def digest(weights):
    """SHA-256 of all tensors of a model, a state dict, or a safetensors file."""
    if isinstance(weights, Path):
        with safe_open(weights, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    elif not isinstance(weights, dict):
        weights = weights.state_dict()
    sha = hashlib.sha256()
    for name in sorted(weights):
        sha.update(name.encode() + weights[name].detach().contiguous().numpy().tobytes())
    return sha.hexdigest()


def in_child(function, log=None):
    """Run a function in a forked process. Returns its exit status, or minus the number of a fatal signal."""
    return ended(start(function, log))


def start(function, log=None):
    """Start a function in a forked process, with its output in `log`. Returns the process id."""
    gc.freeze()  # otherwise garbage collection in the child would copy every page
    pid = os.fork()
    if pid == 0:
        status = 1
        with contextlib.suppress(BaseException):
            target = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(target, 1), os.dup2(target, 2)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
            try:
                status = function() or 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    gc.unfreeze()
    STARTED.add(pid)
    return pid


def ended(pid):
    """Wait for a process. Returns its exit status, or minus the number of a fatal signal."""
    STARTED.discard(pid)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def start_pair(function, port):
    """Start a function in two forked processes that train together over gloo. Returns their ids."""

    def as_rank(rank):
        PartialState._reset_state()
        AcceleratorState._reset_state()
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
        return function(rank)

    return [start(lambda rank=rank: as_rank(rank)) for rank in (0, 1)]


def wait_for(text, log, pid):
    """Wait until a process has written a text; returns False if it ended without it."""
    while text not in (log.read_text() if log.exists() else ""):
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return False
        time.sleep(0.01)
    return True


def kill_at_file_operation(folder, number):
    """Kill this process at its n-th operation (from 0) on files below a folder: opening, creating, renaming
    or removing one."""
    count = 0
    operations = {
        "open",
        "os.rename",
        "os.remove",
        "os.rmdir",
        "os.mkdir",
        "os.scandir",
        "os.listdir",
    }

    def hook(event, args):
        nonlocal count
        if event in operations and args and str(args[0]).startswith(str(folder)):
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    sys.addaudithook(hook)
    return lambda: count

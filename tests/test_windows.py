"""The package where nothing of POSIX is there: what Windows lacks is taken away from a process."""

import json
import subprocess
import sys

import pytest

# Gone for hf_cifar alone: libraries choose their calls by sys.platform.
WINDOWS = r"""
import builtins, ctypes, os, signal, sys, warnings

POSIX_MODULES = ("fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty")

def import_module(name, globals=None, *rest, load=builtins.__import__, **options):
    if name in POSIX_MODULES and globals and globals["__name__"].startswith("hf_cifar"):
        raise ModuleNotFoundError(f"No module named {name!r}")
    return load(name, globals, *rest, **options)

builtins.__import__ = import_module

def hide(module, hidden):
    kept = {name: module.__dict__.pop(name) for name in hidden if name in module.__dict__}

    def find(name):
        caller = sys._getframe(1).f_globals["__name__"]
        if name in kept and not caller.startswith("hf_cifar"):
            return kept[name]
        raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

    module.__getattr__ = find

hide(os, [
    "O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "WNOHANG", "chown", "chroot", "confstr", "fchmod",
    "fchown", "fork", "forkpty", "getegid", "geteuid", "getgid", "getgroups", "getloadavg", "getpgid",
    "getpgrp", "getuid", "killpg", "lchown", "mkfifo", "mknod", "nice", "pread", "preadv", "pwrite", "readv",
    "register_at_fork", "sched_getaffinity", "sched_setaffinity", "sched_yield", "sendfile", "setpgid",
    "setsid", "statvfs", "sync", "sysconf", "uname", "wait", "wait3", "wait4",
])
there = {"SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM", "SIG_DFL", "SIG_IGN"}
hide(signal, [name for name in dir(signal) if name.startswith(("SIG", "pthread", "sig")) and name not in there
              and name not in ("signal", "_signal")])

is_open, open_file, rename = set(), os.open, os.rename

def open_no_folder(path, flags, mode=0o777, *, dir_fd=None):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    descriptor = open_file(path, flags, mode)
    (is_open.discard if flags & (os.O_WRONLY | os.O_RDWR) else is_open.add)(descriptor)
    return descriptor

def flush(descriptor, fsync=os.fsync):
    if descriptor in is_open:
        raise OSError(9, "Bad file descriptor")
    fsync(descriptor)

def rename_to_new(old, new):
    if os.path.exists(new):
        raise FileExistsError(17, "Cannot create a file when that file already exists", new)
    rename(old, new)

def load_library(name, *rest, CDLL=ctypes.CDLL, **options):
    if name is None:
        raise TypeError("expected str, not NoneType")
    return CDLL(name, *rest, **options)

os.open, os.fsync, os.rename = open_no_folder, flush, rename_to_new
# Text without an encoding would be in that of the machine.
warnings.filterwarnings("error", category=EncodingWarning, module=r"hf_cifar(\.|$)")
"""
WORK = """
import hf_cifar
from hf_cifar.cli import main

def run(*argv):
    try:
        status = main([str(token) for token in argv])
    except SystemExit as end:
        status = end.code
    assert not status, argv

run("--help")
run("finetune", "--help")
data, model, image, folder = sys.argv[1:]
splits = hf_cifar.load_splits(hf_cifar.DataConfig(dataset_name=data))
assert len(splits.train) == 72, len(splits.train)
import torch
ctypes.CDLL = load_library
training = [
    "finetune", "--dataset_name", data, "--model_name_or_path", model, "--output_dir", folder, "--use_cpu",
    "--per_device_train_batch_size", "8", "--save_strategy", "steps", "--save_steps", "2",
    "--eval_strategy", "steps", "--eval_steps", "2", "--precision", "fp32", "--max_steps",
]
run(*training, "2")
run(*training, "4", "--resume_from_checkpoint", "last")
run("evaluate", "--model_name_or_path", folder, "--split", "test")
run("predict", "--model_name_or_path", folder, image)
run("runs", folder)
"""


@pytest.mark.slow
def test_data_training_evaluation_and_prediction(tmp_path, stripes, tiny_vit):
    image = next(stripes.rglob("*.png"))
    folder = tmp_path / "run"
    done = subprocess.run(
        [
            sys.executable, "-X", "warn_default_encoding", "-c", WINDOWS + WORK,
            stripes, tiny_vit, image, folder,
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    facts = json.loads((folder / "run.json").read_text())
    assert facts["steps"] == 4
    assert (folder / "checkpoint-4" / "SHA256SUMS").exists()
    assert "finished" in done.stdout

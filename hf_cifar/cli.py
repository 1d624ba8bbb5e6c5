"""`hf-cifar COMMAND`: the table of subcommands, and exit statuses. Torch is imported only when needed."""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from hf_cifar.commands import (
    combine,
    compare,
    compress,
    demo,
    doctor,
    drift,
    evaluate,
    explain,
    export,
    finetune,
    kfold,
    predict,
    prune,
    push,
    quantize,
    recipes,
    report,
    reproduce,
    runs,
    search,
    serve,
    update,
)
from hf_cifar.commands.command import Command
from hf_cifar.errors import UserError
from hf_cifar.platform import BROKEN_PIPE_STATUS, is_broken_pipe
from hf_cifar.runs.processes import is_main_process
from hf_cifar.runs.signals import Stopped, handled_signals, stop_at_once
from hf_cifar.text import one_line

USER_ERROR = 2
COMMANDS: dict[str, Command] = {
    "doctor": doctor.COMMAND,
    "finetune": finetune.COMMAND,
    "evaluate": evaluate.COMMAND,
    "kfold": kfold.COMMAND,
    "search": search.COMMAND,
    "update": update.COMMAND,
    "reproduce": reproduce.COMMAND,
    "combine": combine.COMMAND,
    "compare": compare.COMMAND,
    "compress": compress.COMMAND,
    "report": report.COMMAND,
    "runs": runs.COMMAND,
    "drift": drift.COMMAND,
    "predict": predict.COMMAND,
    "prune": prune.COMMAND,
    "export": export.COMMAND,
    "explain": explain.COMMAND,
    "serve": serve.COMMAND,
    "demo": demo.COMMAND,
    "push": push.COMMAND,
    "quantize": quantize.COMMAND,
    "recipes": recipes.COMMAND,
}


CONTINUED = ("kfold", "search", "update")  # by the same command, after an interruption


@handled_signals(stop_at_once, signal.SIGTERM)
def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; a user's mistake is one line on stderr and exit status 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    # Read when torch is loaded; hides DDP's warning about parameters that a model might not use.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # data/images.py reports problems of image files itself.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        status = _dispatch(argv)
        sys.stdout.flush()
        return status
    except UserError as error:
        return _report(error)
    except Exception as error:
        if isinstance(error, OSError) and is_broken_pipe(error) and not _reaches_reader():
            return BROKEN_PIPE_STATUS
        try:
            return _report_resources(error)
        except RuntimeError as late:  # torch reports a dead loader process when its signal arrives
            return _report_resources(late)
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        if is_main_process():
            hint = "; the same command continues" if argv and argv[0] in CONTINUED else ""
            print(f"hf-cifar: stopped by {signal.Signals(number).name}{hint}", file=sys.stderr)
        return 128 + number


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: hf-cifar COMMAND [options]\n")
        for name, command in COMMANDS.items():
            print(f"  {name:<11}{command.summary}")
        print("\nhf-cifar COMMAND --help lists the options of a command.")
        return 0 if argv else USER_ERROR
    if argv[0] == "--version":
        from importlib.metadata import version

        print(version("hf-cifar"))
        return 0
    if argv[0] not in COMMANDS:
        raise UserError(f"unknown command {argv[0]!r}; choose one of {', '.join(COMMANDS)}")
    return COMMANDS[argv[0]](argv[0], argv[1:])


def _reaches_reader() -> bool:
    """Return False if the reader of stdout, such as `head`, closed the pipe; a connection may break too.

    Remaining output is then discarded, because Python would fail to write it at exit.
    """
    try:
        print(flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def _report(error: Exception | str) -> int:
    if is_main_process():
        print(f"hf-cifar: error: {one_line(error)}", file=sys.stderr)
    return USER_ERROR


def _report_resources(error: Exception) -> int:
    """Report in one line that disk or memory ran out, or a process was killed. Raises: any other error."""
    # safetensors and torch wrap the system's error in their own.
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return _report(
            "no space left on the disk; free some space, then start again or resume from the last checkpoint"
        )
    if "DataLoader worker" in str(error):
        return _report(
            "a loader process was killed, which the system does when memory runs out; pass fewer "
            "--dataloader_num_workers, and --resume_from_checkpoint last to continue"
        )
    if type(error).__name__ == "OutOfMemoryError":
        return _report(
            f"{str(error).splitlines()[0]} Pass a smaller --per_device_train_batch_size (or "
            "--auto_find_batch_size true) or --per_device_eval_batch_size"
        )
    raise error


def run() -> NoReturn:
    """Console entry point."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8")  # pipes on Windows have another encoding
    sys.exit(main())

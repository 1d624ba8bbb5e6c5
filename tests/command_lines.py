"""Run command lines in a separate process, because the environment is read at its start."""

import dataclasses
import json
import re
import subprocess
import sys

# Runs the commands in sequence and marks the end of each in both streams.
COMMANDS = """
import json, os, sys, time, traceback
from hf_cifar.cli import main
for token, argv in json.loads(sys.argv[1]):
    os.environ.pop("HF_TOKEN", None)
    os.environ.update({"HF_TOKEN": token} if token else {})
    start = time.perf_counter()
    try:
        status = main(argv)
    except SystemExit as stop:
        status = stop.code
    except Exception:
        traceback.print_exc()
        status = None
    report = [status, time.perf_counter() - start, "torch" in sys.modules]
    print(f"<<{json.dumps(report)}>>", flush=True)
    print("<<>>", file=sys.stderr, flush=True)
"""


@dataclasses.dataclass
class Command:
    """Result of one command line."""

    status: int
    seconds: float
    loaded_torch: bool
    stdout: str
    stderr: str


def run_commands(commands, environment, wrapper=(), timeout=300, **options):
    """Run (token, argv) one after the other, in one process.

    wrapper: a command line that runs another. options: of subprocess.run.
    """
    done = subprocess.run(
        [*wrapper, sys.executable, "-c", COMMANDS, json.dumps(commands)],
        env=environment, capture_output=True, text=True, timeout=timeout, **options,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    stdout, stderr = re.split(r"<<(.*)>>\n", done.stdout), done.stderr.split("<<>>\n")
    return [
        Command(*json.loads(report), text, errors)
        for text, report, errors in zip(stdout[::2], stdout[1::2], stderr, strict=False)
    ]

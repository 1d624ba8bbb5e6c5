"""hf_cifar.process: one run a folder, and signals that wait."""

import json
import os
import platform
import signal
import subprocess
import sys

import pytest

from hf_cifar.errors import UserError
from hf_cifar.process import LOCK_FILE, Stopped, noted_signals, refuse_in_use, sole_run


def test_a_folder_is_held_and_let_go(tmp_path):
    folder = tmp_path / "new" / "run"
    with sole_run(folder):
        facts = json.loads((folder / LOCK_FILE).read_text())
        assert facts["pid"] == os.getpid()
        for attempt in (lambda: refuse_in_use(folder), lambda: sole_run(folder).__enter__()):
            with pytest.raises(UserError, match=f"in use by process {os.getpid()} on"):
                attempt()
        assert json.loads((folder / LOCK_FILE).read_text()) == facts
    assert list(folder.iterdir()) == []
    refuse_in_use(folder)
    refuse_in_use(tmp_path / "nowhere")


def test_the_lock_of_a_dead_process_is_none(tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from hf_cifar.process import sole_run
with sole_run(Path({str(tmp_path)!r})):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert (tmp_path / LOCK_FILE).exists()
    with sole_run(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK_FILE).exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_obeyed_when_asked(number):
    before = signal.getsignal(number)
    with noted_signals() as request:
        request.obey()
        os.kill(os.getpid(), number)
        with pytest.raises(Stopped) as stop:
            request.obey()
        assert stop.value.number == number
        with pytest.raises(Stopped):  # a second one does not wait
            os.kill(os.getpid(), number)
            signal.sigtimedwait([], 0)
    assert signal.getsignal(number) == before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_that_is_freed_costs_no_second_page_fault():
    code = """
import resource, torch
from concurrent.futures import ThreadPoolExecutor
from hf_cifar.process import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        [torch.ones(2 << 20) for _ in range(24)]  # of 8 MB, 2,048 pages each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
keep_freed_memory()
with ThreadPoolExecutor(1) as pool:
    pool.submit(faults).result(), faults()
    print(before, faults(), pool.submit(faults).result())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after, in_a_thread = map(int, done.stdout.split())
    assert max(after, in_a_thread) < before / 50

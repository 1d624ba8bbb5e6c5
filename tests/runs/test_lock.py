"""hf_cifar.runs.lock: one run per folder."""

import errno
import json
import os
import signal
import subprocess
import sys

import filelock
import pytest

from hf_cifar.errors import UserError
from hf_cifar.runs.lock import LOCK_FILE, refuse_in_use, sole_run


def test_a_folder_is_locked_and_released(tmp_path):
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


def test_the_lock_of_a_dead_process_does_not_count(tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from hf_cifar.runs.lock import sole_run
with sole_run(Path({str(tmp_path)!r})):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert (tmp_path / LOCK_FILE).exists()
    with sole_run(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_file_system_without_locks_warns(tmp_path, monkeypatch, caplog):
    def refuse(descriptor, *, blocking):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock, "lock_descriptor", refuse)
    with sole_run(tmp_path):
        refuse_in_use(tmp_path)
    assert "cannot lock" in caplog.text and "No locks available" in caplog.text


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_a_lock_of_another_user_is_seen(tmp_path):
    with sole_run(tmp_path):
        (tmp_path / LOCK_FILE).chmod(0o444)
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on"):
            refuse_in_use(tmp_path)


def test_a_lock_that_children_of_a_dead_process_keep_is_waited_for(tmp_path, caplog):
    """As the loader processes of a killed run do, until they notice that it is gone."""
    code = f"""
import os, signal, time
from pathlib import Path
from hf_cifar.runs.lock import sole_run
with sole_run(Path({str(tmp_path)!r})):
    if os.fork() == 0:
        time.sleep(1.5)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    with sole_run(tmp_path):
        assert "is locked by another run; waiting up to two minutes for the lock" in caplog.text

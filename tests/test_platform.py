"""hf_cifar.platform: the POSIX side; tests/test_windows.py has the other."""

import os
import re
import subprocess
import sys
from pathlib import Path

import hf_cifar
from hf_cifar.platform import flush_to_disk, remove_open_file


def test_flushes_files_and_folders(tmp_path, monkeypatch):
    flushed, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda d: flushed.append(os.fstat(d).st_ino) or fsync(d))
    (tmp_path / "file").write_bytes(b"text")
    flush_to_disk(tmp_path / "file")
    flush_to_disk(tmp_path)
    assert flushed == [(tmp_path / "file").stat().st_ino, tmp_path.stat().st_ino]


def test_a_name_that_another_has_taken_stays(tmp_path):
    with (tmp_path / "file").open("wb") as file:
        remove_open_file(tmp_path / "file", file)
    assert file.closed
    assert list(tmp_path.iterdir()) == []


def test_no_other_module_calls_what_is_posix_alone():
    calls = re.compile(
        r"^\s*(?:import|from) (?:fcntl|grp|pty|pwd|resource|syslog|termios|tty|ctypes)\b"
        r"|\bos\.(?:fork|get(?:e?[ug]id|pgid|loadavg)|kill|mkfifo|nice|set(?:sid|pgid)|sched_\w+|statvfs|"
        r"sysconf|uname|O_(?:DIRECTORY|NOFOLLOW|NONBLOCK|CLOEXEC))\b"
        r"|\bsignal\.SIG(?!INT\b|TERM\b)[A-Z]",
        re.MULTILINE,
    )
    found = {
        path.name: calls.findall(path.read_text(encoding="utf-8"))
        for path in Path(hf_cifar.__file__).parent.rglob("*.py")
    }
    assert [name for name, calls_in_file in found.items() if calls_in_file] == ["platform.py"]


def test_the_limit_of_open_files_is_raised():
    program = (
        "import resource; from hf_cifar.platform import allow_open_files\n"
        "_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard)); allow_open_files()\n"
        "assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)

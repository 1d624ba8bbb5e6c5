"""hf_cifar.progress: lines for logs, with count, rate and time left."""

import logging
import subprocess
import sys

import pytest

from hf_cifar import progress as module
from hf_cifar.progress import Progress, progress
from hf_cifar.text import duration


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_ten_seconds(clock, caplog):
    caplog.set_level(logging.INFO, logger="hf_cifar")
    shown = Progress("preparing train", 40_000)
    for clock[0] in (4.0, 8.0, 11.0, 15.0, 22.0):
        shown.update(1000)
    assert caplog.messages == [
        "preparing train: 3,000 of 40,000 images, 273/s, 2 min 16 s left",
        "preparing train: 5,000 of 40,000 images, 227/s, 2 min 34 s left",
    ]


def test_unknown_total_and_quick_work(clock, caplog):
    caplog.set_level(logging.INFO, logger="hf_cifar")
    for _ in progress(iter("abc"), "listing", unit="files"):
        clock[0] += 4
    assert caplog.messages == ["listing: 3 files, 0.25/s"]
    assert list(progress(range(3), "reading")) == [0, 1, 2]


def test_rates_have_no_exponent(clock):
    shown = Progress("preparing train", unit="images")
    clock[0] = 10.0
    shown.update(13_728)
    assert shown.line() == "preparing train: 13,728 images, 1,373/s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.7, "1 min"), (95, "1 min 35 s"), (7500, "2 h 5 min"), (7200, "2 h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_process_with_ipykernel_is_no_notebook():
    code = (
        "import ipykernel, IPython; from hf_cifar.progress import in_notebook; print(in_notebook())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

"""hf_cifar.runs.signals: signals that wait."""

import os
import signal

import pytest

from hf_cifar.runs.signals import Stopped, noted_signals


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

"""hf_cifar.runs.signals: deferred signals."""

import os
import signal

import pytest

from hf_cifar.runs.signals import Stopped, deferred_signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_recorded_and_raised_on_request(number):
    before = signal.getsignal(number)
    with deferred_signals() as request:
        request.raise_if_requested()
        os.kill(os.getpid(), number)
        with pytest.raises(Stopped) as stop:
            request.raise_if_requested()
        assert stop.value.number == number
        with pytest.raises(Stopped):  # a second one does not wait
            os.kill(os.getpid(), number)
            signal.sigtimedwait([], 0)
    assert signal.getsignal(number) == before

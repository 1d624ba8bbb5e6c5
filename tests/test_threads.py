"""hf_cifar.threads: order, errors, and the number of threads that torch uses afterwards."""

import contextlib
import os
import random
import subprocess
import sys
import time

import pytest
import torch

from hf_cifar.platform import num_cores
from hf_cifar.threads import map_in_threads


def test_results_are_in_order_whichever_is_ready_first(num_threads):
    def work(number):
        time.sleep(random.random() / 50)
        return number, torch.get_num_threads()

    results = list(map_in_threads(work, range(20), min(3, num_threads)))
    assert results == [(number, 1) for number in range(20)]
    assert list(map_in_threads(work, range(2), 1)) == [(n, num_threads) for n in range(2)]


def test_stopping_early_restores_the_number_of_threads(num_threads):
    begun = []
    with contextlib.closing(map_in_threads(begun.append, range(1000), num_threads)) as results:
        next(results)
    assert len(begun) <= 3 * num_threads + 1
    assert torch.get_num_threads() == num_threads


def test_error_in_a_batch_is_raised_to_the_caller(num_threads):
    def work(number):
        if number == 3:
            raise OSError("no such disk")
        return number

    results = map_in_threads(work, range(100), num_threads)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="no such disk"):
        next(results)
    assert torch.get_num_threads() == num_threads


@pytest.mark.skipif(num_cores() == 1, reason="one core")
def test_torch_used_later_for_the_first_time_uses_all_cores():
    code = """
from hf_cifar.threads import map_in_threads
list(map_in_threads(lambda number: number, range(10), 2))
import torch
print(torch.get_num_threads())
"""
    default = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=default, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) > 1

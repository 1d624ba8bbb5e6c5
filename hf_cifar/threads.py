"""Work in threads that share the cores, with torch operations in each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_threads(
    work: Callable[[Item], Result], items: Iterable[Item], num_threads: int
) -> Iterator[Result]:
    """Call `work` for each item, with torch's cores divided among the threads; yields results in order.

    On a CPU, a batch on its own core takes less core time than a batch on all cores, which wait for each
    other in every layer.
    """
    # A thread adopts the number that any other thread set before its own first operation; without this call,
    # the calling thread would too.
    all_cores = torch.get_num_threads()
    results: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(
        num_threads,
        initializer=torch.set_num_threads,
        initargs=(max(1, all_cores // num_threads),),
    )
    try:
        for item in items:
            results.append(pool.submit(work, item))
            if len(results) > 2 * num_threads:
                yield results.popleft().result()
        while results:
            yield results.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(all_cores)

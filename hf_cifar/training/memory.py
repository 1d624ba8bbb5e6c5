"""Reuse of freed memory in training on a CPU."""

from __future__ import annotations

import functools

from hf_cifar.platform import set_malloc_option

# From glibc's malloc.h: the amount of free memory above which it is returned to the system, and the largest
# numbers of mapped blocks and of arenas.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


@functools.cache
def keep_freed_memory() -> None:
    """Let the C library keep freed memory for this process.

    glibc maps a large block when it is allocated and unmaps it when it is freed. A training step frees what
    the next one allocates again, and the system clears every page in between; docs/speed.md has the cost.
    Does nothing with another C library.
    """
    set_malloc_option(M_MMAP_MAX, 0)
    set_malloc_option(M_TRIM_THRESHOLD, -1)
    set_malloc_option(M_ARENA_MAX, 1)  # memory of other arenas is always returned

"""Freed memory, kept by the C library for what a training on a CPU needs next."""

from __future__ import annotations

import ctypes
import functools

# glibc's, from malloc.h: the size from which free memory goes back to the system, the most mapped blocks, and
# the most arenas.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


@functools.cache
def keep_freed_memory() -> None:
    """Let the C library keep what is freed, for what this process needs next; for training on a CPU.

    glibc maps each large block anew and unmaps it when it is freed. But a training step frees what the next
    asks for again, and the system clears every page in between; docs/speed.md has what that costs. Nothing
    happens with another C library.

    Source: mallopt(3).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_ARENA_MAX, 1)  # those of further threads are given back all the same

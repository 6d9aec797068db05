"""How a process gets its memory from the system: what glibc's malloc keeps, and what it gives back.

By default glibc returns each block of more than 32 MiB to the system, which hands out zeroed pages for the next one. A
step of a large layer then waits for hundreds of MiB of zeroes that nobody reads: docs/benchmarks.md, the MoE layer.
"""

import ctypes
import os
from collections.abc import MutableMapping

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # mallopt(3)
_KEPT_BYTES = (1 << 31) - 1  # free memory at the end of the heap beyond this goes back; mallopt takes an int
_LARGE_BYTES = 1 << 20


def keep_freed_memory(env: MutableMapping[str, str] = os.environ) -> bool:
    """For a rank, which makes the same large tensors in every step: keep large blocks, and on huge pages.

    To be called before the first tensor: torch reads its environment once. What the user set there stands. Returns
    whether the C library was told: another one than glibc is left alone.
    """
    env.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    wanted = {"MALLOC_MMAP_MAX_": (_M_MMAP_MAX, 0), "MALLOC_TRIM_THRESHOLD_": (_M_TRIM_THRESHOLD, _KEPT_BYTES)}
    return _tell_malloc(*(pair for variable, pair in wanted.items() if variable not in env))


def return_freed_memory() -> bool:
    """For a process that moves data and must stay small: give every block of 1 MiB and more back at once.

    Scattered over the heap they add up to half as much again. Returns as `keep_freed_memory`.
    """
    return _tell_malloc((_M_MMAP_THRESHOLD, _LARGE_BYTES))


def _tell_malloc(*options: tuple[int, int]) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    for option, value in options:
        mallopt(option, value)
    return True

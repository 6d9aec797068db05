"""Threads that each take whole experts, for CPUs: many small products, one on each core, instead of one on all.

A product of 32 rows is too small to be cut over threads, which would meet at a barrier after each; on a machine that
others use, too, a barrier waits for whichever thread was put aside.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

Item = TypeVar("Item")


def share_out(items: Sequence[Item], work: Callable[[Iterator[Item]], None], *, num_threads: int) -> None:
    """Have `num_threads` threads, one torch thread each, call `work` with an iterator over what is left of `items`.

    Items are handed out in order, so the largest should come first. `work` runs without autograd. An exception in a
    thread is raised here. With one thread `work` runs in the caller's own.
    """
    left = deque(items)

    def handed_out() -> Iterator[Item]:
        while True:
            try:
                yield left.popleft()  # atomic
            except IndexError:
                return

    def work_without_autograd() -> None:
        with torch.no_grad():  # a thread starts with it on
            work(handed_out())

    if num_threads == 1:
        work_without_autograd()
        return
    for future in [_pool(num_threads, os.getpid()).submit(work_without_autograd) for _ in range(num_threads)]:
        future.result()


@cache
def _pool(num_threads: int, process: int) -> ThreadPoolExecutor:
    """The threads of `process`: a fork takes none of its parent's along."""
    started = threading.Barrier(num_threads)

    def compute_alone() -> None:
        # torch gives a thread the number set last, by whatever thread, when it first asks; so it asks before.
        torch.get_num_threads()
        started.wait()
        torch.set_num_threads(1)
        started.wait()

    own = torch.get_num_threads()
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="experts")
    for future in [pool.submit(compute_alone) for _ in range(num_threads)]:
        future.result()
    torch.set_num_threads(own)  # for threads that ask later
    return pool

"""Work that may hang in the kernel, such as writing to a file system that does not answer, done within a time."""

import contextlib
import threading
from collections.abc import Callable


def within(seconds: float, work: Callable[[], object]) -> bool:
    """Whether `work` was done in time; where it was not, its thread is left behind. Errors of `work` pass to nobody:
    they are not worth more than what waits for it."""

    def do() -> None:
        with contextlib.suppress(Exception):
            work()
        done.set()

    done = threading.Event()
    threading.Thread(target=do, daemon=True, name="bounded").start()
    return done.wait(seconds)

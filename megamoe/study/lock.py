"""One process at a time works in a study's folder; a child that outlives its parent for a moment counts. No torch."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megamoe.errors import ConfigError

LOCK = ".lock"
WAIT_SECONDS = 30.0  # for the end of what a study that was killed has left behind


@contextmanager
def study_lock(folder: Path, *, wait_seconds: float = WAIT_SECONDS) -> Iterator[int]:
    """The descriptor of a lock that is held; children who inherit it hold it as well.

    Raises ConfigError where another process keeps it for too long, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}): choose another folder with --out") from None
    try:
        until = time.monotonic() + wait_seconds
        while not _taken(descriptor, folder):
            if time.monotonic() >= until:
                raise ConfigError(f"another process works on the study in {folder}: wait for it, or end it first")
            time.sleep(0.2)
        yield descriptor
    finally:
        os.close(descriptor)


def _taken(descriptor: int, folder: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be locked ({error.strerror}), so that two commands could train there at once: choose a "
            "folder on a disk that can with --out (Lustre can when it is mounted with -o flock)"
        ) from None
    return True

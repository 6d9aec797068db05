"""Results go to stdout: what becomes of them where its reader is gone, or the disk behind it is full."""

import contextlib
import os
import sys
from collections.abc import Iterator

from megamoe.errors import OutputError


@contextlib.contextmanager
def printing(*, is_alone: bool = True) -> Iterator[None]:
    """Around prints of results, flush included. Raises OutputError where stdout takes no more.

    is_alone: no other rank goes on without this one, so that a reader such as `head`, which has seen enough, is a
    BrokenPipeError, with which `megamoe` ends quietly.
    """
    try:
        yield
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what it still holds is not tried again
        if not isinstance(error, BrokenPipeError):
            raise OutputError(f"stdout takes no more ({error.strerror}): free space or print elsewhere") from None
        if is_alone:
            raise
        raise OutputError("nobody reads stdout any more: what was left is not computed") from None

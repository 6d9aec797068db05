"""Stacks of all threads of this rank, in a file of the run's folder: asked for, or written without Python's lock."""

import contextlib
import faulthandler
import linecache
import os
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import IO

from megamoe.watchdog.bounded import within

WRITE_SECONDS = 2.0
_WAITING_FILES = ("/torch/distributed/", "/deepspeed/comm/")


class StackFile:
    """`path` is taken away again if nothing came to stand in it. Where it cannot be made, nothing is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115 (open while the rank is watched)

    def write_unless(self, seconds: float) -> None:
        """Stacks are written, even while one thread holds Python's lock, unless this is called again within so many
        seconds."""
        if self._file is not None:
            faulthandler.dump_traceback_later(seconds, exit=False, file=self._file)

    def write(self, title: str) -> None:
        """The stacks are taken in memory: a file system that hangs must not hang the thread that ends this rank."""
        if self._file is None:
            return
        faulthandler.cancel_dump_traceback_later()
        text = f"{title}\n\n{_names()}\n{_stacks()}"
        within(WRITE_SECONDS, lambda: self._append(text))

    def _append(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._file.seek(0, os.SEEK_END)  # what was written without Python's lock stays
            self._file.write(text)
            self._file.flush()

    def close(self) -> None:
        if self._file is None:
            return
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        with contextlib.suppress(OSError):
            if self.path.stat().st_size == 0:
                self.path.unlink()
                self.path.parent.rmdir()  # fails while another rank's file is there
                self.path.parent.parent.rmdir()


def waits_in_collective() -> bool:
    """Whether a thread of this process is inside a call of torch.distributed."""
    return any(_is_waiting(frame) for frame in sys._current_frames().values())


def _is_waiting(frame: FrameType) -> bool:
    """The innermost Python frame is one of torch.distributed, or is ours and waits for what it began."""
    code = frame.f_code
    if any(part in code.co_filename for part in _WAITING_FILES):
        return True
    return "/megamoe/" in code.co_filename and _line_waits(frame)


def _line_waits(frame: FrameType) -> bool:
    return "work.wait(" in linecache.getline(frame.f_code.co_filename, frame.f_lineno)


def _stacks() -> str:
    """Of all threads, as faulthandler writes them."""
    with open(os.memfd_create("stacks"), "w+", encoding="utf-8", errors="replace") as memory:
        faulthandler.dump_traceback(memory, all_threads=True)
        memory.seek(0)
        return memory.read()


def _names() -> str:
    """faulthandler names threads by number."""
    return "\n".join(f"thread 0x{thread.ident or 0:016x} is {thread.name}" for thread in threading.enumerate())

"""How far long work is: a line that rewrites itself on a terminal, plain lines now and then elsewhere."""

import sys
import time
from typing import TextIO

TERMINAL_INTERVAL_SECONDS = 0.2
PLAIN_INTERVAL_SECONDS = 10.0


class StatusLine:
    """The line. Work asks `is_due` before it goes to the trouble of a text."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._is_terminal = stream, stream.isatty()
        self._interval_seconds = TERMINAL_INTERVAL_SECONDS if self._is_terminal else PLAIN_INTERVAL_SECONDS
        self._printed = time.monotonic()
        self._width = 0

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self._printed >= self._interval_seconds

    def show(self, text: str) -> None:
        self._printed = time.monotonic()
        self._print(text, "" if self._is_terminal else "\n")

    def end(self, message: str | None = None) -> None:
        """Put `message` in the line's place, as a line of its own; without one take the line away."""
        if message is not None:
            self._print(message, "\n")
        elif self._width:
            self._print("", "\r")

    def _print(self, text: str, end: str) -> None:
        start = "\r" if self._is_terminal else ""
        print(start + text.ljust(self._width), end=end, file=self._stream, flush=True)
        self._width = len(text) if self._is_terminal and end != "\n" else 0


class ByteProgress:
    """Bytes done of bytes in all, speed and time left, on stderr."""

    def __init__(self, what: str, total_bytes: int) -> None:
        self._what, self._total_bytes, self._done_bytes = what, max(total_bytes, 1), 0
        self._line, self._started = StatusLine(sys.stderr), time.monotonic()

    def add(self, num_bytes: int) -> None:
        """So many bytes more are done; fewer, if it is negative: they are to be done again."""
        self._done_bytes += num_bytes
        if self._line.is_due:
            self._line.show(self._text(time.monotonic() - self._started))

    def finish(self) -> None:
        self._line.end()

    def _text(self, seconds: float) -> str:
        rate = self._done_bytes / max(seconds, 1e-9)
        left = max(0, self._total_bytes - self._done_bytes) / max(rate, 1.0)
        hours, minutes, rest = int(left // 3600), int(left // 60 % 60), int(left % 60)
        clock = f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
        share = 100 * self._done_bytes / self._total_bytes
        return f"{self._what} {share:3.0f}%  {rate / 1e6:.0f} MB/s  {clock} left"

"""Progress of offline work: a line that rewrites itself on a terminal, plain lines now and then elsewhere."""

import time
from typing import TextIO

TERMINAL_INTERVAL_SECONDS = 0.2
PLAIN_INTERVAL_SECONDS = 10.0


class Progress:
    """Counts documents and text bytes and prints their rates."""

    def __init__(self, stream: TextIO, total_bytes: int) -> None:
        """`total_bytes` is the size of the input files as they lie on disk."""
        self.text_bytes = 0
        self.num_documents = 0
        self._stream = stream
        self._total_bytes = max(total_bytes, 1)
        self._terminal = stream.isatty()
        self._interval_seconds = TERMINAL_INTERVAL_SECONDS if self._terminal else PLAIN_INTERVAL_SECONDS
        self._started = self._printed = time.monotonic()
        self._width = 0

    def add(self, num_documents: int, text_bytes: int, source_bytes: int) -> None:
        """Count finished work; `source_bytes` is the position reached in the inputs."""
        self.num_documents += num_documents
        self.text_bytes += text_bytes
        now = time.monotonic()
        if now - self._printed < self._interval_seconds:
            return
        self._printed = now
        seconds = now - self._started
        self._print(
            f"{100 * source_bytes / self._total_bytes:3.0f}%  {self.num_documents} documents  "
            f"{self.text_bytes / 1e6:.1f} MB  {self.num_documents / seconds:.0f} docs/s  "
            f"{self.text_bytes / 1e6 / seconds:.2f} MB/s",
            end="" if self._terminal else "\n",
        )

    def finish(self, message: str) -> None:
        """Print the last line."""
        self._print(message, end="\n")

    def _print(self, text: str, end: str) -> None:
        start = "\r" if self._terminal else ""
        print(start + text.ljust(self._width), end=end, file=self._stream, flush=True)
        self._width = len(text) if self._terminal else 0

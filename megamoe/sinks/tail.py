"""Following a file of JSON lines that somebody else writes."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_LINE_BYTES = 64 << 20
MARK_BYTES = 4096


class Tail:
    """The lines of a file, each once. A file that is replaced, as when steps are cut off it, is read anew."""

    def __init__(self, path: str | os.PathLike[str], *, position: int = 0) -> None:
        self.path, self.position = Path(path), position  # bytes that are read
        self._mark = b""  # the last of them
        self._number: int | None = None  # of the file on its disk, which may be given to another one later

    def is_replaced(self) -> bool:
        """Whether something else lies there than what was read; if so, the first line comes next."""
        try:
            with open(self.path, "rb") as file:
                found = os.fstat(file.fileno())
                file.seek(max(0, self.position - len(self._mark)))
                mark = file.read(len(self._mark))
        except OSError:
            return False
        known, self._number = self._number, found.st_ino
        if known in (None, found.st_ino) and found.st_size >= self.position and mark == self._mark:
            return False
        self.position, self._mark = 0, b""
        return True

    def lines(self) -> Iterator[dict[str, Any]]:
        """The objects of the whole lines that are there by now; what is no JSON object is left out."""
        try:
            file = open(self.path, "rb")  # noqa: SIM115 (closed below)
        except OSError:
            return
        with file:
            file.seek(self.position)
            while line := file.readline(MAX_LINE_BYTES):
                if not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES:
                    return  # the rest is still to come
                self.position += len(line)
                self._mark = line[-MARK_BYTES:]
                try:
                    value = json.loads(line)
                except ValueError:
                    continue
                if isinstance(value, dict):
                    yield value

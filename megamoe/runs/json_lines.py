"""Files of one JSON object a line that several processes append to and any crash may cut short."""

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megamoe.runs.metrics import to_json_line


def append_json_line(path: Path, tree: Mapping[str, Any], *, durable: bool = False) -> None:
    """Append one line, in one write, so that processes of several hosts may append at the same time.

    A line that a crash tore before is closed first, so that it takes no other along. durable: on disk on return.
    Raises OSError where the file cannot be written, a disk that took a part of the line only included.
    """
    line = (to_json_line(tree) + "\n").encode()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        if os.write(descriptor, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All objects in the order in which they were written; torn lines, and what is no object, are left out."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = []
    for line in text.split("\n"):
        try:
            tree = json.loads(line)
        except ValueError:
            continue
        if isinstance(tree, dict):
            found.append(tree)
    return found

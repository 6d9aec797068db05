"""Reading files of one JSON object a line that may be huge, torn, hostile, or still growing: in bounded memory."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pydantic_core import from_json

MAX_LINE_BYTES = 16 << 20  # a longer line is none of ours
_BLOCK_BYTES = 2 << 20


def json_lines(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The objects of a file, in order; none where there is no plain file. Lines that hold no object are left out."""
    for chunk in json_chunks(path):
        yield from chunk


def json_chunks(path: str | os.PathLike[str]) -> Iterator[list[dict[str, Any]]]:
    """`json_lines`, some thousand at a time."""
    file = _open_plain(Path(path))
    if file is None:
        return
    with file:
        rest, is_too_long = b"", False  # what has been read of a line, unless it is too long to be kept
        while block := file.read(_BLOCK_BYTES):
            *lines, last = block.split(b"\n")
            if lines:
                lines[0] = b"" if is_too_long else rest + lines[0]
                rest, is_too_long = b"", False
                yield _objects(lines)
            rest += b"" if is_too_long else last
            if len(rest) > MAX_LINE_BYTES:
                rest, is_too_long = b"", True
        yield _objects([rest])


def last_json_lines(path: str | os.PathLike[str], num_bytes: int) -> list[dict[str, Any]]:
    """The objects that lie whole in the last `num_bytes` of a file."""
    file = _open_plain(Path(path))
    if file is None:
        return []
    with file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - num_bytes))
        lines = file.read(num_bytes).split(b"\n")
    if size > num_bytes:
        del lines[0]  # its beginning is not in there
    return _objects(lines)


def _open_plain(path: Path) -> IO[bytes] | None:
    """None for what is missing, unreadable, or a pipe, whose reader would wait."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        return None
    return open(descriptor, "rb")


def _objects(lines: list[bytes]) -> list[dict[str, Any]]:
    try:
        values = [from_json(line, allow_inf_nan=False) for line in lines if line]
    except ValueError:  # some line is torn
        values = [_object(line) for line in lines]
    return [value for value in values if isinstance(value, dict)]


def _object(line: bytes) -> Any:
    try:
        return from_json(line, allow_inf_nan=False)
    except ValueError:
        return None

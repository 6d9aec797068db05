"""Files that survive: fsync, replacement as one act, and every OSError as a sentence with what to do."""

import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megamoe.checkpoint import faults
from megamoe.errors import CheckpointError, SaveError

# Bytes are hashed and copied in chunks that stay in a core's cache between the two.
CHUNK_BYTES = 1 << 20
WRITING = ".writing"  # how the names of files end that are not complete
_MAX_OPEN_FILES = 32

_ADVICE = {
    errno.ENOSPC: "free space or choose a run.dir on another disk",
    errno.EDQUOT: "free space within the quota or choose another run.dir",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f) or save from more ranks",
    errno.EROFS: "mount it writable or choose another run.dir",
    errno.EACCES: "make it writable or choose another run.dir",
    errno.EPERM: "make it writable or choose another run.dir",
    errno.ENOENT: "the folder has vanished: bring it back, or choose another run.dir",
    errno.ENOTDIR: "a file stands where a folder must be: remove it, or choose another run.dir",
    errno.ESTALE: "the file system was remounted: start again when it is back",
}


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turns an OSError in its body into a SaveError that names the file and says what to do."""
    try:
        yield
    except OSError as error:
        culprit = error.filename if error.filename is not None else path
        advice = _ADVICE.get(error.errno or 0, "check the disk")
        raise SaveError(
            f"{os.fsdecode(culprit)} cannot be written ({error.strerror or error}): {advice}; "
            "earlier checkpoints are whole"
        ) from None


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that renames in it last."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes, *, point: str | None = None, writer: str = "") -> None:
    """Write a small file as one act: readers see the old or the new content, also after a crash.

    `point` names the fault points on the way: "<point>-written", "<point>-synced", "<point>-renamed". Where several
    may write one file at the same time, `writer` is of each its own: without it they would write into one another.
    """
    temporary = temporary_name(path, writer)
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        _reach(point, "written")
        os.fsync(file.fileno())
        _reach(point, "synced")
    os.replace(temporary, path)
    _reach(point, "renamed")


def temporary_name(path: Path, writer: str = "") -> Path:
    """What `replace_file` may leave behind when the process dies in it."""
    return path.with_name(f".{path.name}{writer}{WRITING}")


def _reach(point: str | None, end: str) -> None:
    if point is not None:
        faults.reach(f"{point}-{end}")


def write_all(descriptor: int, data: memoryview) -> None:
    """Write every byte: one call may take fewer, and says so only by its result."""
    while len(data):
        data = data[os.write(descriptor, data) :]


def open_regular(path: Path) -> int:
    """A descriptor for reading. Raises CheckpointError for a symlink, a pipe, or anything but a plain file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CheckpointError(f"{path} is a symbolic link: a checkpoint holds its own files") from None
        if error.errno == errno.ENOENT:
            raise CheckpointError(f"{path} is missing: the checkpoint is incomplete") from None
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path} is no plain file")
    return descriptor


class OpenFiles:
    """Files opened for reading when they are first asked for; those used last stay open. For one thread."""

    def __init__(self, opens: Callable[[Path], int] = open_regular) -> None:
        self._opens = opens
        self._descriptors: OrderedDict[Path, int] = OrderedDict()

    def descriptor(self, path: Path) -> int:
        """Raises what `opens` does."""
        if path in self._descriptors:
            self._descriptors.move_to_end(path)
            return self._descriptors[path]
        if len(self._descriptors) >= _MAX_OPEN_FILES:
            os.close(self._descriptors.popitem(last=False)[1])
        descriptor = self._opens(path)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)  # the kernel reads further ahead
        self._descriptors[path] = descriptor
        return descriptor

    def close(self) -> None:
        """Reading opens them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])


def read_small(path: Path, limit_bytes: int) -> bytes:
    """All of a plain file. Raises CheckpointError when it is no plain file, unreadable, or above the limit."""
    descriptor = open_regular(path)
    with open(descriptor, "rb") as file:
        if os.fstat(descriptor).st_size > limit_bytes:
            raise CheckpointError(f"{path} is larger than any manifest: {os.fstat(descriptor).st_size} bytes")
        try:
            return file.read(limit_bytes)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None


def read_into(descriptor: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fill `buffer` from byte `offset` on. Raises CheckpointError where the file ends before."""
    filled = 0
    while filled < len(buffer):
        try:
            count = os.preadv(descriptor, [buffer[filled:]], offset + filled)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read at byte {offset + filled} ({error.strerror})") from None
        if count == 0:
            raise CheckpointError(f"{path} ends at byte {offset + filled}: it is truncated")
        filled += count

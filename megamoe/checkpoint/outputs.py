"""Where the output of an offline command grows: a hidden folder beside its place, renamed when it is whole.

For one process at a time and those that it forks off. A command that was killed finds its folder again by the plan:
what it was to make of what.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from megamoe.checkpoint import faults
from megamoe.checkpoint.files import WRITING, sync_folder
from megamoe.checkpoint.folders import remove_tree
from megamoe.errors import ConfigError, OutputError, SaveError

POINTS = ("output-cleaned", "output-synced", "output-renamed")  # of `megamoe.checkpoint.faults`
_PARTIAL = ".partial"
_LOCK_SECONDS = 10.0  # that processes of a killed run may take to notice

_ADVICE = {
    errno.ENOSPC: "free space or choose an output on another disk",
    errno.EDQUOT: "free space within the quota or choose another output",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "mount it writable or choose another output",
    errno.EACCES: "make it writable or choose another output",
    errno.EPERM: "make it writable or choose another output",
    errno.ENOENT: "make its folder or choose another output",
    errno.EISDIR: "it is a folder: choose another output",
}


@contextlib.contextmanager
def writing(path: Path, *, remove: Path | None = None, goes_on: bool = True) -> Iterator[None]:
    """Turns an OSError in its body into an OutputError that names the file and says what to do.

    remove: a half file that goes then, so that a full disk has room again. goes_on: whether the command, given again,
    keeps what is finished.
    """
    try:
        yield
    except OSError as error:
        _remove(remove)
        raise _not_written(path, error, goes_on=goes_on) from None
    except SaveError as error:  # what the writer of checkpoints has made of an OSError
        cause = error.__context__
        if not isinstance(cause, OSError):
            raise
        raise _not_written(path, cause) from None
    except BaseException:
        _remove(remove)
        raise


def check_places(sources: Iterable[Path], out: Path) -> None:
    """Raises ConfigError for an output that exists or lies in a source."""
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out} exists already: choose a name for the output that does not")
    for source in sources:
        if not out.name or out.resolve().is_relative_to(source.resolve()):
            raise ConfigError(f"{out} lies within {source}: write the output beside it")


@contextlib.contextmanager
def growing(out: Path, plan: str) -> Iterator[Path]:
    """The hidden folder in which `out` grows. `plan` is the command's name, a hyphen, and what stands for its work.

    What runs of the same command with another plan have left goes, and files that a killed run of this one left half
    written. Raises OutputError where another process writes there, or the disk refuses.
    """
    partial = out.parent / f".{out.name}.{plan}{_PARTIAL}"
    with writing(partial):
        partial.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _lock(descriptor, out)
        if not partial.is_dir() or os.stat(partial).st_ino != os.fstat(descriptor).st_ino:
            raise OutputError(f"{out} has just been written by another process")
        prefix = f".{out.name}.{plan.partition('-')[0]}-"
        for name in os.listdir(out.parent):
            if name.startswith(prefix) and name.endswith(_PARTIAL) and name != partial.name:
                _remove_other(out.parent / name, out)
        with writing(partial):
            for folder, _, names in os.walk(partial):
                for name in names:
                    if name.endswith(WRITING):
                        os.unlink(Path(folder) / name)
        yield partial
    finally:
        os.close(descriptor)


def put_in_place(partial: Path, out: Path, *, keep: Callable[[str], bool] = lambda name: True) -> None:
    """Remove what `keep` does not, flush all folders, and give `partial` its final name."""
    with writing(out):
        for name in os.listdir(partial):
            if not keep(name):
                os.unlink(partial / name)
        faults.reach("output-cleaned")
        for folder, _, _ in os.walk(partial, topdown=False):
            sync_folder(Path(folder))
        faults.reach("output-synced")
        if out.exists() or out.is_symlink():
            raise OutputError(f"{out} has appeared meanwhile: move it away, the same command then finishes")
        os.rename(partial, out)
        faults.reach("output-renamed")
        sync_folder(out.parent)


def check_room(folder: Path, num_bytes: int) -> None:
    """Raises OutputError where the disk cannot take `num_bytes` more."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OutputError(
            f"{folder} has {free / 1e9:.2f} GB free, the output needs {num_bytes / 1e9:.2f} GB more: "
            "free space or choose an output on another disk"
        )


def _not_written(path: Path, error: OSError, *, goes_on: bool = True) -> OutputError:
    culprit = error.filename if error.filename is not None else path
    advice = _ADVICE.get(error.errno or 0, "check the disk")
    then = "; the same command then goes on from the last finished file" if goes_on else ""
    return OutputError(f"{os.fsdecode(culprit)} cannot be written ({error.strerror or error}): {advice}{then}")


def _remove_other(partial: Path, out: Path) -> None:
    """What a run with other arguments left, unless it still writes there."""
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _lock(descriptor, out)
            remove_tree(partial)
        finally:
            os.close(descriptor)


def _lock(descriptor: int, out: Path) -> None:
    """Whoever was forked off holds the lock, too: it is free when the last process of a killed run is gone."""
    give_up = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > give_up:
                raise OutputError(f"another process is writing {out}: wait for it, or end it") from None
            time.sleep(0.05)
        except OSError:  # a file system without locks
            return


def _remove(path: Path | None) -> None:
    if path is not None:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)

"""One child at a time: a command of megamoe, its words in a file, ended with its parent. No torch."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from megamoe.errors import OutputError, TrainingInterrupted
from megamoe.launch.server import die_with_parent

COMMAND = (sys.executable, "-m", "megamoe")
POLL_SECONDS = 0.25
MESSAGE_CHARACTERS = 400
_NO_REASON = ("megamoe: note:", "megamoe: warning:")  # said by commands that go on


def run_command(
    arguments: Sequence[str], log: Path, *, poll: Callable[[], None], stop_seconds: float, held: Sequence[int] = ()
) -> tuple[int, str]:
    """`python -m megamoe ARGUMENTS`, output appended to `log`; its exit code, and what it has said last.

    `poll` is called while it works. held: descriptors that stay open as long as the child lives. A signal to stop is
    passed on, and the child has stop_seconds to save; then it is killed, and TrainingInterrupted is raised. Raises
    OutputError where the log cannot be written, or no process can be started.
    """
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        with _opened(log) as output:
            begin = os.fstat(output.fileno()).st_size
            child = _started(arguments, output, held)
        while not asked:
            try:
                code = child.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                poll()
                continue
            if not asked:  # else both were: a child that a signal ended has not failed
                return code, last_message(log, begin)
        _stop(child, stop_seconds)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    raise TrainingInterrupted("the study was asked to stop: what is done is kept, the same command goes on from there")


def _opened(log: Path) -> BinaryIO:
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        return open(log, "ab")
    except OSError as error:
        raise OutputError(f"{log} cannot be written ({error.strerror}): choose another folder with --out") from None


def _started(arguments: Sequence[str], output: BinaryIO, held: Sequence[int]) -> subprocess.Popen:
    parent = os.getpid()
    try:
        return subprocess.Popen(
            [*COMMAND, *arguments], stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, pass_fds=held, start_new_session=True,
            preexec_fn=lambda: die_with_parent(signal.SIGTERM, parent),
        )  # fmt: skip
    except OSError as error:
        raise OutputError(f"{COMMAND[0]} cannot be started ({error.strerror}): free memory, or end others") from None


def _stop(child: subprocess.Popen, seconds: float) -> None:
    until = time.monotonic() + seconds
    child.send_signal(signal.SIGTERM)
    while child.poll() is None and time.monotonic() < until:
        time.sleep(POLL_SECONDS)
    if child.poll() is None:
        child.kill()
        child.wait()


def last_message(log: Path, begin: int = 0) -> str:
    """What a command that failed has said last, from byte `begin` on: a line that tells of an error, or else the last.

    What an earlier command has said before that byte is no reason of this one.
    """
    try:
        with open(log, "rb") as file:
            file.seek(max(begin, os.fstat(file.fileno()).st_size - 16_384))
            lines = [line.strip() for line in file.read().decode("utf-8", errors="replace").splitlines()]
    except OSError:
        return "it has said nothing"
    lines = [line for line in lines if line]
    told = [line for line in lines if line.startswith("megamoe:") or "error" in line.lower()]
    told = [line for line in told if not line.startswith(_NO_REASON)] or lines
    return told[-1][:MESSAGE_CHARACTERS] if told else "it has said nothing"


def run_here(arguments: Sequence[str]) -> int:
    """`python -m megamoe ARGUMENTS` with this process's own output, until it has ended; its exit code."""
    return subprocess.call([*COMMAND, *arguments], stdin=subprocess.DEVNULL)

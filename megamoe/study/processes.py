"""One child at a time: a command of megamoe, its words in a file, ended with its parent. No torch."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megamoe.errors import TrainingInterrupted
from megamoe.launch.server import die_with_parent

COMMAND = (sys.executable, "-m", "megamoe")
POLL_SECONDS = 0.25
MESSAGE_CHARACTERS = 400


def run_command(
    arguments: Sequence[str], log: Path, *, poll: Callable[[], None], stop_seconds: float, held: Sequence[int] = ()
) -> int:
    """`python -m megamoe ARGUMENTS`, output appended to `log`; its exit code. `poll` is called while it works.

    held: descriptors that stay open as long as the child lives. A signal to stop is passed on, and the child has
    stop_seconds to save; then it is killed, and TrainingInterrupted is raised. OSErrors pass.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    parent, asked = os.getpid(), []

    def ask(number: int, frame: object) -> None:
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        with open(log, "ab") as output:
            child = subprocess.Popen(
                [*COMMAND, *arguments], stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, pass_fds=held, start_new_session=True,
                preexec_fn=lambda: die_with_parent(signal.SIGTERM, parent),
            )  # fmt: skip
        while not asked:
            try:
                code = child.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                poll()
                continue
            if not asked:  # else both were: a child that a signal ended has not failed
                return code
        _stop(child, stop_seconds)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    raise TrainingInterrupted("the study was asked to stop: what is done is kept, the same command goes on from there")


def _stop(child: subprocess.Popen, seconds: float) -> None:
    until = time.monotonic() + seconds
    child.send_signal(signal.SIGTERM)
    while child.poll() is None and time.monotonic() < until:
        time.sleep(POLL_SECONDS)
    if child.poll() is None:
        child.kill()
        child.wait()


def last_message(log: Path) -> str:
    """What a command that failed has said last: the line that begins as messages of megamoe do, or else the last."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 16_384))
            lines = [line.strip() for line in file.read().decode("utf-8", errors="replace").splitlines()]
    except OSError:
        return "it has said nothing"
    lines = [line for line in lines if line]
    told = [line for line in lines if line.startswith("megamoe:") or "error" in line.lower()] or lines
    return told[-1][:MESSAGE_CHARACTERS] if told else "it has said nothing"


def run_here(arguments: Sequence[str]) -> int:
    """`python -m megamoe ARGUMENTS` with this process's own output, until it has ended; its exit code."""
    return subprocess.call([*COMMAND, *arguments], stdin=subprocess.DEVNULL)

"""The process that feeds one tracking service: `python -m megamoe.sinks.process`, started by `megamoe.sinks.tracker`.

It reads one line of JSON from its input, the spec; whatever comes after that wakes it; the end of its input means that
training has ended, or was killed: it writes out what is left and goes, within a bound. It answers in lines of JSON:
{"ready": true}, {"events_position": bytes} that are told, {"failed": "why"}, {"done": true}. Signals that end a job do
not end it: training's process does.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

HEEDLESS_OF = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
PUMP_SECONDS = 2.0  # between looks at the files: each takes a processor from training
START_SECONDS = 20.0  # beyond the service's own limit: a short run ends before its feeder is there


class Input:
    """What training's process says, read by a thread."""

    def __init__(self, descriptor: int) -> None:
        self._file = os.fdopen(descriptor, "rb", buffering=0)
        self.spec: dict[str, Any] = json.loads(self._first_line())
        self.ended = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _first_line(self) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            byte = self._file.read(1)
            if not byte:
                raise EOFError("training ended before it said what to do")
            line += byte
        return line

    def _read(self) -> None:
        while self._file.read(4096):
            pass
        self.ended.set()
        timer = threading.Timer(self.spec["close_seconds"] + START_SECONDS, os._exit, (1,))
        timer.daemon = True
        timer.start()


def step_back(niceness: int) -> None:
    """Take what processor time training leaves (at 19; at 0 a fair share), also with what a service has started. Where
    Linux groups processes by session (sched_autogroup), niceness counts for nothing between groups: then the group's
    is what counts."""
    if os.nice(0) < niceness:
        os.nice(niceness - os.nice(0))
    waiting = [os.getpid()]
    while waiting:
        pid = waiting.pop()
        with contextlib.suppress(OSError):  # it has ended; or this Linux has no such groups
            Path(f"/proc/{pid}/autogroup").write_text(str(niceness))
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())


def main() -> None:
    for number in HEEDLESS_OF:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HEEDLESS_OF)
    # Nothing that a service prints, or asks, may get into the conversation.
    said, answers = Input(os.dup(0)), os.fdopen(os.dup(1), "w", encoding="utf-8")
    step_back(said.spec["niceness"])
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)

    def answer(what: dict[str, Any]) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    exit_code = 1
    try:
        _feed(said, answer)
        exit_code = 0
    except BaseException as error:  # of whatever kind: training's process must hear of it
        traceback.print_exc()
        answer({"failed": f"{type(error).__name__}: {error}".splitlines()[0]})
    finally:
        sys.stderr.flush()
        os._exit(exit_code)  # a service that hangs when the interpreter ends is left behind


def _feed(said: Input, answer: Any) -> None:
    from megamoe.sinks.feed import Feed

    if said.spec["service"] == "wandb":
        from megamoe.sinks.wandb_sink import WandbSink as Service
    else:
        from megamoe.sinks.tensorboard_sink import TensorboardSink as Service
    spec, told = said.spec, None
    feed = Feed(spec["run_dir"], Service(spec), events_position=spec["events_position"], tells_late=spec["tells_late"])
    answer({"ready": True})
    is_last = False
    while not is_last:
        is_last = said.ended.is_set()  # what was written before that is read once more
        feed.pump()
        step_back(spec["niceness"])
        if feed.events_position != told:
            told = feed.events_position
            answer({"events_position": told})
        if not is_last:
            said.ended.wait(PUMP_SECONDS)
    feed.sink.close()
    answer({"done": True})


if __name__ == "__main__":
    main()

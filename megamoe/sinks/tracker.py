"""Training's end of a tracking service: starts the process that feeds it, wakes it, and never waits for it.

The process follows the run's own files, so nothing is handed over and nothing can pile up: a service that is slow,
refuses or is gone delays that process alone, and whatever it missed is written when it goes on. If it fails it is
started again, Weights & Biases offline if it has never got online; after MAX_FAILURES the run goes on without it.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megamoe.sinks.process import HEEDLESS_OF

MAX_FAILURES = 4
RETRY_SECONDS = 5.0  # longest pause after a failure
CLOSE_SECONDS = 30.0  # beyond the service's own limit, for the process to start and to end
CLOSE_POLL_SECONDS = 0.2
LOG_FILE = "trackers.log"
LABELS = {"wandb": "Weights & Biases", "tensorboard": "TensorBoard"}


class Tracker:
    """One tracking service of a run. `say` prints a line. No method raises, and only `close` waits."""

    def __init__(self, spec: Mapping[str, Any], say: Callable[[str], None]) -> None:
        """`spec`: service ("wandb", "tensorboard"), run_dir, config, close_seconds, niceness; resume_step,
        events_position, and for wandb mode, run_id, details."""
        self.spec, self._say = dict(spec) | {"process": os.getpid(), "tells_late": True}, say
        self._label = LABELS[spec["service"]]
        self._num_failures, self._is_ready, self._is_done, self._reason = 0, False, False, ""
        self._answers, self._retry_at = b"", 0.0
        self._process: subprocess.Popen | None = None
        self._start()

    def look_after(self) -> None:
        """Look after the process, which looks into the run's files by itself."""
        self._look()

    def close(self) -> None:
        """Training has ended: wait until all is written, within bounds."""
        deadline = time.monotonic() + self.spec["close_seconds"] + CLOSE_SECONDS
        while not self._is_done and self._num_failures <= MAX_FAILURES and time.monotonic() < deadline:
            self._look()
            if self._process is None:
                time.sleep(CLOSE_POLL_SECONDS)
                continue
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(CLOSE_POLL_SECONDS)
            self._look()
        if self._process is not None and self._process.poll() is None and not self._is_done:
            self._process.kill()
            self._process.wait()
            self._say(f"{self._label} is not complete: it did not end within bounds. Metrics are in metrics.jsonl")

    def let_go(self) -> None:
        """Training ends in an error, which must not wait: the process hears of it, and ends by itself in its bounds."""
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def _look(self) -> None:
        """Hear what the process has said; if it has failed, start another."""
        process = self._process
        if process is None:
            if not self._is_done and self._num_failures <= MAX_FAILURES and time.monotonic() >= self._retry_at:
                self._start()
            return
        has_ended = process.poll() is not None  # before its last words are read
        self._hear(process)
        if not has_ended:
            return
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        self._process = None
        if not self._is_done:
            self._fail(self._reason or f"its process ended with code {process.returncode}")

    def _hear(self, process: subprocess.Popen) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(process.stdout.fileno(), 1 << 16):
                self._answers += data
        *lines, self._answers = self._answers.split(b"\n")
        for line in lines:
            try:
                answer = json.loads(line)
            except ValueError:
                continue  # of something that prints before the process has taken its output away
            if not isinstance(answer, dict):
                continue
            self._is_ready |= "ready" in answer
            self._is_done |= "done" in answer
            if "events_position" in answer:  # another process tells nobody twice
                self.spec |= {"events_position": answer["events_position"], "tells_late": False}
            self._reason = answer.get("failed", self._reason)

    def _fail(self, reason: str) -> None:
        self._num_failures += 1
        self._retry_at = time.monotonic() + min(RETRY_SECONDS, self._num_failures - 1)
        if self._num_failures > MAX_FAILURES:
            self._say(f"{self._label} is no longer used: {reason}. Metrics go to metrics.jsonl")
            return
        if self.spec.get("mode") == "online" and not self._is_ready:
            self.spec["mode"] = "offline"
            self._say(f"{self._label} is not reached: {reason}. The run is offline: `wandb sync` sends it later")
        elif self._num_failures == 1:
            self._say(f"{self._label} failed and is started again: {reason}")

    def _start(self) -> None:
        self._is_ready, self._reason, self._answers = False, "", b""
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        # It is born deaf to the signals that end a job, and hears of the end by its input.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, HEEDLESS_OF)
        try:
            with self._log_file() as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "megamoe.sinks.process"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                    stderr=log, env=dict(os.environ) | {"PYTHONPATH": path}, start_new_session=True,
                )  # fmt: skip
            self._process.stdin.write(json.dumps(self.spec).encode() + b"\n")
            self._process.stdin.flush()
            os.set_blocking(self._process.stdin.fileno(), False)
            os.set_blocking(self._process.stdout.fileno(), False)
        except OSError as error:
            self._fail(str(error))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _log_file(self) -> Any:
        """For what the service itself prints."""
        try:
            return open(Path(self.spec["run_dir"]) / LOG_FILE, "ab")
        except OSError:
            return open(os.devnull, "wb")

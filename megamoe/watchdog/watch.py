"""The watchdog's thread of one rank: heartbeats to rank 0, stacks when it asks, the end when it says so."""

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megamoe.watchdog.channel import Address, Line, connect
from megamoe.watchdog.clock import PatientClock
from megamoe.watchdog.judge import LOST_SECONDS, Report, Verdict
from megamoe.watchdog.progress import Progress
from megamoe.watchdog.server import Server
from megamoe.watchdog.stacks import StackFile, waits_in_collective

LISTEN_SECONDS = 0.25  # at a time: how long the end of a run may have to wait for this thread
RETRY_SECONDS = 0.3
END_SECONDS = 5.0  # what the training thread has to end by itself once a peer is known to be lost


@dataclass(frozen=True)
class Settings:
    """timeout_seconds: without progress, or without a word of rank 0; slow_timeout_seconds: without progress while the
    run starts or ends, saves, validates or samples."""

    timeout_seconds: float
    slow_timeout_seconds: float
    poll_seconds: float


class Watch:
    """Watches this rank. `end` is called, on the watchdog's thread, with the verdict that ends this process.

    `count_collectives` gives the number of collectives that this rank has called, by group.
    """

    def __init__(
        self, rank: int, host: str, address: Address, settings: Settings, progress: Progress, stacks: StackFile,
        *, count_collectives: Callable[[], Mapping[str, int]], end: Callable[[Verdict], None],
        server: Server | None = None,
    ) -> None:  # fmt: skip
        self.rank, self.host, self.address, self.settings = rank, host, address, settings
        self.progress, self.stacks, self.server = progress, stacks, server
        self.verdict: Verdict | None = None
        self._count_collectives, self._end = count_collectives, end
        self._clock = PatientClock(2 * settings.poll_seconds + 1)
        self._mark, self._marked_at = progress.mark, 0.0
        self._heard_at = 0.0  # when rank 0 last said something
        self._broken_at: float | None = None
        self._verdict_at: float | None = None
        self._is_refused = self._is_over = False
        self._line: Line | None = None
        self._first = (address.host, 0, progress.stage)  # host, step and phase of rank 0 when it was last heard
        self._sending = threading.Lock()
        self._has_verdict, self._stopping = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Raises OSError where rank 0's watchdog cannot be reached."""
        self._line = connect(self.address, self.rank, self.host)
        self._thread.start()

    def leave(self) -> None:
        """This rank ends in good order."""
        self._send({"do": "leave"})
        self._stop()
        if self.server is not None:
            self.server.stop()

    def fail(self, message: str, *, is_consequence: bool, wait_seconds: float) -> Verdict | None:
        """This rank ends in an error. Returns whom the others' reports blame, if that is known in time."""
        self._send({"do": "fail", "message": message[:500], "is_consequence": is_consequence,
                    "report": vars(self.report())})  # fmt: skip
        if wait_seconds > 0:
            self._has_verdict.wait(wait_seconds)
        self._stop()
        return self.verdict

    def report(self) -> Report:
        now, progress = self._clock.read(), self.progress
        mark = progress.mark
        if mark != self._mark:
            self._mark, self._marked_at = mark, now
        settings = self.settings
        limit = settings.slow_timeout_seconds if progress.is_slow else settings.timeout_seconds
        return Report(progress.stage, progress.step, progress.phase, now - self._marked_at, limit)

    def _stop(self) -> None:
        self._stopping.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(self.settings.poll_seconds + 1.0)
        self.stacks.close()

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._poll()
        except Exception as error:  # a defect of ours must not end the run, nor look as if this rank hung
            print(f"the watchdog of rank {self.rank} is off: {type(error).__name__}: {error}", flush=True)
            self._send({"do": "leave"})
        if self._line is not None:
            self._line.close()

    def _poll(self) -> None:
        self.stacks.write_unless(self.settings.timeout_seconds)
        self._send({"do": "beat", "report": vars(self.report())})
        until = time.monotonic() + self.settings.poll_seconds
        while (left := until - time.monotonic()) > 0 and not self._stopping.is_set():
            if self._line is None:
                self._stopping.wait(min(left, RETRY_SECONDS))
                self._reconnect()
            elif self._line.wait(min(left, LISTEN_SECONDS)):
                self._read()
        self._judge()

    def _send(self, tree: dict[str, Any]) -> None:
        with self._sending:
            if self._line is not None:
                try:
                    self._line.send(tree)
                except OSError:
                    self._break()

    def _break(self) -> None:
        if self._line is not None:
            self._line.close()
        self._line = None
        if self._broken_at is None:
            self._broken_at = self._clock.read()

    def _reconnect(self) -> None:
        if self._is_over or self.verdict is not None:
            return
        try:
            self._line = connect(self.address, self.rank, self.host, timeout_seconds=RETRY_SECONDS)
            self._broken_at, self._is_refused = None, False
        except ConnectionRefusedError:
            self._is_refused = True
        except OSError:
            pass

    def _read(self) -> None:
        line = self._line
        if line is None:
            return
        try:
            for tree in line.receive():
                self._heard_at = self._clock.read()
                self._take(tree)
        except OSError:
            with self._sending:
                self._break()

    def _take(self, tree: dict[str, Any]) -> None:
        if tree["do"] == "alive" and "step" in tree:
            self._first = (str(tree["host"]), int(tree["step"]), str(tree["phase"]))
        elif tree["do"] == "ask":
            self._send({"do": "report", "report": vars(self._look())})
        elif tree["do"] == "over":
            self._is_over = True
        elif tree["do"] == "end":
            self._conclude(Verdict(**tree["verdict"]))

    def _look(self) -> Report:
        """A report in full; the stacks are written."""
        report = self.report()
        self.stacks.write(
            f"rank {self.rank} on {self.host}, step {report.step}, {report.phase}, no progress for "
            f"{report.still_seconds:.1f} s"
        )
        waits = waits_in_collective()
        groups: Mapping[str, int] = {}
        with contextlib.suppress(Exception):  # of a torch that counts otherwise
            groups = self._count_collectives()
        return Report(**(vars(report) | {"waits": waits, "groups": dict(groups)}))

    def _judge(self) -> None:
        """What this rank finds without rank 0: that rank 0 is silent or gone, or that peers were lost long ago."""
        now = self._clock.read()
        if self.verdict is not None:
            is_late = self._verdict_at is not None and now - self._verdict_at > END_SECONDS
            if is_late and self.progress.stage != "close" and not self._stopping.is_set():
                self._end(self.verdict)
            return
        if self._is_over or self.rank == 0:
            return
        if self._broken_at is not None and self._is_refused:  # nothing listens there any more
            if now - self._broken_at > LOST_SECONDS:
                self._conclude(Verdict("died", 0, *self._first, "its process ended without a word"))
        elif now - self._heard_at > self.settings.timeout_seconds:
            self._look()
            silence = f"its heartbeat has stood still for {now - self._heard_at:.0f} s"
            self._conclude(Verdict("hang", 0, *self._first, silence))

    def _conclude(self, verdict: Verdict) -> None:
        self.verdict, self._verdict_at = verdict, self._clock.read()
        self._has_verdict.set()
        if verdict.kind == "hang":
            self._end(verdict)

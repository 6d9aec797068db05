"""Start N ranks on this machine from one process that has imported once, and answer for them.

Eight ranks under torchrun import torch, DeepSpeed and Megatron eight times; here one server process (`server`) imports
them and forks the ranks. The launcher itself stays light: it forwards signals, finds the first rank that failed, ends
the others, and leaves neither processes nor temporary files behind.
"""

import contextlib
import json
import math
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megamoe.launch import server as server_module
from megamoe.launch.environment import LOCAL_INIT_METHOD
from megamoe.launch.failure import Failure, status_text, stopped_by
from megamoe.launch.server import STACKS_SIGNAL, end_path, output_path, stacks_path

SEARCH_PATH = "MEGAMOE_SEARCH_PATH"  # carries sys.path to the server, which imports what this process would
START_SERVER = (
    f"import json, os, sys; sys.path[:] = json.loads(os.environ.pop('{SEARCH_PATH}')); "
    "from megamoe.launch.server import main; main(int(sys.argv[1]), int(sys.argv[2]))"
)
FORWARDED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
POLL_SECONDS = 0.1
STACKS_WAIT_SECONDS = 3.0
LEAVE_SECONDS = 60.0  # what the other ranks have to end once one has ended as a signal asked it to
MAX_OUTPUT_BYTES, KEPT_OUTPUT_BYTES = 1 << 20, 1 << 14  # of a captured rank: on disk, and shown when it fails
# A rank that dies without a word is noticed after its peers' broken connections, which it caused; and an error meant
# for the user may come up after the rank has closed its connections. Both are causes, never consequences.
CAUSE_LEAD_SECONDS = 1.0


@dataclass(frozen=True)
class LocalResult:
    """How a launch ended. `exit_code` is 0 when every rank ended well."""

    exit_code: int
    failure: Failure | None
    preload_seconds: float
    outputs: tuple[str, ...] = ()  # per rank, what was captured ("" where output passed through)


def run_local(
    entry: str,
    payload: Mapping[str, Any],
    *,
    num_ranks: int,
    preload: Sequence[str] = (),
    timeout_seconds: float | None = None,
    grace_seconds: float = 10.0,
    stop_seconds: float | None = None,
) -> LocalResult:
    """Run "module:function"(payload) on `num_ranks` new ranks of this machine, and print why if it fails.

    Each rank finds RANK, WORLD_SIZE and their kin in its environment (read them with `rank_environment`). Rank 0 writes
    to this process's stdout and stderr; the others' output is shown only for the rank that failed first. SIGINT,
    SIGTERM and SIGUSR1 are forwarded; a second Ctrl-C kills. OMP_NUM_THREADS is 1 unless it is set.

    payload: JSON. preload: modules to import once, before the ranks are forked. timeout_seconds: after it, the stacks
    of all ranks are printed and the ranks are killed. grace_seconds: how long ranks may take to end after the SIGTERM
    that the first failure brings them. stop_seconds: how long after a SIGTERM or SIGUSR1 that was forwarded to them.

    Never raises for a failing rank: the exit code is the MegamoeError's own, 1 for another exception, 128 + signal for
    a killed rank, 124 for a timeout.
    """
    with _signals_queued() as signals, contextlib.closing(RankServer()) as server:
        failure, preload_seconds = server.import_modules(preload, signals)
        if failure is not None:
            result = LocalResult(failure.exit_code, failure, preload_seconds)
        else:
            result = server.run(
                entry, payload, num_ranks=num_ranks, captured_ranks=range(1, num_ranks), signals=signals,
                timeout_seconds=timeout_seconds, grace_seconds=grace_seconds, stop_seconds=stop_seconds,
            )  # fmt: skip
            result = replace(result, preload_seconds=preload_seconds)
    if result.failure is not None:
        print(result.failure.report, file=sys.stderr, flush=True)
    return result


class ServerDied(Exception):
    """The server process ended by itself."""


class RankServer:
    """A handle on one server process. It may run any number of sets of ranks, one after another."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        ours, theirs = socket.socketpair()
        flags = subprocess._args_from_interpreter_flags()
        arguments = [str(theirs.fileno()), str(os.getpid())]
        # What imports start would not survive the fork: threads of numeric libraries, and CUDA, which torch must be
        # told to look for without touching it.
        variables = {"OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        variables |= os.environ if environment is None else environment
        variables |= {"OPENBLAS_NUM_THREADS": "1", SEARCH_PATH: json.dumps(sys.path)}
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, *flags, "-c", START_SERVER, *arguments],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=variables,
                start_new_session=True,  # the terminal's Ctrl-C reaches the launcher alone, which forwards it
            )  # fmt: skip
        self._control = ours
        self._received = b""

    def close(self) -> None:
        """End the server and every rank it still has."""
        self._control.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:  # in the middle of an import
            self.process.kill()
            self.process.wait()

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def send(self, do: str, **details: Any) -> None:
        try:
            self._control.sendall(json.dumps({"do": do} | details).encode() + b"\n")
        except OSError as error:
            raise ServerDied from error

    def receive(self, timeout_seconds: float) -> dict[str, Any] | None:
        """The next event, or None after `timeout_seconds`. Raises ServerDied."""
        deadline = time.monotonic() + timeout_seconds
        while b"\n" not in self._received:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not select.select([self._control], [], [], remaining)[0]:
                return None
            try:
                received = self._control.recv(1 << 16)
            except OSError as error:
                raise ServerDied from error
            if not received:
                raise ServerDied
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)

    def import_modules(self, modules: Sequence[str], signals: Sequence[int] = ()) -> tuple[Failure | None, float]:
        """Import in the server what the ranks shall share. Returns (why not, seconds it took)."""
        try:
            self.send("import", modules=list(modules))
            while (event := self.receive(POLL_SECONDS)) is None:
                if signals:
                    return stopped_by(signals[0]), 0.0
        except ServerDied:
            return self.death(), 0.0
        if event["event"] == "imported":
            return None, event["seconds"]
        user = event["kind"] == "user"
        message = event["message"] if user else f"Importing {event['module']} failed:"
        exit_code = event["exit_code"] or 1
        return Failure("user" if user else "import", None, message, exit_code, event["traceback"]), 0.0

    def death(self) -> Failure:
        status = self.process.wait()
        return Failure("server", None, f"The process that holds the ranks died ({status_text(status)}).", 1)

    def run(
        self,
        entry: str,
        payload: Mapping[str, Any],
        *,
        num_ranks: int,
        captured_ranks: Sequence[int],
        signals: list[int] | None = None,
        timeout_seconds: float | None = None,
        grace_seconds: float = 10.0,
        stop_seconds: float | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> LocalResult:
        """Run one set of ranks to its end; as `run_local`, which see. `signals` grows while signals arrive."""
        folder = Path(tempfile.mkdtemp(prefix="megamoe-ranks-"))
        launch = _Launch(self, folder, num_ranks, signals if signals is not None else [], grace_seconds, stop_seconds)
        try:
            self.send(
                "start", entry=entry, payload=payload, num_ranks=num_ranks, folder=str(folder),
                captured_ranks=list(captured_ranks), working_directory=os.getcwd(),
                environment=rank_variables(num_ranks, folder, os.environ if environment is None else environment),
            )  # fmt: skip
            failure = launch.wait(timeout_seconds)
            outputs = tuple(launch.output(rank) for rank in range(num_ranks))
        except ServerDied:
            failure, outputs = self.death(), ()
        except BaseException:  # our own waiting was broken off: no rank may outlive it
            self.close()
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return LocalResult(failure.exit_code if failure else 0, failure, 0.0, outputs)


def rank_variables(num_ranks: int, folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment that all ranks share; RANK and LOCAL_RANK are added by the rank itself."""
    variables = {"OMP_NUM_THREADS": "1"} | dict(environment)
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # of a surrounding launcher: ours meet in a file
        variables.pop(name, None)
    if os.path.exists("/sys/class/net/lo"):  # gloo would look up the host name, which need not resolve
        variables.setdefault("GLOO_SOCKET_IFNAME", "lo")
    size = str(num_ranks)
    variables |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "LOCAL_SIZE": size}  # LOCAL_SIZE: DeepSpeed on CPUs
    return variables | {LOCAL_INIT_METHOD: f"file://{folder / 'rendezvous'}"}


class _Launch:
    """Waits for one set of ranks: who ended how and when, what we told them, and what to make of it."""

    def __init__(
        self,
        server: RankServer,
        folder: Path,
        num_ranks: int,
        signals: list[int],
        grace_seconds: float,
        stop_seconds: float | None,
    ) -> None:
        self.server, self.folder, self.num_ranks, self.grace_seconds = server, folder, num_ranks, grace_seconds
        self.signals, self.stop_seconds = signals, stop_seconds
        self.stop_by: float | None = None  # when ranks that were asked to stop are killed
        self.ends: dict[int, dict[str, Any]] = {}  # rank -> kind, message, traceback, exit_code, time, status
        self.cut_output: dict[int, str] = {}
        self.forwarded: int | None = None  # SIGINT or SIGTERM that the user sent
        self.sent_at: dict[int, float] = {}  # signals that we sent of our own accord
        self.stacks: str | None = None  # of all ranks, once time is over

    def wait(self, timeout_seconds: float | None) -> Failure | None:
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        next_cut = 0.0
        while len(self.ends) < self.num_ranks:
            self.take(self.server.receive(POLL_SECONDS))
            self.forward_signals()
            now = time.monotonic()
            if deadline is not None and now > deadline and not self.sent_at:
                self.stacks = self.collect_stacks()
                self.send_signal(signal.SIGKILL)
            terminated = self.sent_at.get(signal.SIGTERM)
            late = terminated is not None and now > terminated + self.grace_seconds
            if late or (self.stop_by is not None and now > self.stop_by):
                self.send_signal(signal.SIGKILL)
            if now > next_cut:
                next_cut = now + 1.0
                self.cut_outputs()
        return self.first_failure(timeout_seconds)

    def take(self, event: dict[str, Any] | None) -> None:
        if event is None or event["event"] != "exited":
            return
        rank = event["rank"]
        try:
            end = json.loads(end_path(self.folder, rank).read_text(encoding="utf-8"))
        except FileNotFoundError:
            end = {"kind": "killed" if event["status"] < 0 else "exit", "message": "", "traceback": ""}
            end["exit_code"] = 128 - event["status"] if event["status"] < 0 else event["status"]
        end["status"] = event["status"]
        end["silent"] = "time" not in end
        end.setdefault("time", event["time"])
        self.ends[rank] = end
        if end["kind"] == "interrupted":
            self.stop_within(LEAVE_SECONDS)
        elif end["kind"] != "done" and not self.sent_at:
            self.send_signal(signal.SIGTERM)

    def stop_within(self, seconds: float | None) -> None:
        """The ranks were asked to stop: those that have not ended by then are killed."""
        if seconds is not None:
            self.stop_by = min(self.stop_by or math.inf, time.monotonic() + seconds)

    def send_signal(self, number: int) -> None:
        if number not in self.sent_at:
            self.sent_at[number] = time.monotonic()
            self.server.send("signal", signal=int(number))

    def forward_signals(self) -> None:
        while self.signals:
            number = self.signals.pop(0)
            if number == signal.SIGINT and self.forwarded == signal.SIGINT:
                self.send_signal(signal.SIGKILL)
                continue
            if number == signal.SIGINT:
                print("\nStopping; Ctrl-C again kills the ranks at once.", file=sys.stderr, flush=True)
            if number in (signal.SIGINT, signal.SIGTERM):
                self.forwarded = number
            if number in (signal.SIGTERM, signal.SIGUSR1):
                self.stop_within(self.stop_seconds)
            self.server.send("signal", signal=int(number))

    def collect_stacks(self) -> str:
        """Ask the ranks that still run for the stacks of their threads."""
        running = [rank for rank in range(self.num_ranks) if rank not in self.ends]
        self.server.send("signal", signal=int(STACKS_SIGNAL))
        deadline = time.monotonic() + STACKS_WAIT_SECONDS
        texts, before = {}, None
        while time.monotonic() < deadline and (before != texts or not all(texts.values())):
            before = texts
            time.sleep(POLL_SECONDS)
            texts = {rank: _read(stacks_path(self.folder, rank)) for rank in running}
        return "\n".join(f"Stacks of rank {rank}:\n{_own_frames(texts.get(rank, ''))}" for rank in running)

    def cut_outputs(self) -> None:
        """Keep the files of captured ranks small however long they run and however much they say."""
        for rank in range(self.num_ranks):
            path = output_path(self.folder, rank)
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_size > MAX_OUTPUT_BYTES:
                    self.cut_output[rank] = _read(path)[-KEPT_OUTPUT_BYTES:]
                    os.truncate(path, 0)

    def output(self, rank: int) -> str:
        return self.cut_output.get(rank, "") + _read(output_path(self.folder, rank))

    def first_failure(self, timeout_seconds: float | None) -> Failure | None:
        failed = {rank: end for rank, end in self.ends.items() if end["kind"] != "done"}
        if self.stacks is not None:
            return Failure("timeout", None, f"The ranks did not end within {timeout_seconds:g} s.", 124, self.stacks)
        if not failed:
            return None
        if self.forwarded is not None and any(self._ended_by_user(end) for end in failed.values()):
            return stopped_by(self.forwarded)
        # Ends that we brought about ourselves are no causes; some end was there before. Nor is an obeyed signal.
        causes = {rank: end for rank, end in failed.items() if not self._ended_by_us(end)} or failed
        for kind in ("interrupted", "consequence"):
            causes = {rank: end for rank, end in causes.items() if end["kind"] != kind} or causes
        rank = min(causes, key=lambda rank: self._began(causes[rank]))
        return self._failure_of(rank, causes[rank])

    def _began(self, end: dict[str, Any]) -> float:
        return end["time"] - CAUSE_LEAD_SECONDS * (end["silent"] or end["kind"] == "user")

    def _ended_by_user(self, end: dict[str, Any]) -> bool:
        if end["kind"] == "interrupt" or end["status"] == -self.forwarded:
            return True
        return signal.SIGKILL in self.sent_at and end["status"] == -signal.SIGKILL

    def _ended_by_us(self, end: dict[str, Any]) -> bool:
        return end["silent"] and -end["status"] in self.sent_at and end["time"] >= self.sent_at[-end["status"]]

    def _failure_of(self, rank: int, end: dict[str, Any]) -> Failure:
        output = self.output(rank)[-KEPT_OUTPUT_BYTES:]
        if end["kind"] == "interrupted":
            return Failure("interrupted", rank, end["message"], end["exit_code"])
        if end["kind"] == "user":
            return Failure("user", rank, end["message"], end["exit_code"], end["traceback"], output)
        if end["kind"] in ("exception", "consequence"):
            message = f"Rank {rank} failed:"
            return Failure("exception", rank, message, end["exit_code"], end["traceback"], output)
        if end["kind"] == "killed":
            hint = " (out of memory?)" if end["status"] == -signal.SIGKILL else ""
            message = f"Rank {rank} was killed by {status_text(end['status'])}{hint}."
            return Failure("killed", rank, message, end["exit_code"], "", output)
        early = " before it was done" if end["exit_code"] == 0 else ""
        said = f": {end['message']}" if end["message"] and not end["message"].isdecimal() else ""
        message = f"Rank {rank} ended with exit code {end['exit_code']}{early}{said}."
        return Failure("exit", rank, message, end["exit_code"] or 1, "", output)


def _own_frames(stacks: str) -> str:
    """Stacks without the frames that lead from the server's start to the rank's entry."""
    ours = (f'File "{server_module.__file__}"', 'File "<string>"')
    return "\n".join(line for line in stacks.splitlines() if not line.strip().startswith(ours)) or "(no answer)"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


@contextlib.contextmanager
def _signals_queued() -> Iterator[list[int]]:
    """Collect FORWARDED_SIGNALS instead of dying of them. Python lets only the main thread do so."""
    queue: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield queue
        return
    # One that is ignored (nohup, a job in the background of a script) stays ignored.
    numbers = [number for number in FORWARDED_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda got, _: queue.append(got)) for number in numbers}
    try:
        yield queue
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

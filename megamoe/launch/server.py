"""The process that has imported once and forks ranks: the far side of `megamoe.launch.local`.

    launcher (light, the user's terminal)  --JSON lines over a socket-->  server (imports once)  --fork-->  ranks

The server is the parent of the ranks, so it alone sends them signals and reaps them: a process id is never reused
under it. Whoever dies takes those below along: the server ends when its launcher does, the ranks when the server does.

Requests: {"do": "import", "modules"}, {"do": "start", ...}, {"do": "signal", "signal"}.
Events: "imported", "import_failed", "started", "exited" (rank, status: negative for a signal, time).
"""

import atexit
import contextlib
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import select
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from megamoe.errors import MegamoeError, PeerLost
from megamoe.host_memory import keep_freed_memory

STACKS_SIGNAL = signal.SIGUSR2  # a rank that gets it writes the stacks of its threads to stacks_path()
HELD_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, STACKS_SIGNAL}
PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15  # linux/prctl.h


def end_path(folder: Path, rank: int) -> Path:
    """Where a rank writes how it ended: JSON with kind, message, traceback, exit_code and (monotonic) time."""
    return folder / f"rank_{rank}.end.json"


def output_path(folder: Path, rank: int) -> Path:
    """Where the output of a captured rank goes, stdout and stderr together."""
    return folder / f"rank_{rank}.output"


def stacks_path(folder: Path, rank: int) -> Path:
    """Where a rank writes its stacks when it gets STACKS_SIGNAL."""
    return folder / f"rank_{rank}.stacks"


_own_end: tuple[Path, int] | None = None  # where this process, if it is a rank of ours, tells of its end
_ending = threading.Lock()  # whichever thread ends this process, ends it alone


def end_process(error: MegamoeError, *, say: bool = False) -> NoReturn:
    """End this process from any thread, at once, with this error's exit code.

    The launcher of this machine, if there is one, hears of the error as of one that was raised; else, with `say`, its
    message is printed.
    """
    ended = describe_exception(error)
    if _own_end is None:
        if say:
            os.write(2, f"megamoe: error: {error}\n".encode())
        ended = {"exit_code": error.exit_code}
    end_rank(ended)


def end_rank(ended: dict[str, Any]) -> NoReturn:
    _ending.acquire()
    try:
        if _own_end is not None:
            path = end_path(*_own_end)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(ended), encoding="utf-8")
            partial.rename(path)
        if ended["exit_code"] == 0:
            atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            _flush(stream)
    finally:
        os._exit(ended["exit_code"])


def _flush(stream: Any) -> None:
    """Not waiting for a thread that holds the stream."""
    flusher = threading.Thread(target=stream.flush, daemon=True)
    flusher.start()
    flusher.join(1.0)


def call_entry(entry: str, payload: Any) -> None:
    """Call "module:function" with the payload."""
    module, _, name = entry.partition(":")
    getattr(importlib.import_module(module), name)(payload)


def describe_exception(error: BaseException) -> dict[str, Any]:
    """How a rank ended by this exception. A MegamoeError is one sentence; anything else keeps its traceback."""
    now = time.monotonic()
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:  # the way here is of no interest
        frames = frames.tb_next
    text = "".join(traceback.format_exception(type(error), error, frames))
    ended = {"time": now, "message": str(error), "traceback": text, "exit_code": 1}
    if isinstance(error, PeerLost):
        return ended | {"kind": "consequence"}
    if isinstance(error, MegamoeError):
        return ended | {"kind": "user" if error.is_failure else "interrupted", "exit_code": error.exit_code}
    if isinstance(error, KeyboardInterrupt):
        return ended | {"kind": "interrupt", "exit_code": 128 + signal.SIGINT}
    if isinstance(error, SystemExit):
        if error.code is None or error.code == 0:
            return ended | {"kind": "done", "exit_code": 0}
        return ended | {"kind": "exit", "exit_code": error.code if isinstance(error.code, int) else 1}
    return ended | {"kind": "exception", "message": f"{type(error).__name__}: {error}"}


class Server:
    """Answers one launcher: imports, forks ranks, tells of their ends. One set of ranks at a time."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.rank_of_pid: dict[int, int] = {}
        self.environment_at_start = dict(os.environ)
        self.folder: Path | None = None
        self.wake_read, self.wake_write = os.pipe()
        os.set_blocking(self.wake_write, False)
        signal.set_wakeup_fd(self.wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # the wake-up pipe tells
        # Sent by the kernel when the launcher is gone. SLURM sends it to all processes of a step, to this one, too:
        # what ranks make of it is theirs, and the launcher passes it on.
        launcher = os.getppid()
        signal.signal(signal.SIGTERM, lambda *_: self.end() if os.getppid() != launcher else None)

    def serve(self) -> NoReturn:
        pending = b""
        while True:
            ready, _, _ = select.select([self.control, self.wake_read], [], [])
            if self.wake_read in ready:
                os.read(self.wake_read, 4096)
                self.reap()
            if self.control in ready:
                received = self.control.recv(1 << 16)
                if not received:
                    self.end()
                *lines, pending = (pending + received).split(b"\n")
                for line in lines:
                    self.handle(json.loads(line))

    def handle(self, request: dict[str, Any]) -> None:
        if request["do"] == "import":
            self.import_modules(request["modules"])
        elif request["do"] == "start":
            self.start(request)
        else:
            self.signal_ranks(request["signal"])

    def tell(self, event: str, **details: Any) -> None:
        try:
            self.control.sendall(json.dumps({"event": event} | details).encode() + b"\n")
        except OSError:
            self.end()

    def import_modules(self, modules: list[str]) -> None:
        started = time.monotonic()
        for module in modules:
            try:
                importlib.import_module(module)
            except BaseException as error:  # told to the launcher
                self.tell("import_failed", module=module, **describe_exception(error))
                return
        self.tell("imported", seconds=time.monotonic() - started)

    def start(self, request: dict[str, Any]) -> None:
        self.folder = Path(request["folder"])
        sys.stdout.flush()
        sys.stderr.flush()
        gc.collect()
        gc.freeze()  # the ranks' collectors leave shared pages alone, so they stay shared
        server_pid = os.getpid()
        request["environment"] = self.rank_environment(request["environment"])
        # A signal that comes before a rank has its own handlers waits for them.
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD_SIGNALS)
        for rank in range(request["num_ranks"]):
            pid = os.fork()
            if pid == 0:
                self.control.close()
                os.close(self.wake_read)
                os.close(self.wake_write)
                become_rank(request, rank, server_pid)
            self.rank_of_pid[pid] = rank
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_SIGNALS)
        gc.unfreeze()
        self.tell("started", pids=list(self.rank_of_pid))

    def rank_environment(self, requested: dict[str, str]) -> dict[str, str]:
        """What the launcher asks for, and what the imports have set here (libraries read some variables only once)."""
        before = self.environment_at_start
        set_by_imports = {name: value for name, value in os.environ.items() if before.get(name) != value}
        untouched = {name for name in set_by_imports if requested.get(name) == before.get(name)}
        return requested | {name: set_by_imports[name] for name in untouched}

    def reap(self) -> None:
        while self.rank_of_pid:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            seen = time.monotonic()
            if pid not in self.rank_of_pid:
                continue
            kill_group(pid, signal.SIGKILL)  # what the rank started itself ends with it
            rank = self.rank_of_pid.pop(pid)
            self.tell("exited", rank=rank, status=os.waitstatus_to_exitcode(status), time=seen)

    def signal_ranks(self, number: int) -> None:
        for pid in self.rank_of_pid:
            if number == signal.SIGKILL:
                kill_group(pid, number)
            os.kill(pid, number)  # not yet reaped, so it exists, at least as a zombie

    def end(self) -> NoReturn:
        """The launcher is gone: leave nothing behind."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.signal_ranks(signal.SIGKILL)
        if self.folder is not None and self.rank_of_pid:
            shutil.rmtree(self.folder, ignore_errors=True)
        os._exit(0)


def kill_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody left in it, or not yet its own group
        os.killpg(group, number)


def become_rank(request: dict[str, Any], rank: int, server_pid: int) -> NoReturn:
    """The whole life of a forked rank. Never returns into the server's code."""
    global _own_end
    _own_end = (Path(request["folder"]), rank)
    try:
        prepare_rank(request, rank, server_pid)
        call_entry(request["entry"], request["payload"])
        threading._shutdown()  # waits for the threads that are no daemons, as the end of the interpreter does
        ended = {"kind": "done", "exit_code": 0}
    except BaseException as error:  # told to the launcher
        ended = describe_exception(error)
    end_rank(ended)


def prepare_rank(request: dict[str, Any], rank: int, server_pid: int) -> None:
    """Make a fork of the server a process of its own: group, signals, output, environment, threads."""
    atexit._clear()  # what the server's imports registered is the server's
    os.setpgid(0, 0)
    die_with_parent(signal.SIGKILL, server_pid)
    set_process_name(f"megamoe-rank-{rank}")
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGCHLD, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    redirect_output(Path(request["folder"]), rank, rank in request["captured_ranks"])
    os.environ.clear()
    os.environ.update(request["environment"])
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
    os.chdir(request["working_directory"])
    sys.argv = [request["entry"]]
    faulthandler.enable(file=sys.stderr)
    stacks = open(stacks_path(Path(request["folder"]), rank), "w")  # noqa: SIM115 (open while the rank lives)
    faulthandler.register(STACKS_SIGNAL, file=stacks, all_threads=True)
    prepare_rank.stacks = stacks  # faulthandler keeps the descriptor only: the file object must not be collected
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_SIGNALS)
    torch = sys.modules.get("torch")
    num_threads = os.environ.get("OMP_NUM_THREADS", "1")
    if torch is not None and num_threads.isdecimal():
        torch.set_num_threads(int(num_threads))


def redirect_output(folder: Path, rank: int, captured: bool) -> None:
    """Input from nowhere; output to the rank's file when captured; lines appear as they are written."""
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    if captured:
        # O_APPEND: the launcher may cut the file while the rank writes
        output = os.open(output_path(folder, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
    sys.stdout.reconfigure(line_buffering=True)


def die_with_parent(number: int, parent_pid: int) -> None:
    """Ask the kernel (Linux) to send this signal when the parent dies, however it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before the request
        os._exit(128 + number)


def set_process_name(name: str) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode()[:15], 0, 0, 0)


def main(control_fd: int, launcher_pid: int) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher forwards it to the ranks
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # likewise, and where SLURM sends it to every process of a step
    die_with_parent(signal.SIGTERM, launcher_pid)
    set_process_name("megamoe-server")
    keep_freed_memory()  # the ranks inherit it; imports may make tensors
    Server(socket.socket(fileno=control_fd)).serve()

"""Several processes that each do whole tasks; the first failure ends all, and no wait is without a limit.

Processes are forked: what is read is open already and costs no memory twice. They talk JSON through a socket of their
own and die when the parent does.
"""

import contextlib
import gc
import json
import os
import selectors
import signal
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from queue import Empty, Queue
from typing import Any, NoReturn, TypeVar

from megamoe.errors import ConversionError, MegamoeError
from megamoe.host_memory import return_freed_memory

T = TypeVar("T")
STALL_SECONDS = 600.0  # without a word from a process: its disk hangs
_POLL_SECONDS = 1.0
_JOIN_SECONDS = 10.0


@dataclass(frozen=True)
class BytesDone:
    """What is done and what is left."""

    num_done_bytes: int
    num_total_bytes: int
    seconds_left: float | None  # None: too early to say


@dataclass(frozen=True)
class Task:
    """A piece of work with a name for messages. `run(say)` calls `say(num_bytes)` as it goes, and returns JSON."""

    name: str
    run: Callable[[Callable[[int], None]], Any]


def run_tasks(
    tasks: Sequence[Task],
    *,
    num_workers: int,
    num_total_bytes: int,
    progress: Callable[[BytesDone], None] | None = None,
    stall_seconds: float = STALL_SECONDS,
) -> list[Any]:
    """Results of the tasks, in their order. num_workers 0: one after the other in this process.

    Raises what the first failed task raised: a MegamoeError as it was, anything else as RuntimeError with its
    traceback; ConversionError, naming the task, for a process that was killed or has hung. None is left then.
    """
    meter = _Meter(num_total_bytes, progress)
    if num_workers == 0 or not tasks:
        return [task.run(meter.add) for task in tasks]
    pool = _Pool(tasks, min(num_workers, len(tasks)), meter, stall_seconds)
    try:
        return pool.results()
    finally:
        pool.kill()


def ahead(items: Iterator[T], num_alive: int) -> Iterator[T]:
    """The same items, made by a thread while the caller is busy with earlier ones; what it raises is raised here.

    No more than `num_alive` exist at a time, the caller's and the one in the making among them.
    """
    queue: Queue[tuple[bool, Any]] = Queue()
    slots, is_over = threading.Semaphore(num_alive), threading.Event()

    def work() -> None:
        try:
            while not is_over.is_set():
                if slots.acquire(timeout=_POLL_SECONDS):
                    queue.put((True, next(items)))
        except StopIteration:
            queue.put((False, None))
        except BaseException as error:  # handed over, not lost
            queue.put((False, error))

    thread = threading.Thread(target=work, daemon=True, name="reader")
    thread.start()
    try:
        while True:
            try:
                is_item, value = queue.get(timeout=_POLL_SECONDS)
            except Empty:
                if not thread.is_alive() and queue.empty():
                    raise RuntimeError("the reading thread ended without a word") from None
                continue
            if is_item:
                yield value
                del value
                slots.release()
            elif value is None:
                return
            else:
                raise value
    finally:
        is_over.set()
        slots.release()
        thread.join(_JOIN_SECONDS)


def batches(items: Iterable[T], num_bytes: Callable[[T], int], limit_bytes: int) -> Iterator[list[T]]:
    """Items in lists that end when they reach `limit_bytes`: small ones are not worth handing over one by one."""
    batch: list[T] = []
    size = 0
    for item in items:
        batch.append(item)
        size += num_bytes(item)
        if size >= limit_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Meter:
    def __init__(self, num_total_bytes: int, progress: Callable[[BytesDone], None] | None) -> None:
        self._total, self._progress, self._done, self._started = num_total_bytes, progress, 0, time.monotonic()

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._progress is not None:
            passed = time.monotonic() - self._started
            left = passed / self._done * (self._total - self._done) if self._done and passed > 1 else None
            self._progress(BytesDone(self._done, self._total, left))


@dataclass
class _Worker:
    pid: int
    link: socket.socket
    heard: float
    task: int | None = None
    unread: bytes = b""


class _Pool:
    def __init__(self, tasks: Sequence[Task], num_workers: int, meter: _Meter, stall_seconds: float) -> None:
        self._tasks, self._meter, self._stall_seconds = tasks, meter, stall_seconds
        self._waiting = deque(range(len(tasks)))
        self._results: dict[int, Any] = {}
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        gc.freeze()  # what is there is not looked through again: in the new processes that would copy all of it
        try:
            for _ in range(num_workers):
                self._start()
        except BaseException:
            self.kill()
            raise
        finally:
            gc.unfreeze()

    def results(self) -> list[Any]:
        for worker in self._workers:
            self._give(worker)
        while len(self._results) < len(self._tasks):
            for key, _ in self._selector.select(_POLL_SECONDS):
                self._listen(key.data)
            now = time.monotonic()
            for worker in self._workers:
                if worker.task is not None and now - worker.heard > self._stall_seconds:
                    raise ConversionError(
                        f"{self._tasks[worker.task].name}: nothing has moved for {self._stall_seconds:g} s, the disk "
                        "hangs; the same command goes on from the last finished file"
                    )
        return [self._results[number] for number in range(len(self._tasks))]

    def kill(self) -> None:
        """End all of them, now; what they write is made for that."""
        for worker in self._workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGKILL)
            worker.link.close()
        give_up = time.monotonic() + _JOIN_SECONDS
        for worker in self._workers:  # one that hangs in the kernel is left to init
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(worker.pid, os.WNOHANG)[0] == 0 and time.monotonic() < give_up:
                    time.sleep(0.005)
        self._workers = []
        self._selector.close()

    def _start(self) -> None:
        mine, its = socket.socketpair()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            for worker in self._workers:
                worker.link.close()
            mine.close()
            _work(self._tasks, its, parent)
        its.close()
        worker = _Worker(pid, mine, time.monotonic())
        self._workers.append(worker)
        self._selector.register(mine, selectors.EVENT_READ, worker)

    def _give(self, worker: _Worker) -> None:
        worker.task = self._waiting.popleft() if self._waiting else None
        if worker.task is not None:
            worker.heard = time.monotonic()
            with contextlib.suppress(OSError):  # it is gone: the next read says so
                worker.link.sendall(f"{worker.task}\n".encode())

    def _listen(self, worker: _Worker) -> None:
        try:
            data = worker.link.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(worker.link)
            self._mourn(worker)
            return
        worker.heard = time.monotonic()
        *lines, worker.unread = (worker.unread + data).split(b"\n")
        for line in lines:
            what, value = json.loads(line)
            if what == "bytes":
                self._meter.add(value)
            elif what == "done":
                self._results[worker.task] = value
                self._give(worker)
            elif what == "refused":
                raise _error_class(value[0])(value[1])
            else:
                raise RuntimeError(f"{self._tasks[worker.task].name} failed:\n{value}")

    def _mourn(self, worker: _Worker) -> None:
        if worker.task is None:
            return
        give_up, status = time.monotonic() + _JOIN_SECONDS, None
        with contextlib.suppress(ChildProcessError):
            while time.monotonic() < give_up:
                pid, status = os.waitpid(worker.pid, os.WNOHANG)
                if pid:
                    self._workers.remove(worker)
                    break
                time.sleep(0.005)
        if status is not None and os.WIFSIGNALED(status):
            how = f"was killed by signal {os.WTERMSIG(status)}"
            if os.WTERMSIG(status) == signal.SIGKILL:
                how += ", perhaps for want of memory"
        else:
            how = "ended"
        raise ConversionError(
            f"{self._tasks[worker.task].name}: its process {how}; the same command goes on from the last finished file"
        )


def _work(tasks: Sequence[Task], link: socket.socket, parent: int) -> NoReturn:
    """A forked process: tasks by their numbers from `link`, until there is nobody to ask. Never returns."""
    try:
        return_freed_memory()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        while os.getppid() == parent:
            link.settimeout(_POLL_SECONDS)
            try:
                data = link.recv(64)
            except TimeoutError:
                continue
            if not data:
                break
            link.settimeout(None)
            _do(tasks[int(data)], link, parent)
    except BaseException:  # nobody hears it: the parent is gone
        os._exit(1)
    os._exit(0)


def _do(task: Task, link: socket.socket, parent: int) -> None:
    def send(what: str, value: Any) -> None:
        link.sendall(json.dumps([what, value]).encode() + b"\n")

    def say(num_bytes: int) -> None:
        if os.getppid() != parent:
            os._exit(1)
        send("bytes", num_bytes)

    try:
        send("done", task.run(say))
    except MegamoeError as error:
        send("refused", [type(error).__name__, str(error)])
    except Exception:
        send("failed", traceback.format_exc())


def _error_class(name: str) -> type[MegamoeError]:
    classes = [MegamoeError]
    for known in classes:
        classes += known.__subclasses__()
    return next((known for known in classes if known.__name__ == name), ConversionError)

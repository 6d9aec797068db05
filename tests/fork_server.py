"""Commands of megamoe without the seconds of importing: forked from one process that has imported torch and engines.

    with ForkServer() as server:
        process = server.start(["study", "study.yaml"], cwd=tmp_path)      # a subprocess.Popen of a light client

The client passes signals on, ends with the command's exit code, and takes the command along when it is killed. What
the command starts itself by `megamoe.study.processes` goes the same way.
"""

import array
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # as a script it sees its own folder alone
from tests.slurm.paced import train_with_pace  # noqa: E402

START_SECONDS, TICK_SECONDS = 120.0, 0.02
MODULES = ("megamoe.training.main", "megamoe.evaluation.worker", "megamoe.cli")


class ForkServer:
    """The process that has imported everything."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="megamoe-fork-")
        self.path = str(Path(self._folder.name) / "socket")
        environment = dict(os.environ) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        self._process = subprocess.Popen([sys.executable, __file__, "--serve", self.path], env=environment)
        until = time.monotonic() + START_SECONDS
        while not os.path.exists(self.path):
            if self._process.poll() is not None or time.monotonic() > until:
                raise RuntimeError("the server of forks did not start")
            time.sleep(TICK_SECONDS)

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(self, *details: object) -> None:
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()

    def start(self, arguments: list[str], **options: Any) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, __file__, self.path, *arguments], **options)

    def run(self, arguments: list[str], **options: Any) -> subprocess.CompletedProcess:
        command = [sys.executable, __file__, self.path, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def ask(path: str, arguments: list[str]) -> int:
    """The client: its exit code is the command's."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(path)
        request = json.dumps({"arguments": arguments, "cwd": os.getcwd()}).encode()
        ends = array.array("i", [1, 2])
        connection.sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, ends)])
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: connection.sendall(bytes([number])))
        answer = connection.recv(4)
    return answer[0] if answer else 1


def serve(path: str) -> NoReturn:
    """One child for each request, which forks the command and watches over it."""
    for name in MODULES:
        __import__(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(f"{path}.new")
        listening.listen()
        os.rename(f"{path}.new", path)
        while True:
            connection, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _watch(connection, path)
            connection.close()


def _watch(connection: socket.socket, path: str) -> NoReturn:
    ends = array.array("i")
    request, ancillary, _, _ = connection.recvmsg(1 << 16, socket.CMSG_LEN(8))
    for _, _, data in ancillary:
        ends.frombytes(data)
    command = os.fork()
    if command == 0:
        connection.close()
        _become(json.loads(request), ends.tolist(), path)
    for end in ends:
        os.close(end)
    while True:
        done, status = os.waitpid(command, os.WNOHANG)
        if done:
            connection.sendall(bytes([os.waitstatus_to_exitcode(status) & 255]))
            os._exit(0)
        if select.select([connection], [], [], TICK_SECONDS)[0]:
            asked = connection.recv(1)
            os.kill(command, asked[0] if asked else signal.SIGKILL)
            if not asked:
                os._exit(0)


def _pace_of(arguments: list[str]) -> Path:
    """NAME.pace for `train …/NAME.yaml`, seen from the folder of the command: see `tests.slurm.paced`."""
    return Path(f"{Path(arguments[1]).stem}.pace" if arguments[0] == "train" else "no.pace")


def _become(request: dict[str, Any], ends: list[int], path: str) -> NoReturn:
    code = 1
    try:
        for end, place in zip(ends, (1, 2), strict=True):
            os.dup2(end, place)
        os.chdir(request["cwd"])
        from megamoe import cli
        from megamoe.study import processes

        processes.COMMAND = (sys.executable, __file__, path)
        if (pace := _pace_of(request["arguments"])).exists():
            train_with_pace(pace)
        sys.argv = ["megamoe", *request["arguments"]]
        code = cli.main(request["arguments"])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2])
    sys.exit(ask(sys.argv[1], sys.argv[2:]))

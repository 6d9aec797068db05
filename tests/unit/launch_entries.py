"""What ranks do in test_launch: entries called with the payload."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from megamoe.errors import ConfigError, PeerLost
from megamoe.launch.environment import rank_environment


def my_rank() -> int:
    return rank_environment().rank


def note_process(payload: dict) -> None:
    folder = Path(payload["folder"])
    (folder / "server").write_text(str(os.getppid()))
    partial = folder / f"{my_rank()}.partial"
    partial.write_text(str(os.getpid()))
    partial.rename(folder / f"{my_rank()}.pid")


def report(payload: dict) -> None:
    here = rank_environment()
    print(f"hello from rank {here.rank}")
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    seen = {name: os.environ[name] for name in names} | {"init_method": here.init_method}
    (Path(payload["folder"]) / f"{here.rank}.json").write_text(json.dumps(seen))


def uses_imported(payload: dict) -> None:
    from tests.unit import launch_imported  # noqa: F401

    seen = {"parent": os.getppid(), "set_by_import": os.environ.get("MEGAMOE_TEST_SET_BY_IMPORT")}
    (Path(payload["folder"]) / f"{my_rank()}.json").write_text(json.dumps(seen))


def user_error(payload: dict) -> None:
    if my_rank() == 1:
        raise ConfigError("The value 7 is too odd: use 8.")
    time.sleep(60)


def loses_peer(payload: dict) -> None:
    deaf = Path(payload["folder"]) / "deaf"
    if my_rank() == 0:
        while not deaf.exists():
            time.sleep(0.01)
        raise PeerLost("rank 1 is gone")
    if my_rank() == 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        deaf.touch()
        time.sleep(0.5)
        raise ValueError("the cause")
    time.sleep(60)


def exception(payload: dict) -> None:
    if my_rank() == 2:
        print("about to break")
        raise ValueError("broken")
    time.sleep(60)


def leaves(payload: dict) -> None:
    if my_rank() == 1:
        os._exit(payload["code"])
    time.sleep(2)


def system_exit(payload: dict) -> None:
    sys.exit(payload["code"])


def killed(payload: dict) -> None:
    if my_rank() == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def sleeps(payload: dict) -> None:
    note_process(payload)
    time.sleep(60)


def one_fails_others_stay(payload: dict) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    note_process(payload)
    folder = Path(payload["folder"])
    while len(list(folder.glob("*.pid"))) < 3:
        time.sleep(0.01)
    if my_rank() == 0:
        raise ConfigError("First.")
    time.sleep(60)


def talks_then_fails(payload: dict) -> None:
    if my_rank() == 0:
        time.sleep(60)
    for _ in range(30):
        print("x" * 99_999)
        time.sleep(0.1)
    print("last words")
    raise ValueError("done talking")


def starts_a_child(payload: dict) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (Path(payload["folder"]) / "child").write_text(str(child.pid))


def until_signal(payload: dict) -> None:
    received = []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda got, _: received.append(got))
    note_process(payload)
    while not received:
        time.sleep(0.02)
    (Path(payload["folder"]) / f"{my_rank()}.signal").write_text(str(received[0]))


def ignores_interrupt(payload: dict) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    note_process(payload)
    time.sleep(60)


def ignores_termination(payload: dict) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    note_process(payload)
    time.sleep(60)

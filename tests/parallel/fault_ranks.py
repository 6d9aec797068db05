"""The rank side of the fault tests: a run in which one rank comes to grief in a phase of its second step."""

import ctypes
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from megamoe.cli import main
from megamoe.launch import server
from megamoe.launch.environment import LOCAL_INIT_METHOD, rank_environment
from megamoe.phases import CLOCK
from megamoe.training.main import run_rank
from megamoe.training.supervision import StepMark

# Many polls, so that the last heartbeat of a rank that is to fall silent tells its phase on a busy machine, too; less
# than a hang takes to be found.
HEARD_SECONDS = 2.0
LONG_SECONDS = 600


def come_to_grief(kind: str) -> None:
    """On the training thread."""
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    if kind == "exit":
        os._exit(0)
    if kind == "raise":
        error = ValueError("injected")
        error.phases = CLOCK.active  # as the clock notes it, from where the phase's work begins
        raise error
    if kind == "sleep":
        time.sleep(LONG_SECONDS)
    if kind == "stop":
        time.sleep(HEARD_SECONDS)
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "gil":
        time.sleep(HEARD_SECONDS)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # which would end the sleep
        ctypes.PyDLL(None).sleep(LONG_SECONDS)  # unlike CDLL it keeps Python's lock


class Trap(list):
    """The clock's stack of phases: entering the phase springs it, once, after `num_steps` steps."""

    def __init__(self, fault: dict[str, Any]) -> None:
        self.fault, self.num_steps = fault, 0

    def append(self, name: str) -> None:
        super().append(name)
        is_training = "validate" not in self or name == "validate"
        if self.num_steps == self.fault["num_steps"] and name == self.fault["phase"] and is_training:
            self.num_steps = -(10**9)
            Path(self.fault["sprung"]).write_text(str(time.time()))
            come_to_grief(self.fault["kind"])


def run_as_torchrun(payload: dict[str, Any]) -> None:
    """`megamoe train` in a rank that no launcher of ours answers for. Its exit code goes to a file, whoever ends it."""
    rank, folder, end = rank_environment().rank, Path(payload["folder"]), os._exit

    def noted_end(code: int) -> None:
        (folder / f"{rank}.code").write_text(str(code))
        end(code)

    os._exit, server._own_end = noted_end, None
    del os.environ[LOCAL_INIT_METHOD]
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(payload["port"])}
    set_trap(payload["fault"])
    try:
        code = main(["train", str(folder / "run.yaml"), "run.device=cpu"])
    except Exception:  # as the interpreter would
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


def run(payload: dict[str, Any]) -> None:
    """run_rank; with "fault" (rank, phase, kind, sprung: a file that gets the time of it) in the payload, into it."""
    set_trap(payload.pop("fault", None))
    run_rank(payload)


def set_trap(fault: dict[str, Any] | None) -> None:
    if fault is not None and rank_environment().rank == fault["rank"]:
        trap = CLOCK._stack = Trap(fault)
        usual = StepMark.after_step

        def count(*arguments: Any) -> None:
            usual(*arguments)
            trap.num_steps += arguments[0].num_ahead == 0

        StepMark.after_step = count

"""Run a test's function on N ranks, forked from one process that has imported torch and both engines once.

    def work(size):                      # top level of a test module; its arguments and result are pickled
        ...collectives...
        return value

    def test_it():
        assert run_ranks(work, 4, 16) == [...]      # every rank's value, in rank order

The ranks are started and watched by `megamoe.launch`, as those of `megamoe train --local-ranks` are.
"""

import atexit
import importlib.util
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from megamoe.launch.environment import rank_environment
from megamoe.launch.local import Failure, RankServer

PRELOADED = ("torch", "torch.distributed", "deepspeed", "megatron.core", "megamoe.training.main", "tests.harness")
OPTIONAL = ("deepspeed", "megatron.core", "megamoe.training.main")
COLLECTIVE_TIMEOUT_SECONDS = 60.0

_server: RankServer | None = None


class RanksFailed(Exception):
    """A rank failed, or not all ended in time. `failure` says which rank, how, and with what output."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        text = failure.report
        if failure.kind == "user":  # the user gets one sentence, the developer of a test all of it
            text += f"\n{failure.traceback}"
        super().__init__(text)


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_seconds: float = 120.0,
    init: bool = True,
    **kwargs: Any,
) -> list[Any]:
    """Call function(*args, **kwargs) on `world_size` ranks; return every rank's value in rank order.

    init: whether torch.distributed is initialised (gloo) before and destroyed after. The environment, the working
    directory and one torch thread are as in `megamoe.launch.local.run_local`. Rank 0's output is printed.

    Raises RanksFailed for the first rank that failed, or with the stacks of all ranks after `timeout_seconds`.
    """
    server = _running_server()
    folder = Path(tempfile.mkdtemp(prefix="megamoe-test-"))
    try:
        failure, _ = server.import_modules([function.__module__])  # once there instead of once per rank
        if failure is not None:
            raise RanksFailed(failure)
        (folder / "call.pickle").write_bytes(pickle.dumps((function, args, kwargs)))
        payload = {"folder": str(folder), "init": init}
        result = server.run(
            "tests.harness:_call_on_rank", payload, num_ranks=world_size, captured_ranks=range(world_size),
            timeout_seconds=timeout_seconds, grace_seconds=2.0, environment=_environment(),
        )  # fmt: skip
        if result.failure is not None:
            raise RanksFailed(result.failure)
        print(result.outputs[0], end="")
        return [pickle.loads((folder / f"value_{rank}.pickle").read_bytes()) for rank in range(world_size)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _environment() -> dict[str, str]:
    """This process's environment, one thread per rank, and DeepSpeed told of the CPU where there is nothing else."""
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
    if shutil.which("nvidia-smi") is None:
        environment.setdefault("DS_ACCELERATOR", "cpu")
    return environment


def _running_server() -> RankServer:
    """The server of this test session: started at the first use, and again if a test brought it down."""
    global _server
    if _server is None or not _server.is_alive():
        if _server is None:
            atexit.register(_close_server)
        _server = RankServer(_environment())
        failure, _ = _server.import_modules([name for name in PRELOADED if name not in OPTIONAL or _exists(name)])
        if failure is not None:
            _close_server()
            raise RanksFailed(failure)
    return _server


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its package is not there either
        return False


def _close_server() -> None:
    if _server is not None:
        _server.close()


def _call_on_rank(payload: dict[str, Any]) -> None:
    """What each rank does. A failure leaves the process group alone: its peers shall not break before it is noted."""
    import torch.distributed as dist

    folder = Path(payload["folder"])
    function, args, kwargs = pickle.loads((folder / "call.pickle").read_bytes())
    here = rank_environment()
    if payload["init"]:
        dist.init_process_group(
            "gloo", init_method=here.init_method, rank=here.rank, world_size=here.world_size,
            timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_SECONDS),
        )  # fmt: skip
    value = function(*args, **kwargs)
    (folder / f"value_{here.rank}.pickle").write_bytes(pickle.dumps(value))
    if payload["init"] and dist.is_initialized():
        dist.barrier()  # a rank that leaves early would break the connections of the others
        dist.destroy_process_group()

"""What a process knows about its rank, read from whoever started it: torchrun, srun, our own launcher, or nobody."""

import os
import re
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megamoe.errors import TopologyError

LOCAL_INIT_METHOD = "MEGAMOE_INIT_METHOD"  # set by megamoe.launch.local in every rank that it starts
NODE_NAME = "MEGAMOE_NODE_NAME"  # wins over what the machine says: several nodes played on one machine
FIRST_SLURM_PORT, NUM_SLURM_PORTS = 20_000, 10_000


@dataclass(frozen=True)
class RankEnvironment:
    """One rank's place in the world, and where all ranks meet.

    `init_method` is what `torch.distributed.init_process_group` takes: `file://...` or `tcp://host:port`.
    """

    rank: int
    world_size: int
    local_rank: int  # among the ranks of this machine
    local_world_size: int  # number of ranks on this machine
    init_method: str
    source: Literal["torchrun", "srun", "local", "single"]

    @property
    def ranks_per_node(self) -> int | None:
        """Ranks on this machine where ranks are numbered machine by machine; None where this one is not."""
        return self.local_world_size if self.rank % self.local_world_size == self.local_rank else None

    def as_variables(self) -> dict[str, str]:
        """The same as environment variables, for libraries (DeepSpeed) that read them by these names."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "LOCAL_SIZE": str(self.local_world_size),
        }


def rank_environment(env: Mapping[str, str] = os.environ) -> RankEnvironment:
    """Read this process's rank from `env`; a process that nobody started as a rank is rank 0 of 1.

    Raises TopologyError where the variables are half set, no whole numbers, or contradict each other.
    """
    if LOCAL_INIT_METHOD in env:
        return _from_variables(env, "local", env[LOCAL_INIT_METHOD])
    if "RANK" in env or "WORLD_SIZE" in env:
        _require(env, "torchrun", ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
        port = _integer(env, "MASTER_PORT", 1, 65_535)
        return _from_variables(env, "torchrun", _tcp(env["MASTER_ADDR"], port))
    if _is_slurm_step(env):
        return _from_slurm(env)
    path = os.path.join(tempfile.gettempdir(), f"megamoe-one-rank-{uuid.uuid4().hex}")
    return RankEnvironment(0, 1, 0, 1, f"file://{path}", "single")


def node_name(env: Mapping[str, str] = os.environ) -> str:
    """What this machine is called where nodes are told apart: SLURM's name of it, else its host name."""
    return env.get(NODE_NAME) or env.get("SLURMD_NODENAME") or socket.gethostname()


def expand_node_list(node_list: str) -> list[str]:
    """Expand SLURM's short form: "node[1-3,07],login" gives node1, node2, node3, node07, login.

    Raises TopologyError where the brackets do not match or a range is none.
    """
    nodes: list[str] = []
    for item in _split_outside_brackets(node_list):
        nodes.extend(_expand_item(item, node_list))
    return nodes


def expand_tasks_per_node(text: str) -> list[int]:
    """Expand SLURM_TASKS_PER_NODE: "4(x2),1" gives [4, 4, 1]."""
    counts: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item.strip())
        if match is None:
            raise TopologyError(f'SLURM_TASKS_PER_NODE is "{text}": expected counts like "4(x2),1".')
        counts.extend([int(match[1])] * int(match[2] or 1))
    return counts


def _from_variables(env: Mapping[str, str], source: Literal["torchrun", "local"], init_method: str) -> RankEnvironment:
    """The variables that torchrun and our launcher have in common."""
    _require(env, source, ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    world_size = _integer(env, "WORLD_SIZE", 1)
    local_world_size = _integer(env, "LOCAL_WORLD_SIZE", 1, world_size)
    return RankEnvironment(
        rank=_integer(env, "RANK", 0, world_size - 1),
        world_size=world_size,
        local_rank=_integer(env, "LOCAL_RANK", 0, local_world_size - 1),
        local_world_size=local_world_size,
        init_method=init_method,
        source=source,
    )


def _is_slurm_step(env: Mapping[str, str]) -> bool:
    """Whether srun started this process as one task of a step.

    A batch script outside srun also has SLURM_PROCID=0 and SLURM_NTASKS=n, but is one process: taking it for rank 0 of
    n would wait for ranks that nobody starts. Only tasks of a step have a step id below the special ones (batch,
    interactive: 0xfffffff0 and above).
    """
    step = env.get("SLURM_STEP_ID", env.get("SLURM_STEPID", ""))
    return "SLURM_PROCID" in env and step.isdecimal() and int(step) < 0xFFFFFFF0


def _from_slurm(env: Mapping[str, str]) -> RankEnvironment:
    prefix = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    _require(env, "srun", (prefix, "SLURM_LOCALID", "SLURM_NODEID"))
    world_size = _integer(env, prefix, 1)
    tasks = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or str(world_size)
    tasks_per_node = expand_tasks_per_node(tasks)
    node = _integer(env, "SLURM_NODEID", 0, len(tasks_per_node) - 1)
    local_world_size = tasks_per_node[node]
    return RankEnvironment(
        rank=_integer(env, "SLURM_PROCID", 0, world_size - 1),
        world_size=world_size,
        local_rank=_integer(env, "SLURM_LOCALID", 0, local_world_size - 1),
        local_world_size=local_world_size,
        init_method=_slurm_meeting_place(env),
        source="srun",
    )


def _slurm_meeting_place(env: Mapping[str, str]) -> str:
    """The first node of the step, and a port that other jobs and steps of that node are unlikely to have."""
    address = env.get("MASTER_ADDR")
    if address is None:
        node_list = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST")
        if not node_list:
            raise TopologyError(
                "srun started this process but neither SLURM_STEP_NODELIST nor SLURM_JOB_NODELIST is set: "
                "set MASTER_ADDR to the host name of the first node."
            )
        address = _first_node(node_list)
    if "MASTER_PORT" in env:
        return _tcp(address, _integer(env, "MASTER_PORT", 1, 65_535))
    job, step = _integer(env, "SLURM_JOB_ID", 0), _integer(env, "SLURM_STEP_ID", 0)
    return _tcp(address, FIRST_SLURM_PORT + (job + 101 * step) % NUM_SLURM_PORTS)


def _first_node(node_list: str) -> str:
    try:
        return expand_node_list(node_list)[0]
    except TopologyError:  # a form that we do not know: SLURM's own tool does, where it is installed
        try:
            names = subprocess.run(
                ["scontrol", "show", "hostnames", node_list], capture_output=True, text=True, check=True, timeout=30
            ).stdout.split()
        except (OSError, subprocess.SubprocessError):
            names = []
        if not names:
            raise
        return names[0]


def _split_outside_brackets(node_list: str) -> list[str]:
    items, depth, start = [], 0, 0
    for position, character in enumerate(node_list):
        depth += (character == "[") - (character == "]")
        if depth not in (0, 1):
            break
        if character == "," and depth == 0:
            items.append(node_list[start:position])
            start = position + 1
    items.append(node_list[start:])
    if depth != 0 or not all(items):
        raise TopologyError(f'The SLURM node list "{node_list}" is malformed: expected a form like "node[1-3,7],n9".')
    return items


def _expand_item(item: str, node_list: str) -> list[str]:
    """Expand the first bracket of one name, then what follows it (names may have several brackets)."""
    if "[" not in item:
        return [item]
    head, _, rest = item.partition("[")
    inside, _, tail = rest.partition("]")
    names: list[str] = []
    for part in inside.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise TopologyError(f'The SLURM node list "{node_list}" is malformed: "{part}" is no number or range.')
        first, last = match[1], match[2] or match[1]
        numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
        names.extend(head + number + end for number in numbers for end in _expand_item(tail, node_list))
    return names


def _tcp(address: str, port: int) -> str:
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"  # IPv6 needs brackets


def _require(env: Mapping[str, str], source: str, names: tuple[str, ...]) -> None:
    missing = [name for name in names if not env.get(name)]
    if not missing:
        return
    present = ", ".join(name for name in names if env.get(name)) or "part of its variables"
    starter = {"torchrun": "torchrun", "srun": "srun", "local": "megamoe train --local-ranks"}[source]
    raise TopologyError(
        f"The environment describes a rank only in part: {present} set, but not {', '.join(missing)}; "
        f"start with {starter}, which sets them all, or unset them to run one rank."
    )


def _integer(env: Mapping[str, str], name: str, least: int, most: int | None = None) -> int:
    text = env.get(name, "0")
    try:
        value = int(text)
    except ValueError:
        raise TopologyError(f'The environment variable {name} is "{text}": it must be a whole number.') from None
    if value < least or (most is not None and value > most):
        span = f"at least {least}" if most is None else f"between {least} and {most}"
        raise TopologyError(f"The environment variable {name} is {value}: it must be {span} here.")
    return value

"""What nodes are called, and on which a rank is or should be."""

import os
from collections.abc import Mapping

from megamoe.errors import TopologyError
from megamoe.launch.environment import RankEnvironment, expand_node_list, expand_tasks_per_node


def expected_nodes(env: Mapping[str, str] = os.environ) -> dict[int, str]:
    """The node of every rank as SLURM lays them out node by node; empty where it does not say so."""
    node_list = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    tasks = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE")
    if not node_list or not tasks or not env.get("SLURM_DISTRIBUTION", "block").startswith("block"):
        return {}
    try:
        names, counts = expand_node_list(node_list), expand_tasks_per_node(tasks)
    except TopologyError:
        return {}
    if len(names) != len(counts):
        return {}
    return dict(enumerate(name for name, count in zip(names, counts, strict=True) for _ in range(count)))


def nodes_of_missing(
    present: Mapping[int, str], environment: RankEnvironment, env: Mapping[str, str] = os.environ
) -> dict[int, str | None]:
    """The node of each rank that is not `present`: by SLURM's list, else that of its neighbours; None: not known."""
    expected = expected_nodes(env)
    per_node = environment.ranks_per_node
    found: dict[int, str | None] = {}
    for rank in range(environment.world_size):
        if rank in present:
            continue
        found[rank] = expected.get(rank)
        if found[rank] is None and per_node is not None and environment.source != "local":
            first = rank // per_node * per_node
            neighbours = (present.get(other) for other in range(first, first + per_node))
            found[rank] = next((name for name in neighbours if name is not None), None)
    return found


def by_node(present: Mapping[int, str]) -> dict[str, list[int]]:
    """Ranks by node, both in order of the ranks."""
    nodes: dict[str, list[int]] = {}
    for rank in sorted(present):
        nodes.setdefault(present[rank], []).append(rank)
    return nodes

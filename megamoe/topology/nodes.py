"""Which ranks share a node, and the two levels of groups a hierarchical all-to-all goes over. Integers only.

Ranks are numbered node by node: node = rank // ranks per node.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megamoe.errors import TopologyError
from megamoe.topology.grid import Groups


@dataclass(frozen=True)
class ExchangeLevels:
    """Groups of the two hops, every rank in one of each. Members of a group stand in the order of their nodes."""

    local: Groups  # of each expert group, the members on one node
    across: Groups  # of each expert group, one member of every node


def exchange_levels(expert_groups: Sequence[Sequence[int]], ranks_per_node: int) -> ExchangeLevels | None:
    """How expert groups span nodes; None where one hop is all there is, since each lies within a node or has one
    member a node.

    Raises TopologyError where a group has unequal numbers of members on its nodes.
    """
    by_group = [_by_node(group, ranks_per_node) for group in expert_groups]
    if all(len(nodes) == 1 or len(nodes[0]) == 1 for nodes in by_group):
        return None
    return ExchangeLevels(
        local=[members for nodes in by_group for members in nodes],
        across=[list(members) for nodes in by_group for members in zip(*nodes, strict=True)],
    )


def _by_node(group: Sequence[int], ranks_per_node: int) -> Groups:
    nodes: dict[int, list[int]] = {}
    for rank in group:
        nodes.setdefault(rank // ranks_per_node, []).append(rank)
    counts = [len(members) for members in nodes.values()]
    if len(set(counts)) > 1:
        raise TopologyError(
            f"parallel.all_to_all hierarchical needs equally many members of an expert group on each of its nodes, but "
            f"with {ranks_per_node} ranks a node the ranks {', '.join(map(str, group))} lie {counts} to a node: change "
            "parallel.expert_parallel_size or parallel.ranks_per_node, or use parallel.all_to_all flat"
        )
    return list(nodes.values())

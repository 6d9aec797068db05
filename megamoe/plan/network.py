"""How long a collective takes, from where its ranks lie: a latency-bandwidth model of two tiers, node and network.

Inside a node each rank reaches its peers at the bandwidth of its link; between nodes each rank has a port of its own.
Latencies are counted as NCCL's own choice of algorithm counts them (NCCL 2.18, src/graph/tuning.cc): a ring of n ranks
on N nodes takes n - 1 steps, N - 1 of which cross the network; a tree goes through each node's ranks and the logarithm
of the nodes, twice. All-to-all pays for the part of the peers in the node and for the others one after the other,
which is what measurements of NCCL show (docs/published_runs.yaml, table A2).
"""

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

from megamoe.config.schema import ParallelConfig
from megamoe.plan.cluster import Cluster
from megamoe.plan.quantities import Collective, Family, Kind
from megamoe.topology.grid import Grid

BASE_LATENCY_SECONDS = 8.4e-6  # of starting any collective: baseLat of the simple protocol, tuning.cc
TREE_BANDWIDTH_SHARE = 0.92  # of the ring's, tuning.cc
MESSAGES_AT_ONCE = 8  # that a rank has under way in an all-to-all: NCCL_MAX_WORK_ELEMENTS_P2P is 16, half of them sends


@dataclass(frozen=True)
class Placement:
    """Where the ranks of a group lie, as one of them sees it."""

    num_ranks: int
    num_nodes: int
    num_on_node: int  # with the rank that looks, itself included

    @classmethod
    def of(cls, group: Sequence[int], rank: int, ranks_per_node: int) -> "Placement":
        """`group` holds `rank`; ranks are numbered node by node."""
        nodes = [member // ranks_per_node for member in group]
        return cls(len(group), len(set(nodes)), nodes.count(rank // ranks_per_node))


def group_ranks(family: Family, grid: Grid, rank: int, ranks_per_node: int) -> Sequence[int]:
    """The ranks of that group of a family which holds `rank`."""
    at = grid.coordinates(rank)
    start, stage = at.pipeline * grid.stage_ranks, grid.stage_ranks
    expert_start = start + at.expert_data * grid.expert * grid.expert_tensor + at.expert_tensor
    expert = range(expert_start, expert_start + grid.expert * grid.expert_tensor, grid.expert_tensor)
    pipeline = range(rank % stage, grid.world, stage)
    node = rank // ranks_per_node
    if family == "expert_local":
        return [member for member in expert if member // ranks_per_node == node]
    if family == "expert_across":
        place = sum(member < rank for member in expert if member // ranks_per_node == node)
        by_node: dict[int, list[int]] = {}
        for member in expert:
            by_node.setdefault(member // ranks_per_node, []).append(member)
        return [members[min(place, len(members) - 1)] for members in by_node.values()]
    if family == "model":
        first = at.data * grid.tensor
        return [p * stage + first + t for p in range(grid.pipeline) for t in range(grid.tensor)]
    strided: dict[str, Sequence[int]] = {
        "world": range(grid.world),
        "tensor": range(rank - at.tensor, rank - at.tensor + grid.tensor),
        "data": range(start + at.tensor, start + stage, grid.tensor),
        "pipeline": pipeline,
        "expert": expert,
        "expert_data": range(
            start + at.expert * grid.expert_tensor + at.expert_tensor, start + stage, grid.expert * grid.expert_tensor
        ),
        "expert_tensor": range(rank - at.expert_tensor, rank - at.expert_tensor + grid.expert_tensor),
        "tied_embedding": [  # of both ends of the pipeline all that hold the same part
            p * stage + at.tensor + data * grid.tensor
            for p in sorted({0, grid.pipeline - 1}) for data in range(grid.data)
        ],
    }
    return strided[family]


class Network:
    """Seconds of the collectives of one rank of a layout on a cluster."""

    def __init__(self, cluster: Cluster, parallel: ParallelConfig, world_size: int) -> None:
        self._grid = Grid.from_config(parallel, world_size)
        self._placements: dict[tuple[Family, int], Placement] = {}
        self._set_cluster(cluster)

    def on(self, cluster: Cluster) -> "Network":
        """The same layout on other links."""
        other = copy(self)
        if cluster.ranks_per_node != self.cluster.ranks_per_node:
            other._placements = {}
        other._set_cluster(cluster)
        return other

    def _set_cluster(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._intra_rate = cluster.intra_node.bytes_per_second * cluster.efficiency.intra_node
        self._inter_rate = cluster.inter_node.bytes_per_second * cluster.efficiency.inter_node

    def placement(self, family: Family, rank: int) -> Placement:
        key = (family, rank)
        if key not in self._placements:
            ranks_per_node = self.cluster.ranks_per_node
            group = group_ranks(family, self._grid, rank, ranks_per_node)
            self._placements[key] = Placement.of(group, rank, ranks_per_node)
        return self._placements[key]

    def seconds(self, collective: Collective, rank: int) -> float:
        """Of one call that `rank` makes."""
        if collective.kind in ("send", "receive"):
            return self._send_seconds(collective, rank)
        return self.call_seconds(collective.kind, collective.num_bytes, self.placement(collective.group, rank))

    def call_seconds(self, kind: Kind, num_bytes: float, at: Placement) -> float:
        """Of one call of a group placed `at`; `num_bytes` as in `Collective`. 0 in a group of one."""
        n = at.num_ranks
        if n == 1:
            return 0.0
        if kind == "all_to_all":
            local, remote = at.num_on_node - 1, n - at.num_on_node
            return self.exchange_seconds(num_bytes * local / n, num_bytes * remote / n, local, remote)
        rate = self._ring_rate(at)
        if kind == "all_gather":
            return (n - 1) * num_bytes / rate + self._ring_latency(at)
        if kind == "reduce_scatter":
            return (n - 1) / n * num_bytes / rate + self._ring_latency(at)
        if kind == "broadcast":
            return num_bytes / rate + self._ring_latency(at)
        ring = 2 * (n - 1) / n * num_bytes / rate + 2 * self._ring_latency(at) - BASE_LATENCY_SECONDS
        tree = 2 * num_bytes / (rate * TREE_BANDWIDTH_SHARE) + self._tree_latency(at)
        return min(ring, tree)

    def exchange_seconds(
        self, local_bytes: float, remote_bytes: float, num_local_peers: int, num_remote_peers: int
    ) -> float:
        """Of sending so much to peers in the node and to others, evenly, while they do the same."""
        intra, inter = self.cluster.intra_node, self.cluster.inter_node
        waves_local, waves_remote = num_local_peers / MESSAGES_AT_ONCE, num_remote_peers / MESSAGES_AT_ONCE
        return (
            BASE_LATENCY_SECONDS
            + local_bytes / self._intra_rate
            + remote_bytes / self._inter_rate
            + waves_local * intra.latency_seconds
            + waves_remote * inter.latency_seconds
        )

    def _send_seconds(self, collective: Collective, rank: int) -> float:
        """To a neighbour stage: across the network unless both stages lie in one node."""
        stage, per_node = self._grid.stage_ranks, self.cluster.ranks_per_node
        ahead = (rank + stage) % self._grid.world
        is_local = self._grid.world <= per_node or (stage < per_node and ahead // per_node == rank // per_node)
        rate = self._intra_rate if is_local else self._inter_rate
        link = self.cluster.intra_node if is_local else self.cluster.inter_node
        return BASE_LATENCY_SECONDS + collective.num_bytes / rate + link.latency_seconds

    def _ring_rate(self, at: Placement) -> float:
        """Bytes a second around a ring: where it crosses nodes, on the ports of all members in a node together."""
        if at.num_nodes == 1:
            return self._intra_rate
        if at.num_on_node == 1:
            return self._inter_rate
        return min(self._intra_rate, at.num_on_node * self._inter_rate)

    def _ring_latency(self, at: Placement) -> float:
        crossing = at.num_nodes - 1
        inside = at.num_ranks - 1 - crossing
        intra, inter = self.cluster.intra_node.latency_seconds, self.cluster.inter_node.latency_seconds
        return BASE_LATENCY_SECONDS + inside * intra + crossing * inter

    def _tree_latency(self, at: Placement) -> float:
        intra, inter = self.cluster.intra_node.latency_seconds, self.cluster.inter_node.latency_seconds
        inside = at.num_ranks / at.num_nodes - 1
        return BASE_LATENCY_SECONDS + 2 * (inside * intra + math.log2(at.num_nodes) * inter)

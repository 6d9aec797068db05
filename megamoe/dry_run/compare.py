"""Plan and reality held together: what `megamoe.plan` says of a role against what the role was when it was played."""

from collections import Counter
from dataclasses import dataclass
from typing import get_args

from megamoe.config.schema import Config
from megamoe.dry_run.roles import RankReality
from megamoe.dry_run.rows import StatedRows
from megamoe.plan.collectives import Rows, step_collectives
from megamoe.plan.network import group_ranks
from megamoe.plan.quantities import Family, Load
from megamoe.plan.roles import role_of
from megamoe.plan.states import States, states
from megamoe.topology.grid import Coordinates, Grid
from megamoe.topology.nodes import exchange_levels
from megamoe.topology.parameters import experts_by_layer
from megamoe.topology.updates import reduce_bucket_elements

# kind, ranks of the group (of a message: the other rank), bytes of one call, phase (of a message: none)
CallKey = tuple[str, tuple[int, ...], int, str]


@dataclass(frozen=True)
class Difference:
    """One figure of a rank of which plan and reality do not say the same."""

    rank: int
    quantity: str
    planned: int
    real: int

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.quantity}: planned {self.planned:,}, really {self.real:,}"


def differences(config: Config, world_size: int, reality: RankReality, load: Load) -> tuple[Difference, ...]:
    """Where the plan of `config` fails what a rank was when it was played under `load`: bytes of weights, gradients
    and optimizer, and the number of calls of each collective of each size. None: they say the same.

    Where gradients overflow DeepSpeed's bucket at stage 2, the order in which autograd has them decides which small
    ones share one; of those calls the sum is planned, and compared.
    """
    grid = Grid.from_config(config.parallel, world_size)
    at = grid.coordinates(reality.rank)
    found = reality.states
    planned = states(config, world_size, reality.rank)
    figures = [
        ("bytes of weights", planned.at("rest", "weights"), found.weights),
        ("bytes of gradients", _planned_gradients(config, planned), found.gradients),
        ("bytes of the optimizer", planned.at("rest", "optimizer"), found.optimizer),
    ]
    called = called_collectives(reality)
    expected = planned_collectives(config, world_size, reality.rank, _stated_rows(config, grid, at, load))
    if config.parallel.zero_stage == 2 and _overflows(config, world_size, at.pipeline):
        expected, called = (_with_sums_of_gradients(config, grid, reality.rank, each) for each in (expected, called))
    for key in sorted(expected.keys() | called.keys()):
        figures.append((_name_of(key), expected[key], called[key]))
    return tuple(Difference(reality.rank, *figure) for figure in figures if figure[1] != figure[2])


def _overflows(config: Config, world_size: int, pipeline_rank: int) -> bool:
    """Whether all gradients of a rank are more than the bucket holds."""
    num_elements = role_of(config, world_size, pipeline_rank).num_elements
    return num_elements > reduce_bucket_elements(num_elements)


def _with_sums_of_gradients(config: Config, grid: Grid, rank: int, counted: Counter[CallKey]) -> Counter[CallKey]:
    """The same with one entry for all reductions of gradients over a group: under the size 0, their bytes."""
    families = groups_of_rank(config, grid, rank)
    groups = {families[name] for name in ("data", "expert_data") if name in families}
    summed: Counter[CallKey] = Counter()
    for (kind, ranks, num_bytes, phase), count in counted.items():
        if kind == "all_reduce" and phase == "backward" and ranks in groups:
            summed[kind, ranks, 0, phase] += num_bytes * count
        else:
            summed[kind, ranks, num_bytes, phase] += count
    return summed


def called_collectives(reality: RankReality) -> Counter[CallKey]:
    """The calls of a played rank. Those on groups of one are left out: nothing travels."""
    counted: Counter[CallKey] = Counter()
    for call, count in reality.calls.items():
        if call.peer is not None:
            counted[call.kind, (call.peer,), call.num_bytes, ""] += count
        elif len(call.ranks) > 1:
            counted[call.kind, call.ranks, call.num_bytes, call.phase] += count
    return counted


def planned_collectives(config: Config, world_size: int, rank: int, rows_sent: Rows) -> Counter[CallKey]:
    """The plan's calls of `rank`, its families of groups turned into ranks."""
    grid = Grid.from_config(config.parallel, world_size)
    at, groups = grid.coordinates(rank), groups_of_rank(config, grid, rank)
    counted: Counter[CallKey] = Counter()
    for each in step_collectives(
        config,
        world_size,
        at.pipeline,
        rows_sent=rows_sent,
        data_rank=at.data,
        expert_data_rank=at.expert_data,
    ):
        if each.group != "pipeline":
            counted[each.kind, groups[each.group], each.num_bytes, each.phase] += each.count
            continue
        ring = groups["pipeline"]
        goes_on = (each.kind == "send") is (each.purpose == "activations")  # to or from the next stage
        peer = ring[(ring.index(rank) + (1 if goes_on else -1)) % len(ring)]
        counted[each.kind, (peer,), each.num_bytes, ""] += each.count
    return counted


def groups_of_rank(config: Config, grid: Grid, rank: int) -> dict[str, tuple[int, ...]]:
    """Family (`megamoe.plan.quantities.Family`) -> the ranks of the group of `rank`."""
    families = get_args(Family)
    ranks_per_node = config.parallel.ranks_per_node
    if config.parallel.all_to_all == "flat" or ranks_per_node is None or grid.expert == 1:
        two_levels = False
    else:
        two_levels = exchange_levels(grid.expert_groups(), ranks_per_node) is not None
    if not two_levels:
        families = tuple(family for family in families if family not in ("expert_local", "expert_across"))
    return {family: tuple(group_ranks(family, grid, rank, ranks_per_node or grid.world)) for family in families}


def _planned_gradients(config: Config, planned: States) -> int:
    """When the update begins: at stage 2 they are reduced by then, but not yet padded."""
    if config.parallel.zero_stage < 2:
        return planned.at("backward", "gradients")
    return planned.at("update", "gradients") - planned.of("padding of gradients")


def _stated_rows(config: Config, grid: Grid, at: Coordinates, load: Load) -> Rows:
    """What the rank was told when it was played."""
    groups, rows = groups_of_rank(config, grid, at.rank), StatedRows(config, at, load)
    num_experts, num_chunks = experts_by_layer(config.model, config.moe), config.parallel.all_to_all_chunks
    num_ranks = len(groups["expert"])
    num_local = len(groups["expert_local"]) if "expert_local" in groups else num_ranks
    nodes = (num_ranks // num_local, num_local)

    def rows_of_plan(layer: int, _: int, chunk: int, hop: int) -> tuple[int, int]:
        stated = rows.rows((3, *nodes, num_chunks, num_experts[layer] // num_ranks // num_chunks))
        sent, midway, received = stated[:, :, :, chunk].sum(axis=(1, 2, 3)).tolist()
        if "expert_local" not in groups:
            return sent, received
        return (sent, midway) if hop == 0 else (midway, received)

    return rows_of_plan


def _name_of(key: CallKey) -> str:
    kind, ranks, num_bytes, phase = key
    if not phase:
        return f"messages, {kind}, with rank {ranks[0]}, of {num_bytes:,} bytes"
    if num_bytes == 0:
        return f"bytes in all calls of {kind} in {phase} over {len(ranks)} ranks ({ranks[0]}..{ranks[-1]})"
    ends = f"{ranks[0]}..{ranks[-1]}"
    return f"calls of {kind} in {phase} over {len(ranks)} ranks ({ends}), of {num_bytes:,} bytes"

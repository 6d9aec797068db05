"""Process groups: made once by Megatron-core, checked against the rank grid, registered with DeepSpeed.

Both engines keep their groups in module state. Everything of ours gets a `ParallelGroups` instead; the module state is
only filled so that the engines find what they look for, and agree.
"""

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.comm import comm as deepspeed_comm
from deepspeed.utils import groups as deepspeed_groups
from megatron.core import parallel_state

from megamoe.config.schema import ParallelConfig
from megamoe.errors import TopologyError
from megamoe.model.parallel import ParallelGroups
from megamoe.moe.layer import expert_group_name
from megamoe.topology.grid import Grid, groups_mismatch
from megamoe.topology.nodes import exchange_levels


class MpuAdapter:
    """The `mpu` object DeepSpeed asks for ranks and groups. "Model parallel" is tensor x pipeline, pipeline-major."""

    def __init__(self, groups: ParallelGroups) -> None:
        self._groups, self._grid, self._at = groups, groups.grid, groups.coordinates

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.data

    def get_data_parallel_world_size(self) -> int:
        return self._grid.data

    def get_data_parallel_rank(self) -> int:
        return self._at.data

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._groups.data)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.model

    def get_model_parallel_world_size(self) -> int:
        return self._grid.tensor * self._grid.pipeline

    def get_model_parallel_rank(self) -> int:
        return self._at.tensor + self._grid.tensor * self._at.pipeline

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.tensor

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._grid.tensor

    def get_tensor_model_parallel_rank(self) -> int:
        return self._at.tensor

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.pipeline

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._grid.pipeline

    def get_pipeline_model_parallel_rank(self) -> int:
        return self._at.pipeline


def create_groups(parallel: ParallelConfig, *, launched_ranks_per_node: int | None = None) -> ParallelGroups:
    """Make all process groups of this layout. torch.distributed must be initialised; collective over all ranks.

    `launched_ranks_per_node` is what the launcher says, for hierarchical all-to-all where the configuration does not.
    Raises TopologyError when the world does not fold as configured, or when an engine groups ranks differently.
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    grid = Grid.from_config(parallel, world_size)
    levels = None
    if parallel.all_to_all == "hierarchical" and grid.expert > 1:
        levels = exchange_levels(grid.expert_groups(), _ranks_per_node(parallel, launched_ranks_per_node))
    # DeepSpeed answers questions about groups only once its own wrapper of torch.distributed exists.
    deepspeed_comm.init_distributed(get_accelerator().communication_backend_name(), dist_init_required=False)
    virtual = parallel.virtual_pipeline_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=grid.tensor,
        pipeline_model_parallel_size=grid.pipeline,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        expert_model_parallel_size=grid.expert,
        expert_tensor_parallel_size=grid.expert_tensor,
        distributed_timeout_minutes=parallel.timeout_seconds / 60,  # a fraction is as good: it becomes a timedelta
        create_gloo_process_groups=False,
    )
    timeout = timedelta(seconds=parallel.timeout_seconds)
    groups = ParallelGroups(
        grid=grid,
        coordinates=grid.coordinates(rank),
        world=dist.group.WORLD,
        tensor=parallel_state.get_tensor_model_parallel_group(),
        data=parallel_state.get_data_parallel_group(),
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        model=parallel_state.get_model_parallel_group(),
        context=parallel_state.get_context_parallel_group(),
        expert=parallel_state.get_expert_model_parallel_group(),
        expert_data=parallel_state.get_expert_data_parallel_group(),
        expert_tensor=parallel_state.get_expert_tensor_parallel_group(),
        tied_embedding=_own_group(_tied_embedding_ranks(grid), timeout),
        expert_local=_own_group(levels.local, timeout) if levels is not None else None,
        expert_across=_own_group(levels.across, timeout) if levels is not None else None,
    )
    _check_megatron(groups)
    register_with_deepspeed(groups)
    return groups


def destroy_groups() -> None:
    """Forget the groups in both engines' module state, so that another layout can be set up in this process."""
    parallel_state.destroy_model_parallel()
    for table in _deepspeed_tables():
        table.clear()
    deepspeed_groups.mpu = None
    deepspeed_groups.expert_tensor_parallel_world_size = 1


def register_with_deepspeed(groups: ParallelGroups) -> None:
    """Put our expert groups where DeepSpeed's engine and ZeRO look for them.

    Left to itself DeepSpeed makes them when the first MoE layer is met, which hangs a pipeline stage without one.
    Raises TopologyError if groups of this size are registered already and differ.
    """
    name = expert_group_name(groups.grid.expert)
    expert, expert_ranks, expert_data, expert_data_ranks = _deepspeed_tables()
    if name in expert:
        _require_same("DeepSpeed expert", [dist.get_process_group_ranks(groups.expert)], [expert_ranks[name]])
    expert[name], expert_data[name] = groups.expert, groups.expert_data
    expert_ranks[name] = dist.get_process_group_ranks(groups.expert)
    expert_data_ranks[name] = dist.get_process_group_ranks(groups.expert_data)
    deepspeed_groups.mpu = MpuAdapter(groups)
    deepspeed_groups.expert_tensor_parallel_world_size = groups.grid.expert_tensor
    _check_deepspeed(groups)


def _deepspeed_tables() -> tuple[dict, dict, dict, dict]:
    return (
        deepspeed_groups._EXPERT_PARALLEL_GROUP,
        deepspeed_groups._EXPERT_PARALLEL_GROUP_RANKS,
        deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP,
        deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS,
    )


def _ranks_per_node(parallel: ParallelConfig, launched: int | None) -> int:
    """What the configuration says, or else the launcher, of which then all ranks must have heard the same.

    Collective over all ranks. Raises TopologyError where neither says it, or ranks were told different numbers.
    """
    if parallel.ranks_per_node is not None:
        return parallel.ranks_per_node
    heard = torch.tensor([launched or 0, -(launched or 0)], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(heard, op=dist.ReduceOp.MAX)
    most, least = int(heard[0]), -int(heard[1])
    if least == 0:
        raise TopologyError(
            "parallel.all_to_all hierarchical must know how many ranks a node has, but the launcher does not say, or "
            "does not number ranks node by node: set parallel.ranks_per_node, or use parallel.all_to_all flat"
        )
    if most != least:
        raise TopologyError(
            f"parallel.all_to_all hierarchical needs nodes of equal size, but the launcher started {least} ranks on "
            f"one node and {most} on another: start equal numbers, or use parallel.all_to_all flat"
        )
    return most


def _own_group(groups: Sequence[Sequence[int]], timeout: timedelta) -> dist.ProcessGroup | None:
    """Make all these groups, of which none share a rank, and return that of this rank. Collective over all ranks."""
    own = None
    for ranks in groups:
        group = dist.new_group(ranks, timeout=timeout)
        if dist.get_rank() in ranks:
            own = group
    return own


def _tied_embedding_ranks(grid: Grid) -> list[list[int]]:
    """One group per tensor coordinate: all data ranks of the first and the last stage. None where they are one."""
    if grid.pipeline == 1:
        return []
    return [
        [
            grid.rank_at(tensor=tensor, data=data, pipeline=stage)
            for stage in (0, grid.pipeline - 1)
            for data in range(grid.data)
        ]
        for tensor in range(grid.tensor)
    ]


def _own(groups: Sequence[Sequence[int]], rank: int) -> list[list[int]]:
    return [list(group) for group in groups if rank in group]


def _require_same(name: str, ours: list[list[int]], theirs: list[list[int]]) -> None:
    sentence = groups_mismatch(name, ours, theirs)
    if sentence is not None:
        raise TopologyError(sentence)


def _check_megatron(groups: ParallelGroups) -> None:
    """Hold the grid's arithmetic to the groups that Megatron-core made. Each rank checks its own."""
    grid, rank = groups.grid, groups.coordinates.rank
    families = {
        "tensor": (grid.tensor_groups(), groups.tensor),
        "data": (grid.data_groups(), groups.data),
        "pipeline": (grid.pipeline_groups(), groups.pipeline),
        "model": (grid.model_groups(), groups.model),
        "expert": (grid.expert_groups(), groups.expert),
        "expert-data": (grid.expert_data_groups(), groups.expert_data),
        "expert-tensor": (grid.expert_tensor_groups(), groups.expert_tensor),
    }
    for name, (ours, group) in families.items():
        theirs = [sorted(dist.get_process_group_ranks(group))]
        _require_same(f"Megatron-core {name}", [sorted(g) for g in _own(ours, rank)], theirs)


def _check_deepspeed(groups: ParallelGroups) -> None:
    """Hold the grid to what DeepSpeed answers when its engine and ZeRO ask for groups."""
    grid, rank = groups.grid, groups.coordinates.rank
    name = expert_group_name(grid.expert)
    families = {
        "data": (grid.data_groups(), deepspeed_groups._get_data_parallel_group()),
        "expert": (grid.expert_groups(), deepspeed_groups._get_expert_parallel_group(name)),
        "expert-data": (grid.expert_data_groups(), deepspeed_groups._get_expert_data_parallel_group(name)),
    }
    for family, (ours, group) in families.items():
        theirs = [sorted(dist.get_process_group_ranks(group))]
        _require_same(f"DeepSpeed {family}", [sorted(g) for g in _own(ours, rank)], theirs)

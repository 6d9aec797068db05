"""The optimizer's parameter groups and how ZeRO cuts each over its data-parallel ranks. No torch.

These are the groups that `megamoe.training.optimizer.parameter_groups` makes and the partitions that DeepSpeed 0.19.8
makes of them (`deepspeed/runtime/zero/stage_1_and_2.py`): the parameters of a group lie one after another, the end is
padded to a multiple of 2 x ranks, and each rank owns an equal run.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

from megamoe.config.schema import OptimizerConfig
from megamoe.plan.roles import HeldParameter, Role
from megamoe.topology.grid import Grid
from megamoe.topology.updates import UpdateKind, update_kind

ALIGNMENT = 2  # elements: DeepSpeed's nccl_start_alignment_factor


@dataclass(frozen=True)
class OptimizerGroup:
    """Parameters with one weight decay and one scale of the learning rate. `num_ranks` share their optimizer state."""

    is_expert: bool
    num_ranks: int
    members: tuple[HeldParameter, ...]

    @cached_property
    def num_elements(self) -> int:
        return sum(member.num_elements for member in self.members)

    @property
    def padded_elements(self) -> int:
        """Elements of DeepSpeed's flat buffer."""
        unit = ALIGNMENT * self.num_ranks
        return -(-self.num_elements // unit) * unit

    @property
    def partition_elements(self) -> int:
        """Elements that one rank updates, padding included."""
        return self.padded_elements // self.num_ranks

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each member begins in the flat buffer."""
        found, offset = [], 0
        for member in self.members:
            found.append(offset)
            offset += member.num_elements
        return tuple(found)

    def is_in_partition(self, number: int) -> list[bool]:
        """For each member whether the partition holds any of it."""
        begin, end = number * self.partition_elements, (number + 1) * self.partition_elements
        return [
            offset < end and offset + member.num_elements > begin
            for offset, member in zip(self.offsets, self.members, strict=True)
        ]

    def padding_in_partition(self, number: int) -> int:
        """Elements of the partition that belong to no parameter."""
        begin = number * self.partition_elements
        return self.partition_elements - max(0, min(self.partition_elements, self.num_elements - begin))


@lru_cache(maxsize=1024)  # a search asks for the same few again and again
def optimizer_groups(role: Role, optimizer: OptimizerConfig, grid: Grid) -> tuple[OptimizerGroup, ...]:
    """The groups of a rank of `role`, in the optimizer's order: dense ones first."""
    members: dict[UpdateKind, list[HeldParameter]] = {}
    for held in role.parameters:
        members.setdefault(update_kind(held.parameter, optimizer), []).append(held)
    return tuple(
        OptimizerGroup(kind.is_expert, grid.expert_data if kind.is_expert else grid.data, tuple(members[kind]))
        for kind in sorted(members)
    )

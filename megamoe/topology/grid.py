"""The rank grid: which rank stands where, and which ranks form which group. Integers only, no processes.

Dense layers fold the ranks as tensor (fastest), data, pipeline (slowest). Experts fold each pipeline stage's block of
consecutive ranks anew: expert_tensor (fastest), expert, expert_data. These are Megatron-core's order "tp-cp-ep-dp-pp"
without context parallelism, and what DeepSpeed's groups assume (`deepspeed.utils.groups`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megamoe.config.schema import ParallelConfig
from megamoe.errors import ConfigError, TopologyError

Groups = list[list[int]]


@dataclass(frozen=True)
class Coordinates:
    """Where a rank stands: (tensor, data, pipeline) as a dense rank, the rest inside its pipeline stage's experts."""

    rank: int
    tensor: int
    data: int
    pipeline: int
    expert: int
    expert_data: int
    expert_tensor: int


@dataclass(frozen=True)
class Grid:
    """Sizes of the fold. `data` and `expert_data` are what remains.

    Raises TopologyError or ConfigError, saying what would be valid, when the sizes do not fold `world` ranks.
    Every `*_groups` method lists its groups, and the ranks in them, in Megatron-core's order.
    """

    tensor: int
    pipeline: int
    expert: int
    expert_tensor: int
    world: int

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "expert", "expert_tensor", "world"):
            if getattr(self, name) < 1:
                raise ConfigError(f"the {name} size of the rank grid is {getattr(self, name)}: use 1 or more")
        if self.expert_tensor not in (1, self.tensor):
            raise ConfigError(
                f"parallel.expert_tensor_parallel_size {self.expert_tensor} is neither 1 nor "
                f"parallel.tensor_parallel_size: use {' or '.join(str(n) for n in sorted({1, self.tensor}))}"
            )
        model_ranks = self.tensor * self.pipeline
        if self.world % model_ranks:
            raise TopologyError(
                f"{self.world} ranks cannot be split over parallel.tensor_parallel_size {self.tensor} x "
                f"parallel.pipeline_parallel_size {self.pipeline}: start a multiple of {model_ranks} ranks"
            )
        if self.stage_ranks % (self.expert * self.expert_tensor):
            fitting = self.stage_ranks // self.expert_tensor
            choices = ", ".join(str(n) for n in range(1, fitting + 1) if fitting % n == 0)
            raise TopologyError(
                f"parallel.expert_parallel_size {self.expert} x parallel.expert_tensor_parallel_size "
                f"{self.expert_tensor} does not divide the {self.stage_ranks} ranks of a pipeline stage: "
                f"use an expert_parallel_size of {choices}"
            )

    @classmethod
    def from_config(cls, parallel: ParallelConfig, world_size: int) -> "Grid":
        """Fold `world_size` ranks as configured. Raises TopologyError or ConfigError with what would be valid."""
        return cls(
            tensor=parallel.tensor_parallel_size,
            pipeline=parallel.pipeline_parallel_size,
            expert=parallel.expert_parallel_size,
            expert_tensor=parallel.expert_tensor_parallel_size,
            world=world_size,
        )

    @property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline stage; stage p holds ranks [p * stage_ranks, (p + 1) * stage_ranks)."""
        return self.world // self.pipeline

    @property
    def data(self) -> int:
        return self.stage_ranks // self.tensor

    @property
    def expert_data(self) -> int:
        return self.stage_ranks // (self.expert * self.expert_tensor)

    def coordinates(self, rank: int) -> Coordinates:
        """Both foldings of one rank. Raises TopologyError for a rank outside [0, world)."""
        if not 0 <= rank < self.world:
            raise TopologyError(f"rank {rank} is not one of the {self.world} ranks 0 to {self.world - 1}")
        pipeline, inside = divmod(rank, self.stage_ranks)
        return Coordinates(
            rank=rank,
            tensor=inside % self.tensor,
            data=inside // self.tensor,
            pipeline=pipeline,
            expert=inside // self.expert_tensor % self.expert,
            expert_data=inside // (self.expert_tensor * self.expert),
            expert_tensor=inside % self.expert_tensor,
        )

    def rank_at(self, *, tensor: int = 0, data: int = 0, pipeline: int = 0) -> int:
        """The rank at these dense coordinates. Raises TopologyError when one is out of range."""
        _check_range("tensor", tensor, self.tensor)
        _check_range("data", data, self.data)
        _check_range("pipeline", pipeline, self.pipeline)
        return pipeline * self.stage_ranks + data * self.tensor + tensor

    def rank_at_expert(
        self, *, expert: int = 0, expert_data: int = 0, expert_tensor: int = 0, pipeline: int = 0
    ) -> int:
        """The rank at these expert coordinates. Raises TopologyError when one is out of range."""
        _check_range("expert", expert, self.expert)
        _check_range("expert_data", expert_data, self.expert_data)
        _check_range("expert_tensor", expert_tensor, self.expert_tensor)
        _check_range("pipeline", pipeline, self.pipeline)
        return pipeline * self.stage_ranks + (expert_data * self.expert + expert) * self.expert_tensor + expert_tensor

    def tensor_groups(self) -> Groups:
        """Ranks that share the matrices of a dense layer."""
        return _strided_groups(self.world, size=self.tensor, stride=1)

    def data_groups(self) -> Groups:
        """Ranks that hold the same dense weights and see different samples."""
        return _strided_groups(self.world, size=self.data, stride=self.tensor)

    def pipeline_groups(self) -> Groups:
        """One rank of each stage: the path of an activation."""
        return _strided_groups(self.world, size=self.pipeline, stride=self.stage_ranks)

    def model_groups(self) -> Groups:
        """Tensor x pipeline: the ranks that together hold one copy of the dense model, stage after stage."""
        return [
            [self.rank_at(tensor=t, data=d, pipeline=p) for p in range(self.pipeline) for t in range(self.tensor)]
            for d in range(self.data)
        ]

    def expert_groups(self) -> Groups:
        """Ranks among which the experts of a layer are dealt out, and tokens exchanged."""
        return _strided_groups(self.world, size=self.expert, stride=self.expert_tensor)

    def expert_data_groups(self) -> Groups:
        """Ranks that hold the same experts (and, with expert_tensor > 1, the same part of them)."""
        return _strided_groups(self.world, size=self.expert_data, stride=self.expert_tensor * self.expert)

    def expert_tensor_groups(self) -> Groups:
        """Ranks that share the matrices of an expert."""
        return _strided_groups(self.world, size=self.expert_tensor, stride=1)

    def embedding_groups(self) -> Groups:
        """First and last rank of each pipeline, which hold a tied embedding; one rank where there is one stage."""
        return [sorted({group[0], group[-1]}) for group in self.pipeline_groups()]


def groups_mismatch(name: str, ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> str | None:
    """None when both list the same groups, else the sentence for a TopologyError, with the two lists.

    The order of the groups is free, since engines create them in different orders. The order of the ranks within a
    group is not: it numbers the members.
    """
    our_list = sorted([int(rank) for rank in group] for group in ours)
    their_list = sorted([int(rank) for rank in group] for group in theirs)
    if our_list == their_list:
        return None
    return (
        f"the {name} groups of the engine are not those of the rank grid: "
        f"the grid has {our_list}, the engine {their_list}"
    )


def describe(grid: Grid) -> str:
    """A drawing of the fold in a few lines: the ranks of each stage by tensor group, then the groups of each family.

    Long rows are cut in the middle, so that a thousand ranks need little more room than eight.
    """
    ranks = "1 rank" if grid.world == 1 else f"{grid.world} ranks"
    experts = f"expert_tensor {grid.expert_tensor} x expert {grid.expert} x expert_data {grid.expert_data}"
    lines = [
        f"{ranks} = tensor {grid.tensor} x data {grid.data} x pipeline {grid.pipeline}",
        f"experts of a stage: {experts}",
    ]
    tensor_groups = grid.tensor_groups()
    stages = []
    for stage in range(grid.pipeline):
        blocks = tensor_groups[stage * grid.data : (stage + 1) * grid.data]
        stages.append(f"stage {stage:<8}| {_row([_draw(group) for group in blocks], ' | ')} |")
    families = {
        "tensor": tensor_groups,
        "data": grid.data_groups(),
        "pipeline": grid.pipeline_groups(),
        "expert": grid.expert_groups(),
        "expert_data": grid.expert_data_groups(),
        "expert_tensor": grid.expert_tensor_groups(),
    }
    lines += stages if len(stages) <= 8 else [*stages[:6], "...", stages[-1]]
    for name, groups in families.items():
        lines.append(f"{name:<14}{_row([f'[{_draw(group)}]' for group in groups], ' ')}")
    return "\n".join(lines)


def _row(items: list[str], separator: str, width: int = 100) -> str:
    """The items side by side; where they are wider than `width`, the first few and the last."""
    whole = separator.join(items)
    if len(whole) <= width:
        return whole
    row, end = items[0], f"{separator}...{separator}{items[-1]}"
    for item in items[1:]:
        if len(row) + len(separator) + len(item) + len(end) > width:
            break
        row += separator + item
    return row + end


def _draw(group: Sequence[int]) -> str:
    if len(group) <= 4:
        return " ".join(map(str, group))
    if group[-1] - group[0] == len(group) - 1:
        return f"{group[0]}..{group[-1]}"
    return f"{group[0]} {group[1]} {group[2]} ... {group[-1]}"


def _strided_groups(world: int, *, size: int, stride: int) -> Groups:
    """Groups of `size` ranks `stride` apart, numbered by their lowest rank: one dimension of a row-major grid."""
    return [
        list(range(block + start, block + size * stride, stride))
        for block in range(0, world, size * stride)
        for start in range(stride)
    ]


def _check_range(name: str, value: int, size: int) -> None:
    if not 0 <= value < size:
        raise TopologyError(f"{name} coordinate {value} lies outside the grid: use 0 to {size - 1}")

"""Bytes of weights, gradients and optimizer on one rank, to the byte as DeepSpeed 0.19.8 holds them. No torch.

Each `StateLine` is one kind of tensor of the engines, with the moments at which it is alive:

    rest        between steps; activations are gone
    backward    when the last backward pass of a step ends: all that is kept from micro-batch to micro-batch, and the
                bucket of the pass. Activations are alive beside it, fewer and fewer
    update      when gradients are reduced and the optimizer is about to run

Stage s is ZeRO's. DeepSpeed's code is `deepspeed/runtime/zero/stage_1_and_2.py`. Gradients add up in fp32 whatever the
precision. One parameter's new gradient, which lives for a moment only, is in `fresh_gradient_bytes`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from megamoe.config.schema import Config
from megamoe.plan.optimizer_groups import OptimizerGroup, optimizer_groups
from megamoe.plan.roles import HeldParameter, Role, role_of, trained_part
from megamoe.topology.grid import Coordinates, Grid
from megamoe.topology.parameters import dimensions
from megamoe.topology.updates import reduce_bucket_elements

Moment = Literal["rest", "backward", "update"]
Category = Literal["weights", "gradients", "optimizer", "buffers"]
ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
MASTER_BYTES = 4  # masters, moments and accumulated gradients are fp32
MAX_STAGE_0_BUCKET_ELEMENTS = 500_000_000  # deepspeed.runtime.engine.MEMORY_OPT_ALLREDUCE_SIZE


@dataclass(frozen=True)
class StateLine:
    """Tensors of one kind on one rank: what they are, and when they are alive."""

    name: str
    category: Category
    num_bytes: int
    alive: tuple[Moment, ...]


@dataclass(frozen=True)
class States:
    """All lines of one rank."""

    lines: tuple[StateLine, ...]

    def at(self, moment: Moment, category: Category | None = None) -> int:
        """Bytes alive at `moment`, of one category or of all."""
        return sum(
            line.num_bytes
            for line in self.lines
            if moment in line.alive and (category is None or line.category == category)
        )

    def of(self, name: str) -> int:
        """Bytes of the lines of one name."""
        return sum(line.num_bytes for line in self.lines if line.name == name)


def states(config: Config, world_size: int, rank: int) -> States:
    """What `rank` holds. Raises TopologyError or ConfigError where the layout does not fit the ranks.

    Ranks of a pipeline stage differ only in which parameters their partitions meet: at stage 2 in fp32, and in
    "update" at stage 1.
    """
    grid = Grid.from_config(config.parallel, world_size)
    at = grid.coordinates(rank)
    role = role_of(config, world_size, at.pipeline)
    trained = trained_part(role, config.finetune)
    groups = optimizer_groups(trained, config.optimizer, grid)
    zero_stage = config.parallel.zero_stage
    num_passes = num_micro_batches(config, world_size) * config.parallel.virtual_pipeline_parallel_size
    lines = _whole(config, trained) if zero_stage == 0 else _partitioned(config, trained, groups, at, num_passes)
    return States((*lines, *_frozen(config, role.num_elements - trained.num_elements), *_kept_buffers(config, role)))


def fullest_states(config: Config, world_size: int, pipeline_rank: int, moment: Moment = "backward") -> States:
    """Those of the rank of a pipeline stage that holds most at `moment`. Raises as `states` does."""
    grid, parallel = Grid.from_config(config.parallel, world_size), config.parallel
    first = pipeline_rank * grid.stage_ranks
    is_fp32 = config.run.precision == "fp32"
    if parallel.zero_stage == 0 or (moment != "update" and not (parallel.zero_stage == 2 and is_fp32)):
        return states(config, world_size, first)  # as all others
    seen: dict[tuple[int, int], int] = {}
    for rank in range(first, first + grid.stage_ranks):
        at = grid.coordinates(rank)
        seen.setdefault((at.data, at.expert_data), rank)
    return max((states(config, world_size, rank) for rank in seen.values()), key=lambda each: each.at(moment))


def _whole(config: Config, role: Role) -> Iterator[StateLine]:
    """Stage 0, fp32 alone: weights, gradients and moments whole on every rank, the weights being their own masters."""
    size = role.num_elements
    yield StateLine("weights", "weights", size * ELEMENT_BYTES[config.run.precision], ("rest", "backward", "update"))
    yield from _moments(config, size, len(role.parameters))
    # parameter.grad, from the first backward pass to the end of the update
    yield StateLine("gradients", "gradients", size * MASTER_BYTES, ("backward", "update"))


def _frozen(config: Config, num_elements: int) -> Iterator[StateLine]:
    if num_elements:
        size = num_elements * ELEMENT_BYTES[config.run.precision]
        yield StateLine("frozen weights", "weights", size, ("rest", "backward", "update"))


def _moments(config: Config, num_elements: int, num_tensors: int) -> Iterator[StateLine]:
    """AdamW's exp_avg and exp_avg_sq and its step counts, one fp32 number a tensor; SGD's momentum_buffer."""
    always: tuple[Moment, ...] = ("rest", "backward", "update")
    if config.optimizer.name == "adamw":
        yield StateLine("moments", "optimizer", 2 * num_elements * MASTER_BYTES, always)
        yield StateLine("step counts", "optimizer", num_tensors * MASTER_BYTES, always)
    elif config.optimizer.momentum > 0.0:
        yield StateLine("moments", "optimizer", num_elements * MASTER_BYTES, always)


def _partitioned(
    config: Config, role: Role, groups: Sequence[OptimizerGroup], at: Coordinates, num_passes: int
) -> Iterator[StateLine]:
    """Stages 1 and 2."""
    always: tuple[Moment, ...] = ("rest", "backward", "update")
    element = ELEMENT_BYTES[config.run.precision]
    padded = sum(group.padded_elements for group in groups)
    owned = sum(group.partition_elements for group in groups)
    # bit16_groups_flat: parameters are views of it, in fp32 too
    yield StateLine("weights", "weights", padded * element, always)
    # single_partition_of_fp32_groups: a copy, in fp32 too
    yield StateLine("masters", "optimizer", owned * MASTER_BYTES, always)
    yield from _moments(config, owned, len(groups))
    if config.parallel.zero_stage == 1:
        yield from _gradients_1(config, groups, at)
    else:
        yield from _gradients_2(config, role, groups, at, num_passes)


def _gradients_1(config: Config, groups: Sequence[OptimizerGroup], at: Coordinates) -> Iterator[StateLine]:
    """Stage 1: every gradient whole until one reduction at the end of the step."""
    num_local = sum(group.num_elements for group in groups)
    bucket = reduce_bucket_elements(num_local)
    # fp32: parameter.grad; 16 bits: parameter.grad_accum
    yield StateLine("gradients", "gradients", num_local * MASTER_BYTES, ("backward",))
    # ipg_buckets: made when the first gradient of a step arrives
    yield StateLine("bucket", "buffers", bucket * MASTER_BYTES, ("backward",))
    if config.run.precision == "fp32":
        yield from _owned_gradients(groups, at)
        return
    yield from _compact_gradients(groups, ("update",))
    owned = {id(member) for _, member in _owned(groups, at)}
    others = [member for group in groups for member in group.members if id(member) not in owned]
    # grad_accum of what other ranks update keeps its memory, here the whole bucket, until its group is updated.
    kept = bucket if any(member.num_elements <= bucket for member in others) else 0
    kept += sum(member.num_elements for member in others if member.num_elements > bucket)
    yield StateLine("gradients of other ranks", "gradients", kept * MASTER_BYTES, ("update",))


def _gradients_2(
    config: Config, role: Role, groups: Sequence[OptimizerGroup], at: Coordinates, num_passes: int
) -> Iterator[StateLine]:
    """Stage 2: every backward pass ends in a reduction, after which a rank keeps what it updates."""
    bucket = reduce_bucket_elements(role.num_elements)
    element = ELEMENT_BYTES[config.run.precision]
    # ipg_buckets: made for every backward pass, gone after it
    yield StateLine("bucket", "buffers", bucket * element, ("backward",))
    if config.run.precision != "fp32":
        yield from _compact_gradients(groups, ("backward", "update"))
        # parameter.grad of what did not fit the bucket, to the end of the pass
        large = sum(member.num_elements for _, member in _owned(groups, at) if member.num_elements > bucket)
        yield StateLine("gradients larger than the bucket", "gradients", large * element, ("backward",))
        return
    owned = list(_owned(groups, at))
    last_chunk = config.parallel.virtual_pipeline_parallel_size - 1
    # The first backward pass of a step is one of the last chunk: its gradients share grads_in_partition, for which the
    # whole partition is allocated; parameters of other chunks get zeros of their own.
    kept = _pass_elements(role, owned, chunk=last_chunk) + sum(
        member.num_elements for _, member in owned if role.chunk_of(member) != last_chunk
    )
    padding = sum(group.padding_in_partition(_partition(group, at)) for group in groups)
    yield StateLine("gradients", "gradients", kept * MASTER_BYTES, ("backward", "update"))
    yield StateLine("padding of gradients", "gradients", padding * MASTER_BYTES, ("update",))
    if num_passes > 1:
        # The last pass's own grads_in_partition, on top of that of the passes before until the pass ends; and the
        # zeros that stand for other chunks in the group handled last.
        own = _pass_elements(role, owned, chunk=0)
        zeros = [member for index, member in owned if index == len(groups) - 1 and role.chunk_of(member) != 0]
        yield StateLine("gradients of one pass", "gradients", own * MASTER_BYTES, ("backward",))
        size = sum(member.num_elements for member in zeros) * MASTER_BYTES
        yield StateLine("zeros for other chunks", "gradients", size, ("backward",))


def _pass_elements(role: Role, owned: Sequence[tuple[int, HeldParameter]], *, chunk: int) -> int:
    """Elements of grads_in_partition in a backward pass of a chunk: all the rank owns, or none if none is reached."""
    if all(role.chunk_of(member) != chunk for _, member in owned):
        return 0
    return sum(member.num_elements for _, member in owned)


def _owned(groups: Sequence[OptimizerGroup], at: Coordinates) -> Iterator[tuple[int, HeldParameter]]:
    """(number of the group, member) for all members that this rank's partitions meet."""
    for index, group in enumerate(groups):
        for member, is_in in zip(group.members, group.is_in_partition(_partition(group, at)), strict=True):
            if is_in:
                yield index, member


def _partition(group: OptimizerGroup, at: Coordinates) -> int:
    return at.expert_data if group.is_expert else at.data


def _owned_gradients(groups: Sequence[OptimizerGroup], at: Coordinates) -> Iterator[StateLine]:
    """Stage 1 in fp32: averaged_gradients are views of grads_in_partition, which has room for every parameter that a
    partition meets, whole; padding is made of its own."""
    owned = sum(member.num_elements for _, member in _owned(groups, at))
    padding = sum(group.padding_in_partition(_partition(group, at)) for group in groups)
    yield StateLine("owned gradients", "gradients", owned * MASTER_BYTES, ("update",))
    yield StateLine("padding of gradients", "gradients", padding * MASTER_BYTES, ("update",))


def _compact_gradients(groups: Sequence[OptimizerGroup], alive: tuple[Moment, ...]) -> Iterator[StateLine]:
    """16-bit precisions: the fp32 sums of exactly the partitions, which become the masters' gradients as they are."""
    owned = sum(group.partition_elements for group in groups)
    yield StateLine("owned gradients", "gradients", owned * MASTER_BYTES, alive)


def num_micro_batches(config: Config, world_size: int) -> int:
    """Of one optimizer step of full batch size, on each data-parallel rank."""
    data = Grid.from_config(config.parallel, world_size).data
    return config.run.global_batch_size // (config.run.micro_batch_size * data)


def _kept_buffers(config: Config, role: Role) -> Iterator[StateLine]:
    """What the model keeps from its first forward pass on."""
    always: tuple[Moment, ...] = ("rest", "backward", "update")
    model, parallel, sizes = config.model, config.parallel, dimensions(config.model, config.moe)
    if parallel.sequence_parallel:
        # Megatron-core's global memory buffer, where the sequence is gathered before a column-cut product
        gathered = model.seq_length * config.run.micro_batch_size * sizes.hidden * ELEMENT_BYTES[config.run.precision]
        yield StateLine("gathered sequence", "buffers", gathered, always)
    yield StateLine("received activations", "buffers", _received_bytes(config, role), always)
    if model.position_embedding == "sinusoidal" and role.chunks[0].has_embedding:
        yield StateLine("positions", "buffers", model.seq_length * sizes.hidden * 4, always)
    if model.position_embedding == "rope":
        angles = (sizes.head_dim // 2 + model.seq_length * sizes.head_dim) * 4
        yield StateLine("positions", "buffers", angles * len(role.chunks), always)
    if config.moe.balance_bias_update_rate > 0.0:
        # megamoe.moe.balance_bias: fp32 biases and int64 loads
        yield StateLine("balance biases", "buffers", sum(role.moe_experts) * 12, always)
    # megamoe.moe.statistics: fp64 demand, drops by choice, three sums
    counted = sum(num_experts + config.moe.top_k + 3 for num_experts in role.moe_experts)
    yield StateLine("load statistics", "buffers", counted * 8, always)


def boundary_bytes(config: Config) -> int:
    """What one pipeline stage sends another for a micro-batch: [s, b, h], or a tensor rank's slice of s."""
    rows = config.model.seq_length * config.run.micro_batch_size
    if config.parallel.sequence_parallel:
        rows //= config.parallel.tensor_parallel_size
    return rows * config.model.hidden_size * ELEMENT_BYTES[config.run.precision]


def _received_bytes(config: Config, role: Role) -> int:
    """The last input of every chunk but the model's first, to which Megatron-core's decoder holds on (`input_tensor`),
    and its gradient."""
    num_chunks = sum(not chunk.has_embedding for chunk in role.chunks)
    return num_chunks * boundary_bytes(config) * 2


def fresh_gradient_bytes(config: Config, role: Role) -> int:
    """One parameter's gradient of one micro-batch, at its largest, before it is added to those of the passes before.

    In 16-bit precisions a copy widened to fp32 stands beside it while it is added.
    """
    largest = max(held.num_elements for held in role.parameters)
    element = ELEMENT_BYTES[config.run.precision]
    return largest * (element if config.run.precision == "fp32" else element + MASTER_BYTES)

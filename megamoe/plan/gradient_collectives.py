"""Collectives that turn gradients of ranks into an update: ZeRO's, the finalizer's, those of balance biases. No torch.

DeepSpeed 0.19.8 gathers gradients in a bucket and, when the next one does not fit, all-reduces what is in it over the
group of each parameter, in fp32 (`stage_1_and_2.py`: reduce_independent_p_g_buckets_and_remove_grads, average_tensor).
A gradient larger than the bucket goes alone, in runs of whole partitions that end once they exceed the bucket.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

from megamoe.config.schema import Config, OptimizerConfig
from megamoe.plan.optimizer_groups import OptimizerGroup, optimizer_groups
from megamoe.plan.quantities import Collective, Family, Phase
from megamoe.plan.roles import HeldParameter, Role, trained_part
from megamoe.plan.states import ELEMENT_BYTES, MASTER_BYTES, MAX_STAGE_0_BUCKET_ELEMENTS
from megamoe.topology.grid import Coordinates, Grid
from megamoe.topology.parameters import is_output_tied
from megamoe.topology.reductions import is_summed_over_tensor
from megamoe.topology.updates import reduce_bucket_elements

Member = tuple[OptimizerGroup, int]  # a parameter: its group, its number there


def update_collectives(config: Config, grid: Grid, role: Role, at: Coordinates) -> Iterator[Collective]:
    """Those of `ScheduleEngine.apply_gradients` and of `BalanceBias.update`."""
    role = trained_part(role, config.finetune)
    groups = optimizer_groups(role, config.optimizer, grid)
    zero_stage = config.parallel.zero_stage
    if zero_stage == 0:
        yield from _whole_reductions(role)
    elif zero_stage == 1:
        yield from _reductions_at_once(role, config.optimizer, grid, reduce_bucket_elements(role.num_elements))
    yield from _finalizer(config, grid, role, groups, at)
    if zero_stage > 0:
        for group in groups:
            size = group.partition_elements * ELEMENT_BYTES[config.run.precision]
            yield Collective("all_gather", _family(group.is_expert), "updated weights", "update", size, 1)
    moves_biases = config.moe.balance_bias_update_rate > 0.0 and "routers" not in config.finetune.freeze
    if moves_biases and role.moe_experts:
        for family in ("tensor", "data"):
            yield Collective("all_reduce", family, "balance biases", "update", 8 * sum(role.moe_experts), 1)


def zero_2_collectives(config: Config, grid: Grid, role: Role, num_micro_batches: int) -> Iterator[Collective]:
    """Stage 2 reduces in every backward pass, of one chunk each, gradients as they appear: last layers first.

    Within a layer the order is not exactly known: where a pass fills more than one bucket, the bytes of all calls
    together are exact, those of each call are not.
    """
    role = trained_part(role, config.finetune)
    bucket = reduce_bucket_elements(role.num_elements)
    for each in _pass_reductions(role, config.optimizer, grid, bucket):
        yield replace(each, count=each.count * num_micro_batches)


@lru_cache(maxsize=1024)  # a search asks for the same few again and again
def _reductions_at_once(
    role: Role, optimizer: OptimizerConfig, grid: Grid, bucket: int
) -> tuple[Collective, ...]:
    """Stage 1: all gradients of a step, group after group."""
    groups = optimizer_groups(role, optimizer, grid)
    members = [(group, number) for group in groups for number in range(len(group.members))]
    return _counted(_bucket_reductions(members, bucket, "update"))


@lru_cache(maxsize=1024)
def _pass_reductions(role: Role, optimizer: OptimizerConfig, grid: Grid, bucket: int) -> tuple[Collective, ...]:
    """Stage 2: one backward pass of each chunk."""
    groups = optimizer_groups(role, optimizer, grid)
    place = {id(held): place for place, held in enumerate(role.parameters)}
    found: list[Collective] = []
    for chunk in range(len(role.chunks)):
        members = [
            (group, number)
            for group in groups
            for number, held in enumerate(group.members)
            if role.chunk_of(held) == chunk
        ]
        members.sort(key=lambda member: -place[id(member[0].members[member[1]])])
        found += _bucket_reductions(members, bucket, "backward")
    return _counted(found)


def _counted(calls: Iterable[Collective]) -> tuple[Collective, ...]:
    """Equal ones together."""
    return tuple(replace(call, count=count) for call, count in Counter(calls).items())


def _family(is_expert: bool) -> Family:
    return "expert_data" if is_expert else "data"


def _reduction(is_expert: bool, num_elements: int, phase: Phase) -> Collective:
    purpose = "expert gradients" if is_expert else "dense gradients"
    return Collective("all_reduce", _family(is_expert), purpose, phase, num_elements * MASTER_BYTES, 1)


def _whole_reductions(role: Role) -> Iterator[Collective]:
    """Stage 0: gradients in the model's order, flattened together until they exceed a bucket."""
    for is_expert in (False, True):
        filled = 0
        for held in role.parameters:
            if held.is_expert is is_expert:
                filled += held.num_elements
                if filled > MAX_STAGE_0_BUCKET_ELEMENTS:
                    yield _reduction(is_expert, filled, "update")
                    filled = 0
        if filled:
            yield _reduction(is_expert, filled, "update")


def _bucket_reductions(members: Sequence[Member], bucket: int, phase: Phase) -> Iterator[Collective]:
    filled: list[Member] = []
    num_elements = 0
    for group, number in members:
        size = group.members[number].num_elements
        if filled and num_elements + size > bucket:
            yield from _flush(filled, bucket, phase)
            filled, num_elements = [], 0
        filled.append((group, number))
        num_elements += size
    yield from _flush(filled, bucket, phase)


def _flush(filled: Sequence[Member], bucket: int, phase: Phase) -> Iterator[Collective]:
    for is_expert in (False, True):
        run = 0
        for group, number in filled:
            if group.is_expert is not is_expert:
                continue
            for piece in _pieces(group, number):
                run += piece
                if run > bucket:
                    yield _reduction(is_expert, run, phase)
                    run = 0
        if run:
            yield _reduction(is_expert, run, phase)


def _pieces(group: OptimizerGroup, number: int) -> Iterator[int]:
    """Elements of a parameter in each partition that it meets."""
    begin = group.offsets[number]
    end, size = begin + group.members[number].num_elements, group.partition_elements
    for partition in range(begin // size, (end - 1) // size + 1):
        yield min(end, (partition + 1) * size) - max(begin, partition * size)


def _finalizer(
    config: Config, grid: Grid, role: Role, groups: Sequence[OptimizerGroup], at: Coordinates
) -> Iterator[Collective]:
    """megamoe.training.gradients: sums over the tensor group, the tied embedding, the norm, loss and wishes to stop."""
    summed = sum(_summed_elements(config, group, at) for group in groups)
    if summed:
        yield Collective("all_reduce", "tensor", "gradients in parts", "update", summed * MASTER_BYTES, 1)
    embedding = next((held for held in role.parameters if held.parameter.kind == "embedding"), None)
    if is_output_tied(config.model) and grid.pipeline > 1 and embedding is not None:
        size = embedding.num_elements * MASTER_BYTES
        yield Collective("all_reduce", "tied_embedding", "tied embedding", "update", size, 1)
    yield Collective("all_reduce", "world", "norm, loss and stop", "update", 40, 1)  # five fp64 numbers


def _summed_elements(config: Config, group: OptimizerGroup, at: Coordinates) -> int:
    """Elements that this rank owns of gradients that tensor ranks computed in parts."""

    def is_summed(held: HeldParameter) -> bool:
        return is_summed_over_tensor(held.parameter, config.parallel)

    if config.parallel.zero_stage == 0:
        return sum(held.num_elements for held in group.members if is_summed(held))
    begin = group.partition_elements * (at.expert_data if group.is_expert else at.data)
    end = begin + group.partition_elements
    return sum(
        max(0, min(end, offset + held.num_elements) - max(begin, offset))
        for offset, held in zip(group.offsets, group.members, strict=True)
        if is_summed(held)
    )

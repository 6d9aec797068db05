"""Bytes of a role at its fullest moment: what the engines keep, what is saved, what passes through. No torch."""

from dataclasses import dataclass, replace
from typing import Literal

from megamoe.config.schema import Config
from megamoe.plan.activations import activation_bytes, working_bytes
from megamoe.plan.quantities import Load, RoleBytes
from megamoe.plan.roles import Role
from megamoe.plan.states import States, fresh_gradient_bytes, fullest_states, num_micro_batches

FullestMoment = Literal["backward", "reduction"]


@dataclass(frozen=True)
class RoleMemory:
    """The fullest moment of a step, and what is alive then."""

    moment: FullestMoment
    num_bytes: RoleBytes


def role_memory(config: Config, world_size: int, role: Role, load: Load, *, overhead_bytes: int) -> RoleMemory:
    """Of the rank that holds most; `overhead_bytes` are those of context and libraries. Raises TopologyError or
    ConfigError where the layout does not fit the ranks.

    Two moments can be the fullest: a backward pass, with gradients of all micro-batches before and the activations of
    those in flight; and, at ZeRO stage 1, the reduction after the last one, when a rank's own gradients are copied out
    of the whole ones.
    """
    held = fullest_states(config, world_size, role.pipeline_rank)
    saved = activation_bytes(config, world_size, role.pipeline_rank, load=load)
    passing = working_bytes(config, world_size, role.pipeline_rank, load=load) + fresh_gradient_bytes(config, role)
    kept = _at_backward(held, overhead_bytes)
    found = [RoleMemory("backward", _while_saved(config, world_size, role, kept, saved, passing))]
    if config.parallel.zero_stage == 1:
        copied = replace(kept, gradients=kept.gradients + held.of("owned gradients"))
        found.append(RoleMemory("reduction", copied))
    return max(found, key=lambda each: each.num_bytes.total)


def _at_backward(held: States, overhead_bytes: int) -> RoleBytes:
    """Without what is saved."""
    return RoleBytes(
        weights=held.at("backward", "weights"),
        gradients=held.at("backward", "gradients"),
        optimizer=held.at("backward", "optimizer"),
        buffers=held.at("backward", "buffers"),
        activations=0,
        working=0,
        overhead=overhead_bytes,
    )


def _while_saved(
    config: Config, world_size: int, role: Role, kept: RoleBytes, saved: int, passing: int
) -> RoleBytes:
    """With activations: the most there are, unless no gradient is there yet.

    That is so, but at ZeRO stage 2, which makes room for all of them at the first, where every micro-batch of the step
    is in flight before the first backward pass: until its end one micro-batch's activations go as gradients come, and
    the larger of the two is what counts.
    """
    count = num_micro_batches(config, world_size)
    is_first_pass_fullest = count <= config.parallel.pipeline_parallel_size - role.pipeline_rank
    if config.parallel.zero_stage == 2 or len(role.chunks) > 1 or not is_first_pass_fullest:
        return replace(kept, activations=saved, working=passing)
    of_one = saved // count
    if of_one > kept.gradients:
        return replace(kept, gradients=0, activations=saved, working=passing)
    return replace(kept, activations=saved - of_one, working=passing)

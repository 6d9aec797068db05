"""Are copies still equal? Weights over data-parallel and expert-data-parallel ranks, both copies of a tied embedding,
the step and the configuration on all ranks: compared by fingerprints, a few bytes a tensor.

A fingerprint is the sum of a tensor's bit patterns, each times an odd number that depends on its place, modulo 2**64.
Of two tensors that differ in one element, or in one bit, it always differs.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.checkpoint.manifest import config_hash
from megamoe.errors import TrainingStopped
from megamoe.model.naming import LocalParameter
from megamoe.topology.parameters import is_output_tied
from megamoe.training.agreement import extremes, first_message
from megamoe.training.hooks import BaseHook
from megamoe.training.step import StepResult

if TYPE_CHECKING:
    from megamoe.training.build import Trainer

_CHUNK_ELEMENTS = 1 << 20
_INTEGERS = {2: torch.int16, 4: torch.int32}
_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)  # 2**64 over the golden ratio, odd, as int64


class ReplicaCheck(BaseHook):
    """Compares the copies every `interval_steps` steps and once at the start; a difference stops the run."""

    def __init__(self, interval_steps: int) -> None:
        self.interval_steps = interval_steps

    def on_start(self, trainer: "Trainer") -> None:
        check_replicas(trainer)

    def after_step(self, trainer: "Trainer", result: StepResult) -> None:
        if trainer.step % self.interval_steps == 0:
            check_replicas(trainer)


def check_replicas(trainer: "Trainer") -> None:
    """Raises TrainingStopped, the same on all ranks, naming a rank and a tensor, where copies differ. Collective."""
    in_run, in_weights = _difference_in_run(trainer), _difference_in_weights(trainer)
    message = in_run or in_weights  # every rank has been through every comparison: none waits for another
    found = first_message(
        message and f"after step {trainer.step} {message}", groups=trainer.groups, device=trainer.schedule.device
    )
    if found is not None:
        raise TrainingStopped(
            f"{found[1]}: memory or a link is faulty, or ranks run different code; resume from a checkpoint of before"
        )


def _difference_in_run(trainer: "Trainer") -> str | None:
    """Step and configuration, over all ranks."""
    digest = int(config_hash(trainer.config.model_dump(mode="json"))[:15], 16)  # 60 bits: a whole number of the device
    values = torch.tensor([trainer.step, trainer.samples, digest], dtype=torch.int64, device=trainer.schedule.device)
    smallest, largest = extremes(values, trainer.groups.world)
    if torch.equal(smallest, largest):
        return None
    names = ("the step", "the number of samples", "the configuration")
    differing = names[int((smallest != largest).nonzero()[0])]
    is_mine = bool((values != smallest).any())
    # Who holds the larger value speaks; that some rank does is what the comparison found.
    return f"{differing} is not the same on all ranks (it differs on rank {dist.get_rank()})" if is_mine else None


def _difference_in_weights(trainer: "Trainer") -> str | None:
    groups = trainer.groups
    dense = [local for local in trainer.parameters if local.parameter.kind != "expert" and not local.tied_copy]
    experts = [local for local in trainer.parameters if local.parameter.kind == "expert"]
    copies = [local for local in trainer.parameters if local.tied_copy]
    tied = [local for local in trainer.parameters if local.tied_copy or local.parameter.kind == "embedding"]
    found = [
        _compare(dense, groups.data),
        _compare(experts, groups.expert_data),
        _compare(copies, groups.data),
    ]
    if groups.tied_embedding is not None and is_output_tied(trainer.config.model):
        found.append(_compare(tied, groups.tied_embedding))
    return next((message for message in found if message is not None), None)


def _compare(parameters: Sequence[LocalParameter], group: dist.ProcessGroup) -> str | None:
    """What differs over a group whose ranks hold copies of the same parameters. Collective over the group."""
    if dist.get_world_size(group) == 1 or not parameters:
        return None
    prints = torch.stack([fingerprint(local.tensor.detach()) for local in parameters])
    smallest, largest = extremes(prints, group)
    if torch.equal(smallest, largest):
        return None
    everyone = [torch.empty_like(prints) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, prints, group=group)
    number = int((smallest != largest).nonzero()[0])
    return _blame(parameters[number].parameter.name, [int(each[number]) for each in everyone], group)


def _blame(name: str, prints: Sequence[int], group: dist.ProcessGroup) -> str:
    """Names the ranks whose copy is not that of the most; where there is no majority, all of them."""
    ranks = dist.get_process_group_ranks(group)
    usual = max(set(prints), key=prints.count)
    if prints.count(usual) * 2 > len(prints):
        odd = [rank for rank, value in zip(ranks, prints, strict=True) if value != usual]
        return f"{name} differs on rank {', '.join(map(str, odd))} from its copies on the other ranks of {ranks}"
    return f"the copies of {name} on ranks {', '.join(map(str, ranks))} differ"


def fingerprint(values: Tensor) -> Tensor:
    """A whole number (int64, on the tensor's device) that tells tensors of one shape apart."""
    bits = values.reshape(-1).view(_INTEGERS[values.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for first in range(0, bits.numel(), _CHUNK_ELEMENTS):
        chunk = bits[first : first + _CHUNK_ELEMENTS].long()
        places = torch.arange(first, first + chunk.numel(), dtype=torch.int64, device=values.device)
        total += (chunk * (places * _MULTIPLIER * 2 + 1)).sum()
    return total

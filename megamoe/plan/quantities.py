"""The words in which plans speak, and in which reality is measured: bytes of a rank, collectives of a step.

A role is what pipeline ranks that hold the same things have in common: its ranks need the same memory and send the
same messages.
"""

from dataclasses import dataclass, fields
from typing import Literal

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send", "receive"]
Family = Literal[
    "world",
    "tensor",
    "data",
    "pipeline",
    "model",
    "expert",
    "expert_local",
    "expert_across",
    "expert_data",
    "expert_tensor",
    "tied_embedding",
]
Phase = Literal["forward", "recompute", "backward", "update"]


@dataclass(frozen=True)
class Collective:
    """Calls of one kind and size that one rank makes in one optimizer step.

    `num_bytes` is what this rank puts in, in one call: of an all-gather its own part, of a reduce-scatter the whole, of
    an all-to-all the rows it sends, its own to itself included; of a receive what comes in.
    """

    kind: Kind
    group: Family
    purpose: str  # "dense gradients", "dispatch", …
    phase: Phase
    num_bytes: int
    count: int

    @property
    def total_bytes(self) -> int:
        return self.num_bytes * self.count


@dataclass(frozen=True)
class Load:
    """How unevenly tokens are assumed to fall: rows that arrive on the fullest expert rank, over the mean of all."""

    max_over_mean: float = 1.0


@dataclass(frozen=True)
class RoleBytes:
    """Bytes that one rank of a role holds at its fullest moment, by what they are for.

    The first four are exact; `activations` are those of all micro-batches in flight.
    """

    weights: int  # as the forward pass reads them
    gradients: int
    optimizer: int  # fp32 masters and moments of this rank's partitions, padding included
    buffers: int  # reduce buckets and whatever else the engines keep from step to step
    activations: int  # saved for the backward pass
    working: int  # alive at once inside one layer's forward or backward pass, or in the loss
    overhead: int  # of the accelerator's context, libraries and fragmentation: an assumption of the cluster file

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

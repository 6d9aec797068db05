"""The process groups a model is built over. Made once, at start-up, and handed down; nobody looks them up."""

from dataclasses import dataclass

import torch.distributed as dist

from megamoe.topology.grid import Coordinates, Grid


@dataclass(frozen=True)
class ParallelGroups:
    """Where this rank stands, and the process group of every family it belongs to.

    `tied_embedding` holds the data-parallel ranks of the first and last stage with this rank's tensor coordinate,
    on those stages when the pipeline has more than one; elsewhere it is None. `expert_local` and `expert_across` are
    the two levels of a hierarchical all-to-all: the members of this rank's expert group on its own node, and those with
    its number on every node. Both are None where all-to-all is flat.
    """

    grid: Grid
    coordinates: Coordinates
    world: dist.ProcessGroup
    tensor: dist.ProcessGroup
    data: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    model: dist.ProcessGroup  # tensor x pipeline
    context: dist.ProcessGroup  # always this rank alone: Megatron-core wants one
    expert: dist.ProcessGroup
    expert_data: dist.ProcessGroup
    expert_tensor: dist.ProcessGroup
    tied_embedding: dist.ProcessGroup | None
    expert_local: dist.ProcessGroup | None = None
    expert_across: dist.ProcessGroup | None = None

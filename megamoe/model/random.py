"""Random states for dropout: the default generator and Megatron's tracker for tensor-parallel regions."""

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.random import initialize_rng_tracker

from megamoe.model.parallel import ParallelGroups
from megamoe.moe.routers import JITTER_STATE
from megamoe.topology.initial import seed_of

TENSOR_PARALLEL_STATE = "model-parallel-rng"  # the name Megatron's layers fork


def seed_generators(seed: int, groups: ParallelGroups, *, router_jitter: bool = False) -> None:
    """Seed this rank for dropout and, where it is asked for, for the jitter of router inputs.

    Outside tensor-parallel regions the ranks of a tensor group must draw alike; inside them each draws its own. Data
    ranks and pipeline stages always differ. Routers draw apart where tensor ranks route slices, alike where copies.
    """
    _seed_all(seed, groups, "", router_jitter=router_jitter)


def reseed_generators(seed: int, groups: ParallelGroups, *, step: int) -> None:
    """As `seed_generators` did, with streams of their own for a run that goes on at `step` under another layout."""
    has_jitter = JITTER_STATE in get_cuda_rng_tracker().get_states()
    _seed_all(seed, groups, f"/step_{step}", router_jitter=has_jitter)


def _seed_all(seed: int, groups: ParallelGroups, ending: str, *, router_jitter: bool) -> None:
    at = groups.coordinates
    shared = seed_of(seed, f"dropout/{at.data}/{at.pipeline}{ending}")
    own = seed_of(seed, f"dropout/{at.data}/{at.pipeline}/{at.tensor}{ending}")
    torch.manual_seed(shared)
    if torch.cuda.is_available():
        torch.cuda.manual_seed(shared)
    initialize_rng_tracker(force_reset=True)
    tracker = get_cuda_rng_tracker()
    tracker.reset()
    tracker.add(TENSOR_PARALLEL_STATE, own)
    if router_jitter:
        slice_number = at.tensor if groups.grid.expert_tensor == 1 else 0
        tracker.add(JITTER_STATE, seed_of(seed, f"router_jitter/{at.data}/{at.pipeline}/{slice_number}{ending}"))


def random_state() -> dict[str, torch.Tensor]:
    """Every state a resumed run needs to draw as if it had not stopped; uint8 tensors by name."""
    states = {"default": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    for name, state in get_cuda_rng_tracker().get_states().items():
        states[f"tracker.{name}"] = state
    return states


def restore_random_state(states: dict[str, torch.Tensor]) -> None:
    """Undo what happened since `random_state` was taken."""
    torch.set_rng_state(states["default"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    prefix = "tracker."
    get_cuda_rng_tracker().set_states({n[len(prefix) :]: s for n, s in states.items() if n.startswith(prefix)})

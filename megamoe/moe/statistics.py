"""How evenly the experts of each layer are loaded, counted on the device and read only when someone asks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megamoe.moe.routing import Routing, count_experts


@dataclass(frozen=True)
class LayerLoad:
    """What one rank counted for one layer since the last reset."""

    demand: Tensor  # [E] fp64: choices that fell on each expert, dropped ones too
    dropped: Tensor  # scalar fp64: assignments that found their expert full
    balance_loss: Tensor  # scalar fp64: sum over micro-batches
    num_micro_batches: int


class LoadStatistics:
    """Accumulates loads per layer; one instance is shared by the MoE layers of a rank.

    No value is read back here, so counting never waits for the device.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self._loads: dict[int, LayerLoad] = {}

    @torch.no_grad()
    def record(self, layer: int, routing: Routing, loss: Tensor) -> None:
        """Add one micro-batch of 0-based `layer`."""
        demand = count_experts(routing.expert_index, self.num_experts).double()
        dropped = routing.kept.numel() - routing.kept.sum(dtype=torch.float64)
        before = self._loads.get(layer)
        if before is not None:
            demand += before.demand
            dropped += before.dropped
        total = loss.detach().double() + (before.balance_loss if before is not None else 0.0)
        self._loads[layer] = LayerLoad(demand, dropped, total, (before.num_micro_batches if before else 0) + 1)

    def take(self) -> dict[int, LayerLoad]:
        """The loads since the last call, by layer; counting starts anew."""
        loads, self._loads = self._loads, {}
        return loads

    def restore(self, loads: dict[int, LayerLoad]) -> None:
        """Go on from loads that `take` returned: what was counted in between is forgotten."""
        self._loads = dict(loads)

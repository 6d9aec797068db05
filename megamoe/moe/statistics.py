"""How evenly the experts of each layer are loaded, counted on the device and read only when someone asks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megamoe.moe.routing import Routing, count_experts

SUMS = ("balance_loss", "z_loss", "logit_square")  # what is summed over micro-batches


@dataclass(frozen=True)
class LayerLoad:
    """What one rank counted for one layer since the last reset."""

    demand: Tensor  # [E] fp64: choices that fell on each expert, dropped ones too
    dropped_by_choice: Tensor  # [k] fp64: first, second, … choices that found their expert full
    sums: Tensor  # [3] fp64, in the order of SUMS
    num_micro_batches: int

    @property
    def dropped(self) -> Tensor:
        return self.dropped_by_choice.sum()

    @property
    def balance_loss(self) -> Tensor:
        return self.sums[0]


class LoadStatistics:
    """Accumulates loads per layer; one instance is shared by the MoE layers of a rank.

    No value is read back here, so counting never waits for the device.
    """

    def __init__(self) -> None:
        self._loads: dict[int, LayerLoad] = {}

    @torch.no_grad()
    def record(
        self,
        layer: int,
        routing: Routing,
        loss: Tensor,
        *,
        z_loss: Tensor | None = None,
        logits: Tensor | None = None,
    ) -> None:
        """Add one micro-batch of 0-based `layer`: its routing, its losses, its router logits [S, E]."""
        demand = count_experts(routing.expert_index, len(routing.tokens_per_expert)).double()
        dropped = routing.kept.shape[0] - routing.kept.sum(dim=0, dtype=torch.float64)
        nothing = torch.zeros((), dtype=torch.float64, device=demand.device)
        square = nothing if logits is None else logits.norm().double().square() / max(1, logits.numel())
        sums = torch.stack([loss.double(), nothing if z_loss is None else z_loss.double(), square])
        count = 1
        before = self._loads.get(layer)
        if before is not None:
            demand, dropped, sums = demand + before.demand, dropped + before.dropped_by_choice, sums + before.sums
            count += before.num_micro_batches
        self._loads[layer] = LayerLoad(demand, dropped, sums, count)

    def take(self) -> dict[int, LayerLoad]:
        """The loads since the last call, by layer; counting starts anew."""
        loads, self._loads = self._loads, {}
        return loads

    def restore(self, loads: dict[int, LayerLoad]) -> None:
        """Go on from loads that `take` returned: what was counted in between is forgotten."""
        self._loads = dict(loads)

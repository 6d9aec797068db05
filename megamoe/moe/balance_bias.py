"""Balancing without a loss: a bias on each expert's selection score, moved against its load after every step.

Wang et al. (2024), "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", algorithm 1; DeepSeek-V3.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.moe.routing import count_experts


class BalanceBias:
    """The biases of a rank's MoE layers and the loads they answer to; one instance is shared by the layers.

    Neither parameters nor module buffers: no gradient, no optimizer, no cast to the model's precision. Every rank of
    a pipeline stage holds the same values.
    """

    def __init__(self, update_rate: float, device: torch.device | str, *, is_frozen: bool = False) -> None:
        """`is_frozen`: the biases take part in the selection and stay as they are."""
        self.update_rate, self.device, self.is_frozen = update_rate, device, is_frozen
        self.by_layer: dict[int, Tensor] = {}  # 0-based layer -> [E] fp32
        self._loads: dict[int, Tensor] = {}

    @property
    def is_on(self) -> bool:
        return self.update_rate > 0.0

    def add_layer(self, layer: int, num_experts: int) -> None:
        """Called by each MoE layer when it is made; its bias starts at zero."""
        if self.is_on:
            self.by_layer[layer] = torch.zeros(num_experts, device=self.device)
            self._loads[layer] = torch.zeros(num_experts, dtype=torch.int64, device=self.device)

    def of(self, layer: int) -> Tensor | None:
        """[E], or None where balancing by bias is off."""
        return self.by_layer.get(layer)

    def record(self, layer: int, expert_index: Tensor) -> None:
        """Count the choices [S, k] of one micro-batch, dropped ones too."""
        if self.is_on:
            self._loads[layer] += count_experts(expert_index, len(self._loads[layer]))

    @torch.no_grad()
    def update(self, groups: Iterable[dist.ProcessGroup], *, was_applied: bool) -> None:
        """End an optimizer step: b += rate * sign(mean load - load), loads summed over `groups` one after the other.

        A step whose update was skipped leaves the biases alone, too. Collective over the groups, which together must
        span all ranks that route tokens through these layers: data parallel and tensor parallel. (Where tensor ranks
        route copies of the same tokens the sum is a multiple, and its sign the same.)
        """
        if not self.by_layer:
            return
        layers = sorted(self.by_layer)
        loads = torch.cat([self._loads[layer] for layer in layers])
        for layer in layers:
            self._loads[layer].zero_()
        if not was_applied or self.is_frozen:
            return
        for group in groups:
            dist.all_reduce(loads, group=group)
        sizes = [len(self.by_layer[layer]) for layer in layers]
        for layer, load in zip(layers, loads.split(sizes), strict=True):
            # Sign of the mean minus the load in whole numbers: a load exactly at the mean must not move by rounding.
            self.by_layer[layer] += self.update_rate * (load.sum() - load * len(load)).sign()

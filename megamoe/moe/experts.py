"""The experts of one rank: stacked weights, products over unequal numbers of rows, no padding.

n local experts   h hidden   f ffn (a slice of it under expert tensor parallelism)   R rows, sorted by expert
"""

import torch
from torch import Tensor, nn

from megamoe.moe.activations import ACTIVATIONS
from megamoe.moe.ffn import ExpertWeights, expert_by_expert_ffn
from megamoe.moe.grouped_ffn import grouped_ffn, has_grouped_product


class StackedExperts(nn.Module):
    """n feed-forward networks of one shape, each with its own weights.

    `fc1.weight` is [n, f, h], or [n, 2, f, h] for gated activations (index 0 the gate, 1 the linear half);
    `fc2.weight` is [n, h, f]; biases [n, f] (or [n, 2, f]) and [n, h]. Values are left to be filled in: initial
    weights are drawn by global name, elsewhere.
    """

    def __init__(
        self,
        *,
        num_local_experts: int,
        hidden_size: int,
        ffn_hidden_size: int,
        activation: str,
        use_bias: bool,
        adds_fc2_bias: bool,
        recompute_activation: bool,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.num_local_experts = num_local_experts
        self.activation = ACTIVATIONS[activation]
        # Under expert tensor parallelism the ranks' partial results are summed: one of them adds the bias.
        self.adds_fc2_bias = adds_fc2_bias
        self.recompute_activation = recompute_activation
        halves = (2,) if self.activation.is_gated else ()
        self.fc1 = _Stack((num_local_experts, *halves, ffn_hidden_size), hidden_size, use_bias, dtype, device)
        self.fc2 = _Stack((num_local_experts, hidden_size), ffn_hidden_size, use_bias, dtype, device)

    def cut(self, num_chunks: int) -> list[ExpertWeights]:
        """The weights in equal groups of neighbouring experts: views, whose gradients meet in one concatenation.

        A slice for each call would instead cost a zero-filled gradient of all experts a time. One group is the
        parameters themselves, to whose gradients `expert_by_expert_ffn` adds in place.
        """
        bias2 = self.fc2.bias
        if bias2 is not None and not self.adds_fc2_bias:
            bias2 = bias2 * 0.0  # stays in the graph, so that every rank has a gradient to reduce
        whole = ExpertWeights(self.fc1.weight, self.fc1.bias, self.fc2.weight, bias2)
        if num_chunks == 1:
            return [whole]
        size = self.num_local_experts // num_chunks
        parts = [[None] * num_chunks if tensor is None else tensor.split(size) for tensor in whole]
        return [ExpertWeights(*part) for part in zip(*parts, strict=True)]

    def forward(self, buffer: Tensor, rows_per_expert: list[int], weights: ExpertWeights | None = None) -> Tensor:
        """Apply expert i to its rows_per_expert[i] rows of `buffer` [R, h], which are sorted by expert: [R, h].

        `weights` are those of one chunk of experts, from `cut`; None: all.
        """
        weights = self.cut(1)[0] if weights is None else weights
        ffn = grouped_ffn if has_grouped_product(buffer) else expert_by_expert_ffn
        return ffn(buffer, weights, rows_per_expert, self.activation, recompute_activation=self.recompute_activation)


class _Stack(nn.Module):
    """Weights [*lead, in] and biases [*lead] of n linear maps."""

    def __init__(
        self, lead: tuple[int, ...], in_size: int, use_bias: bool, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty((*lead, in_size), dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(lead, dtype=dtype, device=device)) if use_bias else None

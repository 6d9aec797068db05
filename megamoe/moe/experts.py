"""The experts of one rank: stacked weights, batched matrix products over unequal numbers of rows.

    n local experts   h hidden   f ffn (a slice of it under expert tensor parallelism)   R rows   C rows of the fullest
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


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
        activation: Callable[[Tensor], Tensor],
        gated: bool,
        use_bias: bool,
        adds_fc2_bias: bool,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.num_local_experts = num_local_experts
        self.activation = activation
        self.gated = gated
        # Under expert tensor parallelism the ranks' partial results are summed: one of them adds the bias.
        self.adds_fc2_bias = adds_fc2_bias
        halves = (2,) if gated else ()
        self.fc1 = _Stack((num_local_experts, *halves, ffn_hidden_size), hidden_size, use_bias, dtype, device)
        self.fc2 = _Stack((num_local_experts, hidden_size), ffn_hidden_size, use_bias, dtype, device)

    def forward(self, buffer: Tensor, rows_per_expert: list[int]) -> Tensor:
        """Apply expert i to its rows_per_expert[i] rows of `buffer` [R, h], which are sorted by expert: [R, h]."""
        num_experts, num_rows = len(rows_per_expert), buffer.shape[0]
        most = max(1, *rows_per_expert)
        if num_experts * most <= 2 * num_rows + num_experts:
            return self._batched(buffer, rows_per_expert, most)
        return self._one_by_one(buffer, rows_per_expert)

    def _batched(self, buffer: Tensor, rows_per_expert: list[int], most: int) -> Tensor:
        """One product over all experts, each padded to the fullest: right where the load is near even."""
        num_experts, hidden = len(rows_per_expert), buffer.shape[1]
        even = min(rows_per_expert) == most
        if even:
            return self._ffn(buffer.view(num_experts, most, hidden)).reshape(-1, hidden)
        counts = torch.tensor(rows_per_expert)
        shift = torch.arange(num_experts) * most - (counts.cumsum(0) - counts)  # rows before an expert: padded - packed
        slot = torch.arange(buffer.shape[0]) + shift.repeat_interleave(counts)
        slot = slot.to(buffer.device, non_blocking=True)
        padded = buffer.new_zeros((num_experts * most, hidden)).index_copy(0, slot, buffer)
        y = self._ffn(padded.view(num_experts, most, hidden))
        return y.reshape(-1, hidden).index_select(0, slot)

    def _one_by_one(self, buffer: Tensor, rows_per_expert: list[int]) -> Tensor:
        """A product per expert that has rows: bounded memory however uneven the load."""
        stacks = [None if p is None else p.unbind(0) for p in (*self.fc1.tensors(), *self.fc2.tensors())]
        pieces = []
        for expert, rows in enumerate(buffer.split(rows_per_expert)):
            if rows.shape[0]:
                own = [None if stack is None else stack[expert].unsqueeze(0) for stack in stacks]
                pieces.append(self._ffn(rows.unsqueeze(0), own).squeeze(0))
        if not pieces:
            return self._ffn(buffer.view(len(rows_per_expert), 0, buffer.shape[1])).reshape(0, buffer.shape[1])
        return torch.cat(pieces)

    def _ffn(self, x: Tensor, weights: list[Tensor | None] | None = None) -> Tensor:
        """x [n, C, h] -> [n, C, h]; `weights` are fc1 weight, bias, fc2 weight, bias (None: all experts')."""
        weight1, bias1, weight2, bias2 = weights or (*self.fc1.tensors(), *self.fc2.tensors())
        hidden = _linear(x, weight1.flatten(1, -2), None if bias1 is None else bias1.flatten(1))
        if self.gated:
            gate, linear = hidden.chunk(2, dim=-1)
            hidden = self.activation(gate) * linear
        else:
            hidden = self.activation(hidden)
        if bias2 is not None and not self.adds_fc2_bias:
            bias2 = bias2 * 0.0  # stays in the graph, so that every rank has a gradient to reduce
        return _linear(hidden, weight2, bias2)


class _Stack(nn.Module):
    """Weights [*lead, in] and biases [*lead] of n linear maps."""

    def __init__(
        self, lead: tuple[int, ...], in_size: int, use_bias: bool, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty((*lead, in_size), dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(lead, dtype=dtype, device=device)) if use_bias else None

    def tensors(self) -> tuple[Tensor, Tensor | None]:
        return self.weight, self.bias


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [n, C, in] @ weight [n, out, in]^T + bias [n, out]: [n, C, out]."""
    if bias is None:
        return torch.bmm(x, weight.transpose(1, 2))
    return torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))

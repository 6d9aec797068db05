"""The experts of one rank: stacked weights, products over unequal numbers of rows, no padding.

    n local experts   h hidden   f ffn (a slice of it under expert tensor parallelism)   R rows, sorted by expert
    a [R, f] (gated: [R, 2 f], gates first) before the activation, g [R, f] after it
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from megamoe.moe.activations import ACTIVATIONS, Activation

ExpertWeights = tuple[Tensor, Tensor | None, Tensor, Tensor | None]  # as `expert_by_expert_ffn` takes them


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
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.num_local_experts = num_local_experts
        self.activation = ACTIVATIONS[activation]
        # Under expert tensor parallelism the ranks' partial results are summed: one of them adds the bias.
        self.adds_fc2_bias = adds_fc2_bias
        halves = (2,) if self.activation.is_gated else ()
        self.fc1 = _Stack((num_local_experts, *halves, ffn_hidden_size), hidden_size, use_bias, dtype, device)
        self.fc2 = _Stack((num_local_experts, hidden_size), ffn_hidden_size, use_bias, dtype, device)

    def cut(self, num_chunks: int) -> list[ExpertWeights]:
        """The weights in equal groups of neighbouring experts: views, whose gradients meet in one concatenation.

        A slice for each call would instead cost a zero-filled gradient of all experts a time.
        """
        weight1, bias1 = self.fc1.weight.flatten(1, -2), self.fc1.bias
        weight2, bias2 = self.fc2.weight, self.fc2.bias
        if bias1 is not None:
            bias1 = bias1.flatten(1)
        if bias2 is not None and not self.adds_fc2_bias:
            bias2 = bias2 * 0.0  # stays in the graph, so that every rank has a gradient to reduce
        whole = (weight1, bias1, weight2, bias2)
        if num_chunks == 1:
            return [whole]
        size = self.num_local_experts // num_chunks
        parts = [[None] * num_chunks if tensor is None else tensor.split(size) for tensor in whole]
        return list(zip(*parts, strict=True))

    def forward(self, buffer: Tensor, rows_per_expert: list[int], weights: ExpertWeights | None = None) -> Tensor:
        """Apply expert i to its rows_per_expert[i] rows of `buffer` [R, h], which are sorted by expert: [R, h].

        `weights` are those of one chunk of experts, from `cut`; None: all.
        """
        weight1, bias1, weight2, bias2 = self.cut(1)[0] if weights is None else weights
        ffn = grouped_ffn if buffer.is_cuda else expert_by_expert_ffn
        return ffn(buffer, weight1, bias1, weight2, bias2, rows_per_expert, self.activation)


class _Stack(nn.Module):
    """Weights [*lead, in] and biases [*lead] of n linear maps."""

    def __init__(
        self, lead: tuple[int, ...], in_size: int, use_bias: bool, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty((*lead, in_size), dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(lead, dtype=dtype, device=device)) if use_bias else None


def grouped_ffn(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    rows_per_expert: list[int],
    activation: Activation,
) -> Tensor:
    """One grouped product per matrix, torch's kernel: for GPUs, where a launch per expert would be felt.

    Shapes as in `expert_by_expert_ffn`.
    """
    counts = torch.tensor(rows_per_expert, device=x.device)
    ends = counts.cumsum(0).to(torch.int32)

    def linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = torch._grouped_mm(rows, weight.transpose(1, 2), offs=ends)
        return out if bias is None else out + bias.repeat_interleave(counts, dim=0, output_size=rows.shape[0])

    return linear(activation.forward(linear(x, weight1, bias1)), weight2, bias2)


def expert_by_expert_ffn(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    rows_per_expert: list[int],
    activation: Activation,
) -> Tensor:
    """The FFN of each expert on its own rows, written in place into shared outputs and gradients.

    x is [R, h], weight1 [n, f, h] (gated [n, 2 f, h]), bias1 [n, f] or [n, 2 f], weight2 [n, h, f], bias2 [n, h]; the
    result is [R, h]. On a CPU this is as fast as one batched product of even load at 8 experts, faster at 64 and 512,
    and does not care how uneven the load is: nothing is padded to the fullest expert, and each weight gradient is
    written once, where it belongs (docs/benchmarks.md).
    """
    return _ExpertByExpert.apply(x, weight1, bias1, weight2, bias2, rows_per_expert, activation)


class _ExpertByExpert(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight1: Tensor,
        bias1: Tensor | None,
        weight2: Tensor,
        bias2: Tensor | None,
        rows_per_expert: list[int],
        activation: Activation,
    ) -> Tensor:
        segments = _segments(rows_per_expert)
        before = _linear(x, weight1, bias1, segments)
        after = activation.forward(before)
        ctx.save_for_backward(x, weight1, weight2, before, after)
        ctx.has_bias, ctx.segments, ctx.activation = (bias1 is not None, bias2 is not None), segments, activation
        return _linear(after, weight2, bias2, segments)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight1, weight2, before, after = ctx.saved_tensors
        grad_y = grad_y.contiguous()
        grad_after, grad_weight2, grad_bias2 = _linear_gradients(
            grad_y, after, weight2, ctx.segments, with_bias=ctx.has_bias[1]
        )
        grad_before = ctx.activation.backward(grad_after, before)
        grad_x, grad_weight1, grad_bias1 = _linear_gradients(
            grad_before, x, weight1, ctx.segments, with_bias=ctx.has_bias[0]
        )
        return grad_x, grad_weight1, grad_bias1, grad_weight2, grad_bias2, None, None


Segment = tuple[int, int, int]  # expert, first row, row after the last


def _segments(rows_per_expert: list[int]) -> list[Segment]:
    """The rows of each expert that has any."""
    segments, start = [], 0
    for expert, count in enumerate(rows_per_expert):
        if count:
            segments.append((expert, start, start + count))
            start += count
    return segments


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, segments: list[Segment]) -> Tensor:
    """x [R, in] times each expert's weight [n, out, in], plus bias [n, out]: [R, out]."""
    out = x.new_empty((x.shape[0], weight.shape[1]))
    for expert, first, last in segments:
        own_bias = None if bias is None else bias[expert]
        _product(x[first:last], weight[expert].t(), out[first:last], own_bias)
    return out


def _linear_gradients(
    grad_out: Tensor, x: Tensor, weight: Tensor, segments: list[Segment], *, with_bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of `_linear` with respect to x [R, in], weight and bias; zero for experts without rows."""
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    grad_bias = weight.new_empty(weight.shape[:2]) if with_bias else None
    if len(segments) < weight.shape[0]:
        idle = torch.ones(weight.shape[0], dtype=torch.bool)
        idle[[expert for expert, _, _ in segments]] = False
        grad_weight[idle] = 0.0
        if grad_bias is not None:
            grad_bias[idle] = 0.0
    for expert, first, last in segments:
        rows = grad_out[first:last]
        _product(rows.t(), x[first:last], grad_weight[expert])
        _product(rows, weight[expert], grad_x[first:last])
        if grad_bias is not None:
            torch.sum(rows, 0, out=grad_bias[expert])
    return grad_x, grad_weight, grad_bias


def _product(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """Write a @ b (+ bias, a row) into `out`."""
    if _is_slow_on_cpu(a.dtype):
        product = torch.mm(a.float(), b.float())
        out.copy_(product if bias is None else product.add_(bias))
    elif bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)


@cache
def _is_slow_on_cpu(dtype: torch.dtype) -> bool:
    """True for 16-bit types this processor has no instructions for: widening one expert's operands is far faster."""
    if dtype is torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype is torch.float16:
        return not torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return False

"""The experts' FFN by grouped products, one for each matrix, on GPUs that have them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megamoe.moe.activations import Activation
from megamoe.moe.ffn import ExpertWeights


def has_grouped_product(x: Tensor) -> bool:
    """Whether torch has its grouped product and documents it for rows like `x`: bf16, compute capability 8 or more."""
    if not hasattr(F, "grouped_mm") or not x.is_cuda or x.dtype is not torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(x.device) >= (8, 0)


def grouped_ffn(
    x: Tensor, weights: ExpertWeights, rows_per_expert: list[int], activation: Activation, *, recompute_activation: bool
) -> Tensor:
    """One grouped product per matrix, torch's kernel: for GPUs, where a launch per expert would be felt.

    Shapes as in `megamoe.moe.ffn`. With `recompute_activation` x and a are kept for the backward pass and g is made
    again there; without it g is kept, too.
    """
    weight1, bias1, weight2, bias2 = weights
    counts = torch.tensor(rows_per_expert)
    if x.is_cuda:  # from pinned memory the host need not wait
        counts = counts.pin_memory().to(x.device, non_blocking=True)
    ends = counts.cumsum(0).to(torch.int32)
    a = _add_bias(F.grouped_mm(x, weight1.flatten(1, -2).transpose(1, 2), offs=ends), bias1, counts)
    if recompute_activation:
        y = _ActivationAndProduct.apply(a, weight2, ends, activation)
    else:
        y = F.grouped_mm(activation.forward(a), weight2.transpose(1, 2), offs=ends)
    return _add_bias(y, bias2, counts)


def _add_bias(rows: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
    return rows if bias is None else _AddBias.apply(rows, bias.flatten(1), counts)


class _AddBias(torch.autograd.Function):
    """rows [R, m] + the bias [n, m] of each row's expert. Its gradient sums segments in order: no race, no rounding
    that differs from run to run, as a scatter-add on a GPU has."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, bias: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(counts)
        return rows + bias.repeat_interleave(counts, dim=0, output_size=rows.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (counts,) = ctx.saved_tensors
        return grad, torch.segment_reduce(grad.contiguous(), "sum", lengths=counts, axis=0, unsafe=True), None


class _ActivationAndProduct(torch.autograd.Function):
    """a -> g @ weight2, keeping a alone: the activation is done again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, weight2: Tensor, ends: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(a, weight2, ends)
        ctx.activation = activation
        return F.grouped_mm(activation.forward(a), weight2.transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None, None]:
        a, weight2, ends = ctx.saved_tensors
        grad_y = grad_y.contiguous()
        grad_weight2 = F.grouped_mm(grad_y.t(), ctx.activation.forward(a), offs=ends)
        grad_a = torch.empty_like(a)
        ctx.activation.backward_into(F.grouped_mm(grad_y, weight2, offs=ends), a, grad_a)
        return grad_a, grad_weight2, None, None

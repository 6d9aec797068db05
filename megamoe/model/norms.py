"""LayerNorm and RMSNorm for Megatron's specs: plain torch, and fit for sequence parallelism.

Megatron's own torch norm refuses sequence parallelism; the gradients of norms on sequence slices are summed over the
tensor group by the training step, which knows them from the parameter table.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class Norm(nn.Module):
    """LayerNorm (weight and bias) or RMSNorm (weight) over the last dimension, as `config.normalization` says."""

    def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        is_layernorm = config.normalization == "LayerNorm"
        self.bias = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype)) if is_layernorm else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class HeadNorm(nn.Module):
    """RMSNorm of queries or keys over each head (Qwen3): weight [hd], shared by the heads. x is [s, b, heads, hd]."""

    def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class _SumOverRanks(torch.autograd.Function):
    """All-reduce forward and backward: each rank's sum feeds every rank's output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class FullNorm(nn.Module):
    """RMSNorm of queries or keys over all heads together (OLMoE): weight [heads * hd], cut with the heads.

    x is [s, b, local heads, hd]; the mean square is taken over the tensor group's heads.
    """

    def __init__(
        self, config: Any, hidden_size: int, eps: float, *, num_heads: int, group: dist.ProcessGroup | None, size: int
    ) -> None:
        super().__init__()
        self.eps, self.group, self.num_features = eps, group, num_heads * hidden_size
        self.weight = nn.Parameter(torch.empty(num_heads // size * hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(-2).float()
        square_sum = flat.square().sum(dim=-1, keepdim=True)
        if self.group is not None:
            square_sum = _SumOverRanks.apply(square_sum, self.group)
        normal = flat * torch.rsqrt(square_sum / self.num_features + self.eps)
        return (normal.to(x.dtype) * self.weight).view_as(x)

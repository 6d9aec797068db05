"""Activations of feed-forward networks, with their gradients written out for the experts' own backward pass."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_gelu_backward = torch.ops.aten.gelu_backward
_silu_backward = torch.ops.aten.silu_backward


@dataclass(frozen=True)
class Activation:
    """forward: a -> g; backward: (gradient of g, a) -> gradient of a. Gated: a is [.., 2 f], the gates first."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    is_gated: bool


def _swiglu(a: Tensor) -> Tensor:
    """silu(gate) * linear (Shazeer, 2020)."""
    gate, linear = a.chunk(2, dim=-1)
    return F.silu(gate) * linear


def _swiglu_backward(grad: Tensor, a: Tensor) -> Tensor:
    gate, linear = a.chunk(2, dim=-1)
    return torch.cat((_silu_backward(grad * linear, gate), grad * F.silu(gate)), dim=-1)


ACTIVATIONS = {
    "gelu": Activation(F.gelu, _gelu_backward, is_gated=False),
    "gelu_tanh": Activation(
        lambda a: F.gelu(a, approximate="tanh"),
        lambda grad, a: _gelu_backward(grad, a, approximate="tanh"),
        is_gated=False,
    ),
    "swiglu": Activation(_swiglu, _swiglu_backward, is_gated=True),
}

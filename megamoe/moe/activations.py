"""Activations of feed-forward networks, with their gradients, written into memory the caller owns.

    a before the activation, [.., f] (gated: [.., 2 f], the gates first)   g after it, [.., f]
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """forward: a -> g. forward_into(a, out): the same into `out`. backward_into(gradient of g, a, out): gradient of a.

    The arguments of the last two must not share memory.
    """

    forward: Callable[[Tensor], Tensor]
    forward_into: Callable[[Tensor, Tensor], None]
    backward_into: Callable[[Tensor, Tensor, Tensor], None]
    is_gated: bool


def _gelu_into(approximate: str) -> tuple[Callable[[Tensor, Tensor], None], Callable[[Tensor, Tensor, Tensor], None]]:
    def forward(a: Tensor, out: Tensor) -> None:
        torch.ops.aten.gelu.out(a, approximate=approximate, out=out)

    def backward(grad: Tensor, a: Tensor, out: Tensor) -> None:
        torch.ops.aten.gelu_backward.grad_input(grad, a, approximate=approximate, grad_input=out)

    return forward, backward


def _swiglu(a: Tensor) -> Tensor:
    """silu(gate) * linear (Shazeer, 2020)."""
    gate, linear = a.chunk(2, dim=-1)
    return F.silu(gate) * linear


def _swiglu_into(a: Tensor, out: Tensor) -> None:
    gate, linear = a.chunk(2, dim=-1)
    torch.ops.aten.silu.out(gate, out=out)
    out.mul_(linear)


def _swiglu_backward_into(grad: Tensor, a: Tensor, out: Tensor) -> None:
    gate, linear = a.chunk(2, dim=-1)
    grad_gate, grad_linear = out.chunk(2, dim=-1)
    torch.mul(grad, linear, out=grad_linear)  # borrowed: the gradient of silu(gate)
    torch.ops.aten.silu_backward.grad_input(grad_linear, gate, grad_input=grad_gate)
    torch.ops.aten.silu.out(gate, out=grad_linear)
    grad_linear.mul_(grad)


ACTIVATIONS = {
    "gelu": Activation(F.gelu, *_gelu_into("none"), is_gated=False),
    "gelu_tanh": Activation(lambda a: F.gelu(a, approximate="tanh"), *_gelu_into("tanh"), is_gated=False),
    "swiglu": Activation(_swiglu, _swiglu_into, _swiglu_backward_into, is_gated=True),
}

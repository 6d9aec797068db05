"""Where a backward pass of ours writes the gradient of a large weight: over several micro-batches, in place."""

import torch
from torch import Tensor


def gradient_memory(weight: Tensor) -> tuple[Tensor, bool]:
    """Where the gradient of `weight` is written, and whether it is added to what is there.

    In every micro-batch but the first of a step a parameter has a gradient, and autograd would add ours to it: hundreds
    of MiB written, read and read again. Instead its gradient is taken away, added to, and given back as if it were
    new: autograd puts it in its place without a copy, and every hook on the parameter runs as ever.
    """
    if weight.is_leaf and weight.requires_grad and weight.grad is not None and _is_accumulated(weight):
        grad = weight.grad
        if grad.dtype is weight.dtype and grad.is_contiguous():
            weight.grad = None
            return grad, True
    return torch.empty_like(weight, memory_format=torch.contiguous_format), False


def _is_accumulated(weight: Tensor) -> bool:
    """Whether the running backward pass adds the gradient of the leaf `weight` to its `.grad`: torch.autograd.grad and
    backward(inputs=...) may not."""
    will_execute = getattr(torch._C, "_will_engine_execute_node", None)
    if will_execute is None:
        return False
    try:
        return will_execute(torch.autograd.graph.get_gradient_edge(weight).node)
    except RuntimeError:  # torch's answer for a leaf under torch.autograd.grad
        return False

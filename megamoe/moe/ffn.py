"""The feed-forward networks of many experts on unequal numbers of rows: one way for GPUs, one for CPUs.

    n experts   R rows, sorted by expert   h hidden   f ffn   x [R, h]   y [R, h]
    weight1 [n, f, h] (gated [n, 2 f, h])   bias1 [n, f] or [n, 2 f]   weight2 [n, h, f]   bias2 [n, h]
    a [R, f] (gated [R, 2 f]) before the activation, g [R, f] after it

Both keep x and a for the backward pass and can make g again there. On CPUs that is always done, since one pass over
rows in the cache is no slower than writing g to memory and reading it back; on GPUs it is a setting.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megamoe.moe.activations import Activation
from megamoe.moe.workers import share_out

# ---------------------------------------------------------------- GPUs


def grouped_ffn(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    rows_per_expert: list[int],
    activation: Activation,
    *,
    recompute_activation: bool,
) -> Tensor:
    """One grouped product per matrix, torch's kernel: for GPUs, where a launch per expert would be felt."""
    counts = torch.tensor(rows_per_expert)
    if x.is_cuda:  # from pinned memory the host need not wait
        counts = counts.pin_memory().to(x.device, non_blocking=True)
    ends = counts.cumsum(0).to(torch.int32)
    a = _add_bias(torch._grouped_mm(x, weight1.flatten(1, -2).transpose(1, 2), offs=ends), bias1, counts)
    if recompute_activation:
        y = _ActivationAndProduct.apply(a, weight2, ends, activation)
    else:
        y = torch._grouped_mm(activation.forward(a), weight2.transpose(1, 2), offs=ends)
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
        return torch._grouped_mm(activation.forward(a), weight2.transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None, None]:
        a, weight2, ends = ctx.saved_tensors
        grad_y = grad_y.contiguous()
        grad_weight2 = torch._grouped_mm(grad_y.t(), ctx.activation.forward(a), offs=ends)
        grad_a = torch.empty_like(a)
        ctx.activation.backward_into(torch._grouped_mm(grad_y, weight2, offs=ends), a, grad_a)
        return grad_a, grad_weight2, None, None


# ---------------------------------------------------------------- CPUs

# Elements of g that pass through the activation in one call: enough to keep the threads busy, few enough to stay in
# the cache between the two products.
_BLOCK_ELEMENTS = 1 << 17
# Elements of g from which all threads work on one block: its products are large enough for that, and blocks side by
# side would not fit in the cache together.
_LARGE_BLOCK_ELEMENTS = 1 << 20


def expert_by_expert_ffn(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    rows_per_expert: list[int],
    activation: Activation,
) -> Tensor:
    """Expert after expert, its two products with the activation between them, on rows that are still in the cache.

    Gated weights may have their halves in a dimension of their own, [n, 2, f, h] and [n, 2, f]. On a CPU this is as
    fast as one batched product of even load at 8 experts, faster at 64 and 512, and does not care how uneven the load
    is (docs/benchmarks.md): nothing is padded to the fullest expert, results are written where they belong, and the
    gradient of a weight that has one already is added to it in place (`_gradient_memory`).
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
        matrices1, matrices2 = weight1.flatten(1, -2), weight2
        a, y = x.new_empty((x.shape[0], matrices1.shape[1])), torch.empty_like(x)
        xs, as_, ys = (rows.split(rows_per_expert) for rows in (x, a, y))
        weights1, weights2 = matrices1.transpose(1, 2).unbind(), matrices2.transpose(1, 2).unbind()
        biases1, biases2 = _per_expert(bias1, len(xs)), _per_expert(bias2, len(xs))
        blocks = _blocks(rows_per_expert, matrices2.shape[2])

        def work(own_blocks: Iterator[_Block]) -> None:
            g_memory = _scratch(blocks, matrices2.shape[2], x)
            for experts, rows, counts in own_blocks:
                _products(xs[experts], weights1[experts], as_[experts], biases1[experts])
                g = g_memory[: sum(counts)]
                activation.forward_into(a[rows].to(g.dtype), g)
                _products(g.split(counts), weights2[experts], ys[experts], biases2[experts])

        share_out(blocks, work, num_threads=_num_threads(blocks, matrices2.shape[2]))
        ctx.save_for_backward(x, a, weight1, weight2)
        ctx.parameters = weight1, weight2  # saved tensors may come back as other objects, without `.grad`
        ctx.bias_shapes = tuple(None if bias is None else bias.shape for bias in (bias1, bias2))
        ctx.rows_per_expert, ctx.blocks, ctx.activation = rows_per_expert, blocks, activation
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, a, weight1, weight2 = ctx.saved_tensors
        matrices1, matrices2, activation, blocks = weight1.flatten(1, -2), weight2, ctx.activation, ctx.blocks
        grad_x, grad_y = torch.empty_like(x), grad_y.contiguous()
        (grad_weight1, adds1), (grad_weight2, adds2) = map(_gradient_memory, ctx.parameters)
        grad_bias1, grad_bias2 = (None if shape is None else x.new_zeros(shape) for shape in ctx.bias_shapes)
        xs, grad_xs, grad_ys = (rows.split(ctx.rows_per_expert) for rows in (x, grad_x, grad_y))
        weights1, weights2 = matrices1.unbind(), matrices2.unbind()
        grads1, grads2 = grad_weight1.flatten(1, -2).unbind(), grad_weight2.unbind()
        bias_grads1, bias_grads2 = _per_expert(grad_bias1, len(xs)), _per_expert(grad_bias2, len(xs))

        def work(own_blocks: Iterator[_Block]) -> None:
            widths = (matrices2.shape[2], matrices2.shape[2], a.shape[1])
            memory = [_scratch(blocks, width, x) for width in widths]
            for experts, rows, counts in own_blocks:
                g, grad_g, grad_a = (scratch[: sum(counts)] for scratch in memory)
                own_a, grad_gs, grad_as = a[rows].to(g.dtype), grad_g.split(counts), grad_a.split(counts)
                activation.forward_into(own_a, g)
                _weight_gradients(grad_ys[experts], g.split(counts), grads2[experts], bias_grads2[experts], adds=adds2)
                _products(grad_ys[experts], weights2[experts], grad_gs)
                activation.backward_into(grad_g, own_a, grad_a)
                _weight_gradients(grad_as, xs[experts], grads1[experts], bias_grads1[experts], adds=adds1)
                _products(grad_as, weights1[experts], grad_xs[experts])

        share_out(blocks, work, num_threads=_num_threads(blocks, matrices2.shape[2]))
        return grad_x, grad_weight1, grad_bias1, grad_weight2, grad_bias2, None, None


class _Block(NamedTuple):
    """Neighbouring experts whose rows pass through the activation together."""

    experts: slice
    rows: slice
    counts: list[int]  # rows of each of the experts

    @property
    def num_rows(self) -> int:
        return self.rows.stop - self.rows.start


def _blocks(rows_per_expert: list[int], ffn: int) -> list[_Block]:
    """All experts, those without rows too, in blocks of about `_BLOCK_ELEMENTS` activations; the largest first."""
    blocks, first, first_row, row = [], 0, 0, 0
    for expert, count in enumerate(rows_per_expert):
        row += count
        if (row - first_row) * ffn >= _BLOCK_ELEMENTS or expert == len(rows_per_expert) - 1:
            experts = slice(first, expert + 1)
            blocks.append(_Block(experts, slice(first_row, row), rows_per_expert[experts]))
            first, first_row = expert + 1, row
    return sorted(blocks, key=lambda block: -block.num_rows)


def _num_threads(blocks: list[_Block], ffn: int) -> int:
    """Threads that blocks are shared out to: all of torch's, or 1 (then all of them work on each product) where one
    block is large, or would keep the rest waiting. Measured by tools/benchmarks/moe_layer.py, docs/benchmarks.md."""
    num_threads = torch.get_num_threads()
    largest, total = blocks[0].num_rows, sum(block.num_rows for block in blocks)
    is_shared = largest * ffn < _LARGE_BLOCK_ELEMENTS and 2 * num_threads * largest <= total
    return num_threads if is_shared else 1


def _scratch(blocks: list[_Block], width: int, x: Tensor) -> Tensor:
    """Memory for `width` values of each row of any block."""
    return x.new_empty((blocks[0].num_rows, width), dtype=_compute_dtype(x.dtype))


def _per_expert(stacked: Tensor | None, num_experts: int) -> tuple[Tensor | None, ...]:
    return (None,) * num_experts if stacked is None else stacked.flatten(1).unbind()


def _products(
    inputs: Sequence[Tensor],
    matrices: Sequence[Tensor],
    outputs: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
) -> None:
    """Write input @ matrix (+ bias, a row) of each expert into its output."""
    for x, matrix, out, bias in zip(inputs, matrices, outputs, biases or (None,) * len(inputs), strict=True):
        if x.shape[0]:
            _product(x, matrix, out, bias)


def _weight_gradients(
    grad_outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    grad_matrices: Sequence[Tensor],
    grad_biases: Sequence[Tensor | None],
    *,
    adds: bool,
) -> None:
    """Write (`adds`: add) grad_output.T @ input of each expert, and its sum over rows into the bias's, which is 0."""
    for grad, x, grad_matrix, grad_bias in zip(grad_outputs, inputs, grad_matrices, grad_biases, strict=True):
        if not grad.shape[0]:
            if not adds:
                grad_matrix.zero_()
            continue
        if adds:  # not beta=1 of the product: the sum must have the bits that autograd's own addition gives
            product = torch.empty_like(grad_matrix)
            _product(grad.t(), x, product)
            grad_matrix.add_(product)
        else:
            _product(grad.t(), x, grad_matrix)
        if grad_bias is not None:
            grad_bias.copy_(grad.sum(0))


def _gradient_memory(weight: Tensor) -> tuple[Tensor, bool]:
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


def _product(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """Write a @ b (+ bias, a row) into `out`."""
    wide = _compute_dtype(out.dtype)
    if not a.dtype is b.dtype is out.dtype is wide:
        product = torch.mm(a.to(wide), b.to(wide))
        out.copy_(product if bias is None else product.add_(bias))
    elif bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)


@cache
def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What products of `dtype` are computed in: fp32 for 16-bit types that this processor has no instructions for, as
    widening one expert's operands is far faster there."""
    if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    if dtype is torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return torch.float32
    return dtype

"""The feed-forward networks of many experts on unequal numbers of rows, expert by expert: for CPUs, and for GPUs that
have no grouped product.

    n experts   R rows, sorted by expert   h hidden   f ffn   x [R, h]   y [R, h]
    a [R, f] (gated [R, 2 f]) before the activation, g [R, f] after it

x and a are kept for the backward pass, and g, which takes as much as a (gated: half), unless it is to be made again.
Without a backward pass neither a nor g is ever whole: a block's are written over the last block's, in the cache.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megamoe.moe.activations import Activation
from megamoe.moe.gradient_memory import gradient_memory
from megamoe.moe.precision import compute_dtype
from megamoe.moe.workers import share_out


class ExpertWeights(NamedTuple):
    """The two linear maps of n experts. Gated ones have the gates' half (0) and the linear half (1) of the first in a
    dimension of their own."""

    weight1: Tensor  # [n, f, h] or [n, 2, f, h]
    bias1: Tensor | None  # [n, f] or [n, 2, f]
    weight2: Tensor  # [n, h, f]
    bias2: Tensor | None  # [n, h]


# Elements of g that pass through the activation in one call: enough to keep the threads busy, few enough to stay in
# the cache between the two products.
_BLOCK_ELEMENTS = 1 << 17
# Elements of g from which all threads work on one block: its products are large enough for that, and blocks side by
# side would not fit in the cache together.
_LARGE_BLOCK_ELEMENTS = 1 << 20
# Elements of all blocks below which handing them out costs more than it gains, unless experts are small on average:
# for some milliseconds the processors still belong to threads that wait for more of what was done before.
_FEW_ELEMENTS = 1 << 22
_SMALL_EXPERT_ELEMENTS = 1 << 16


def expert_by_expert_ffn(
    x: Tensor,
    weights: ExpertWeights,
    rows_per_expert: list[int],
    activation: Activation,
    *,
    recompute_activation: bool,
) -> Tensor:
    """Expert after expert, its two products with the activation between them, on rows that are still in the cache.

    With `recompute_activation` the backward pass makes g again, from a; so it does where 16-bit operands are widened,
    as a kept g would be rounded. Results are the same to the bit.

    Nothing is padded to the fullest expert, results are written where they belong, and the gradient of a weight that
    has one already is added to it in place (`gradient_memory`). Times against products alone: docs/benchmarks.md.
    """
    if not torch.is_grad_enabled():
        return _forward(x, weights, _blocks(rows_per_expert, weights.weight2.shape[2]), rows_per_expert, activation)
    keeps_g = not recompute_activation and compute_dtype(x) is x.dtype
    return _ExpertByExpert.apply(x, *weights, rows_per_expert, activation, keeps_g)


def _forward(
    x: Tensor,
    weights: ExpertWeights,
    blocks: list["_Block"],
    rows_per_expert: list[int],
    activation: Activation,
    kept_a: Tensor | None = None,
    kept_g: Tensor | None = None,
) -> Tensor:
    """y, and a and g of all rows in the last two where they are given."""
    matrices1, matrices2 = weights.weight1.flatten(1, -2), weights.weight2
    y = torch.empty_like(x)
    xs, ys = x.split(rows_per_expert), y.split(rows_per_expert)
    weights1, weights2 = matrices1.transpose(1, 2).unbind(), matrices2.transpose(1, 2).unbind()
    biases1, biases2 = _per_expert(weights.bias1, len(xs)), _per_expert(weights.bias2, len(xs))

    def work(own_blocks: Iterator[_Block]) -> None:
        scratch_a = _Scratch(x, matrices1.shape[1], dtype=x.dtype)
        scratch_g = _Scratch(x, matrices2.shape[2])
        for experts, rows, counts in own_blocks:
            a = scratch_a.for_rows(sum(counts))[0] if kept_a is None else kept_a[rows]
            g = scratch_g.for_rows(sum(counts))[0] if kept_g is None else kept_g[rows]
            _products(xs[experts], weights1[experts], a.split(counts), biases1[experts])
            activation.forward_into(a.to(g.dtype), g)
            _products(g.split(counts), weights2[experts], ys[experts], biases2[experts])

    _do(blocks, work, matrices2)
    return y


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
        keeps_g: bool,
    ) -> Tensor:
        weights, blocks = ExpertWeights(weight1, bias1, weight2, bias2), _blocks(rows_per_expert, weight2.shape[2])
        a = x.new_empty((x.shape[0], weight1.flatten(1, -2).shape[1]))
        kept_g = x.new_empty((x.shape[0], weight2.shape[2])) if keeps_g else None
        y = _forward(x, weights, blocks, rows_per_expert, activation, a, kept_g)
        ctx.save_for_backward(x, a, weight1, weight2, kept_g)
        ctx.parameters = weight1, weight2  # saved tensors may come back as other objects, without `.grad`
        ctx.bias_shapes = tuple(None if bias is None else bias.shape for bias in (bias1, bias2))
        ctx.rows_per_expert, ctx.blocks, ctx.activation = rows_per_expert, blocks, activation
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, a, weight1, weight2, kept_g = ctx.saved_tensors
        matrices1, matrices2, activation, blocks = weight1.flatten(1, -2), weight2, ctx.activation, ctx.blocks
        grad_x, grad_y = torch.empty_like(x), grad_y.contiguous()
        (grad_weight1, adds1), (grad_weight2, adds2) = map(gradient_memory, ctx.parameters)
        grad_bias1, grad_bias2 = (None if shape is None else x.new_zeros(shape) for shape in ctx.bias_shapes)
        xs, grad_xs, grad_ys = (rows.split(ctx.rows_per_expert) for rows in (x, grad_x, grad_y))
        weights1, weights2 = matrices1.unbind(), matrices2.unbind()
        grads1, grads2 = grad_weight1.flatten(1, -2).unbind(), grad_weight2.unbind()
        bias_grads1, bias_grads2 = _per_expert(grad_bias1, len(xs)), _per_expert(grad_bias2, len(xs))

        def work(own_blocks: Iterator[_Block]) -> None:
            widths = (matrices2.shape[2], a.shape[1], matrices2.shape[2])  # of grad_g, grad_a and a g made again
            scratch = _Scratch(x, *(widths if kept_g is None else widths[:2]))
            for experts, rows, counts in own_blocks:
                grad_g, grad_a, *made_g = scratch.for_rows(sum(counts))
                own_a, grad_gs, grad_as = a[rows].to(grad_g.dtype), grad_g.split(counts), grad_a.split(counts)
                if kept_g is None:
                    (g,) = made_g
                    activation.forward_into(own_a, g)
                else:
                    g = kept_g[rows]
                _weight_gradients(grad_ys[experts], g.split(counts), grads2[experts], bias_grads2[experts], adds=adds2)
                _products(grad_ys[experts], weights2[experts], grad_gs)
                activation.backward_into(grad_g, own_a, grad_a)
                _weight_gradients(grad_as, xs[experts], grads1[experts], bias_grads1[experts], adds=adds1)
                _products(grad_as, weights1[experts], grad_xs[experts])

        _do(blocks, work, matrices2)
        return grad_x, grad_weight1, grad_bias1, grad_weight2, grad_bias2, None, None, None


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


def _do(blocks: list[_Block], work: Callable[[Iterator[_Block]], None], weight2: Tensor) -> None:
    """Have all blocks worked on: first, by all threads together, those that are large or would keep the other threads
    waiting; then the rest, one thread on each. Measured by tools/benchmarks/moe_layer.py, docs/benchmarks.md."""
    num_threads = torch.get_num_threads() if weight2.device.type == "cpu" else 1
    together, apart = _divided(blocks, weight2.shape[2], num_threads)
    share_out(together, work, num_threads=1)
    if apart:
        share_out(apart, work, num_threads=num_threads)


def _divided(blocks: list[_Block], ffn: int, num_threads: int) -> tuple[list[_Block], list[_Block]]:
    """Blocks, the largest first, that all threads work on together, and blocks that each thread takes whole."""
    if num_threads == 1:
        return blocks, []
    total = sum(block.num_rows for block in blocks)
    num_experts = sum(len(block.counts) for block in blocks)
    if num_experts * _SMALL_EXPERT_ELEMENTS <= total * ffn < _FEW_ELEMENTS:
        return blocks, []
    for number, block in enumerate(blocks):
        is_large = block.num_rows * ffn >= _LARGE_BLOCK_ELEMENTS
        if not is_large and 2 * num_threads * block.num_rows < total:
            return blocks[:number], blocks[number:]
        total -= block.num_rows
    return blocks, []


class _Scratch:
    """Memory for values of one block's rows, used again for the next, which has no more rows."""

    def __init__(self, x: Tensor, *widths: int, dtype: torch.dtype | None = None) -> None:
        self._x, self._widths, self._memory = x, widths, ()
        self._dtype = compute_dtype(x) if dtype is None else dtype

    def for_rows(self, num_rows: int) -> tuple[Tensor, ...]:
        """One tensor [num_rows, width] for each width."""
        if not self._memory:
            self._memory = tuple(self._x.new_empty((num_rows, width), dtype=self._dtype) for width in self._widths)
        return tuple(memory[:num_rows] for memory in self._memory)


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


def _product(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """Write a @ b (+ bias, a row) into `out`."""
    wide = compute_dtype(out)
    if not a.dtype is b.dtype is out.dtype is wide:
        product = torch.mm(a.to(wide), b.to(wide))
        out.copy_(product if bias is None else product.add_(bias))
    elif bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)

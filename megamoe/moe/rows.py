"""Rows of tokens: one for each kept assignment, and back to one for each token. Gathers only, forward and backward.

    S tokens   k choices   h hidden   T kept assignments

A scatter-add would be shorter, but on a GPU its sums depend on who comes first.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megamoe.moe.routing import Routing


@dataclass(frozen=True)
class Places:
    """Where assignments and rows meet. Rows are the T kept assignments in the order of `Routing.by_expert`."""

    num_tokens: int
    top_k: int
    assignment_of_row: Tensor  # [T] int64
    row_of_assignment: Tensor  # [k * S] int64, some row or other where dropped
    kept: Tensor | None  # [k * S] bool; None: all

    @classmethod
    def of(cls, routing: Routing, num_rows: int) -> "Places":
        """`num_rows` is T, which the routing itself knows on the device only."""
        num_tokens, top_k = routing.kept.shape
        by_expert = routing.by_expert
        row = torch.empty_like(by_expert)
        row[by_expert] = torch.arange(by_expert.numel(), device=by_expert.device)
        kept = None
        if num_rows < by_expert.numel():
            row.clamp_(max=max(0, num_rows - 1))
            kept = routing.kept.t().reshape(-1)
        return cls(num_tokens, top_k, by_expert[:num_rows], row, kept)

    @property
    def token_of_row(self) -> Tensor:
        return self.assignment_of_row % max(1, self.num_tokens)

    def sum_over_choices(self, rows: Tensor, weight: Tensor | None) -> Tensor:
        """[S, h]: for each token the sum of its rows [T, h], times weight [k * S] where given.

        A gather a choice, in the order of choices: the same sum every time, wherever the rows lie.
        """
        if rows.shape[0] == 0:
            return rows.new_zeros((self.num_tokens, rows.shape[1]))
        if weight is None and self.kept is not None:
            weight = self.kept
        total = None
        for choice in range(self.top_k):
            part = slice(choice * self.num_tokens, (choice + 1) * self.num_tokens)
            picked = rows.index_select(0, self.row_of_assignment[part])
            if weight is None:
                total = picked if total is None else total.add_(picked)
            else:
                factor = weight[part].to(rows.dtype).unsqueeze(1)
                total = picked.mul_(factor) if total is None else total.addcmul_(picked, factor)
        return total


class TakeRows(torch.autograd.Function):
    """x [S, h] -> rows [T, h], one for each kept assignment."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Places) -> Tensor:
        ctx.places = places
        return x.index_select(0, places.token_of_row)

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor, None]:
        return ctx.places.sum_over_choices(grad_rows, None), None


class WeighAndSum(torch.autograd.Function):
    """rows [T, h], gate [S, k] -> [S, h]: for each token the sum over choices of gate * row."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gate: Tensor, places: Places) -> Tensor:
        flat_gate = gate.t().reshape(-1)  # [k * S]; 0 where dropped
        ctx.save_for_backward(rows, flat_gate)
        ctx.places = places
        return places.sum_over_choices(rows, flat_gate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, flat_gate = ctx.saved_tensors
        places = ctx.places
        grad_of_row = grad.index_select(0, places.token_of_row)  # [T, h]
        grad_gate = torch.zeros_like(flat_gate)
        grad_gate[places.assignment_of_row] = (grad_of_row * rows).sum(dim=1, dtype=flat_gate.dtype)
        factor = flat_gate[places.assignment_of_row].to(rows.dtype).unsqueeze(1)
        return grad_of_row.mul_(factor), grad_gate.view(places.top_k, places.num_tokens).t(), None


@dataclass(frozen=True)
class Order:
    """A permutation of R rows: new place -> old place, and its inverse; both [R] int64."""

    old_of_new: Tensor
    new_of_old: Tensor

    @property
    def inverse(self) -> "Order":
        return Order(self.new_of_old, self.old_of_new)


class Permute(torch.autograd.Function):
    """rows[order.old_of_new]; the gradient is the inverse permutation."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Order) -> Tensor:
        ctx.save_for_backward(order.new_of_old)
        return rows.index_select(0, order.old_of_new)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (new_of_old,) = ctx.saved_tensors
        return grad.index_select(0, new_of_old), None


def blocks_swapped(counts: Tensor, num_rows: int) -> Order | None:
    """From rows sorted by (a, b) to rows sorted by (b, a), where block (a, b) has counts[a, b] rows, in all num_rows.

    counts is [A, B] int64 on the device, and the host need not know it. None: the two orders are the same.
    """
    if 1 in counts.shape:
        return None
    swapped = counts.t()
    start = (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts)
    new_start = (swapped.flatten().cumsum(0) - swapped.flatten()).view_as(swapped)
    move = new_start.t() - start  # by how much each block moves; within a block nothing changes
    row = torch.arange(num_rows, device=counts.device)
    # output_size is known, so that a GPU need not be asked.
    new_of_old = row + move.flatten().repeat_interleave(counts.flatten(), output_size=num_rows)
    old_of_new = row - move.t().flatten().repeat_interleave(swapped.flatten(), output_size=num_rows)
    return Order(old_of_new, new_of_old)

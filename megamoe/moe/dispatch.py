"""Carry tokens to their experts and back. Two phases; the first returns what the second needs.

    S tokens   k choices   h hidden   T kept assignments here   R rows that arrive for this rank's experts
    rows       [T, h]: one per kept assignment, sorted by expert (so by owning rank)
    buffer     [R, h]: what arrives, sorted by local expert, then by sending rank

Time and memory are O(S * k * h): nothing here has the shape tokens x experts or tokens x capacity.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.moe.collectives import all_to_all
from megamoe.moe.routing import Routing


@dataclass(frozen=True)
class DispatchMetadata:
    """How `dispatch` arranged the rows: all that `combine` needs to undo it."""

    group: dist.ProcessGroup | None
    places: "_Places"
    send_counts: list[int]  # rows for each rank of the expert group
    receive_counts: list[int]  # rows from each rank
    arrival_of_row: Tensor | None  # [R] place in arrival order of each buffer row; None: orders are the same
    row_of_arrival: Tensor | None  # [R] its inverse
    rows_per_expert: list[int]  # rows of each local expert in the buffer; sums to R


@dataclass(frozen=True)
class _Places:
    """Where assignments and rows meet. Rows are the T kept assignments in the order of `Routing.by_expert`."""

    num_tokens: int
    top_k: int
    assignment_of_row: Tensor  # [T] int64
    row_of_assignment: Tensor  # [k * S] int64, 0 where dropped
    kept: Tensor | None  # [k * S] bool; None: all

    @classmethod
    def of(cls, routing: Routing) -> "_Places":
        num_tokens, top_k = routing.kept.shape
        by_expert = routing.by_expert
        row = torch.zeros(num_tokens * top_k, dtype=torch.int64, device=by_expert.device)
        row[by_expert] = torch.arange(by_expert.numel(), device=by_expert.device)
        kept = None if by_expert.numel() == row.numel() else routing.kept.t().reshape(-1)
        return cls(num_tokens, top_k, by_expert, row, kept)

    @property
    def token_of_row(self) -> Tensor:
        return self.assignment_of_row % max(1, self.num_tokens)

    def sum_over_choices(self, rows: Tensor, weight: Tensor | None) -> Tensor:
        """[S, h]: for each token the sum of its rows [T, h], times weight [k * S] where given.

        A gather a choice: the same sum every time, where a scatter-add on a GPU would depend on who comes first.
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


class _TakeRows(torch.autograd.Function):
    """x [S, h] -> rows [T, h], one for each kept assignment."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: _Places) -> Tensor:
        ctx.places = places
        return x.index_select(0, places.token_of_row)

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor, None]:
        return ctx.places.sum_over_choices(grad_rows, None), None


class _WeighAndSum(torch.autograd.Function):
    """rows [T, h], gate [S, k] -> [S, h]: for each token the sum over choices of gate * row."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gate: Tensor, places: _Places) -> Tensor:
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


class _Permute(torch.autograd.Function):
    """x[order] for a permutation; the gradient is the inverse permutation instead of a scatter-add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def dispatch(x: Tensor, routing: Routing, group: dist.ProcessGroup | None) -> tuple[Tensor, DispatchMetadata]:
    """Send every kept assignment's token of `x` [S, h] to the rank of `group` that owns its expert.

    Expert e lives on rank e // (E / size of the group). Returns the buffer [R, h] for this rank's experts and the
    metadata for `combine`. Collective over `group` (None: a group of one), also for a rank without tokens.
    """
    places = _Places.of(routing)
    rows = _TakeRows.apply(x, places)
    if group is None:
        counts = routing.tokens_per_expert.tolist()
        return rows, DispatchMetadata(None, places, [rows.shape[0]], [rows.shape[0]], None, None, counts)

    arriving = torch.empty_like(routing.tokens_per_expert)  # [ranks * local experts], by sending rank
    dist.all_to_all_single(arriving, routing.tokens_per_expert, group=group)
    num_ranks = dist.get_world_size(group)
    # One wait for the device per layer: the host must know the sizes of what it sends and receives.
    sent, received = torch.stack((routing.tokens_per_expert, arriving)).view(2, num_ranks, -1).tolist()
    send_counts = [sum(counts) for counts in sent]
    receive_counts = [sum(counts) for counts in received]
    arrivals = all_to_all(rows, send_counts, receive_counts, group)
    num_local = len(received[0])
    expert_of_arrival = torch.arange(num_local, device=x.device).repeat(num_ranks).repeat_interleave(
        arriving, output_size=sum(receive_counts)
    )
    order = expert_of_arrival.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=x.device)
    buffer = _Permute.apply(arrivals, order, inverse)
    rows_per_expert = [sum(counts[expert] for counts in received) for expert in range(num_local)]
    metadata = DispatchMetadata(group, places, send_counts, receive_counts, order, inverse, rows_per_expert)
    return buffer, metadata


def combine(y: Tensor, routing: Routing, metadata: DispatchMetadata) -> Tensor:
    """Bring the experts' results `y` [R, h] home and weigh them: [S, h], sum over choices of gate * result.

    A token all of whose assignments were dropped gets zeros. Collective like `dispatch`.
    """
    if metadata.arrival_of_row is not None:
        y = _Permute.apply(y, metadata.row_of_arrival, metadata.arrival_of_row)
    rows = all_to_all(y, metadata.receive_counts, metadata.send_counts, metadata.group)  # [T, h]
    return _WeighAndSum.apply(rows, routing.gate, metadata.places)

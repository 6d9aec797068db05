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
    row_of_assignment: Tensor  # [k * S] int64: row of each assignment, 0 where dropped (its gate is 0)
    send_counts: list[int]  # rows for each rank of the expert group
    receive_counts: list[int]  # rows from each rank
    arrival_of_row: Tensor | None  # [R] place in arrival order of each buffer row; None: orders are the same
    rows_per_expert: list[int]  # rows of each local expert in the buffer; sums to R


class _TakeRows(torch.autograd.Function):
    """rows[i] = x[token_of_row[i]]; the gradient gathers by assignment: no atomics, so the same sum every time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token_of_row: Tensor, row_of_assignment: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(row_of_assignment, kept)
        ctx.num_tokens = x.shape[0]
        return x.index_select(0, token_of_row)

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor, None, None, None]:
        row_of_assignment, kept = ctx.saved_tensors
        if grad_rows.shape[0] == 0:
            return grad_rows.new_zeros((ctx.num_tokens, grad_rows.shape[1])), None, None, None
        per_assignment = grad_rows.index_select(0, row_of_assignment).view(-1, ctx.num_tokens, grad_rows.shape[1])
        return (per_assignment * kept.t().unsqueeze(-1)).sum(dim=0), None, None, None


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
    num_tokens = x.shape[0]
    num_assignments = routing.kept.numel()
    num_rows = routing.by_expert.numel()
    row_of_assignment = torch.zeros(num_assignments, dtype=torch.int64, device=x.device)
    row_of_assignment[routing.by_expert] = torch.arange(num_rows, device=x.device)
    rows = _TakeRows.apply(x, routing.by_expert % max(1, num_tokens), row_of_assignment, routing.kept)
    if group is None:
        counts = routing.tokens_per_expert.tolist()
        return rows, DispatchMetadata(None, row_of_assignment, [num_rows], [num_rows], None, counts)

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
    metadata = DispatchMetadata(group, row_of_assignment, send_counts, receive_counts, order, rows_per_expert)
    return buffer, metadata


def combine(y: Tensor, routing: Routing, metadata: DispatchMetadata) -> Tensor:
    """Bring the experts' results `y` [R, h] home and weigh them: [S, h], sum over choices of gate * result.

    A token all of whose assignments were dropped gets zeros. Collective like `dispatch`.
    """
    if metadata.arrival_of_row is not None:
        order = metadata.arrival_of_row
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        y = _Permute.apply(y, inverse, order)
    rows = all_to_all(y, metadata.receive_counts, metadata.send_counts, metadata.group)  # [T, h]
    num_tokens, top_k = routing.gate.shape
    if rows.shape[0] == 0:  # all dropped, or no tokens: zeros, but still part of the graph of every rank
        return rows.new_zeros((num_tokens, rows.shape[1])) + rows.sum() * routing.gate.sum().to(rows.dtype)
    per_assignment = rows.index_select(0, metadata.row_of_assignment).view(top_k, num_tokens, -1)
    gate = routing.gate.to(rows.dtype).t().unsqueeze(-1)  # [k, S, 1]
    return (per_assignment * gate).sum(dim=0)

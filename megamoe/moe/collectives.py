"""The one collective of expert parallelism, with its gradient. A group of one skips the call, not the code."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, send_counts: list[int], receive_counts: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.counts, ctx.group = (send_counts, receive_counts), group
        return _exchange(rows, send_counts, receive_counts, group)

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor, None, None, None]:
        send_counts, receive_counts = ctx.counts
        return _exchange(grad_rows, receive_counts, send_counts, ctx.group), None, None, None


def _exchange(rows: Tensor, send_counts: list[int], receive_counts: list[int], group: dist.ProcessGroup) -> Tensor:
    received = rows.new_empty((sum(receive_counts), *rows.shape[1:]))
    dist.all_to_all_single(received, rows.contiguous(), receive_counts, send_counts, group=group)
    return received


def all_to_all(
    rows: Tensor, send_counts: list[int], receive_counts: list[int], group: dist.ProcessGroup | None
) -> Tensor:
    """Send the first send_counts[0] rows to rank 0 of `group`, the next to rank 1, …; return what arrives, by rank.

    `rows` is [sum(send_counts), h], the result [sum(receive_counts), h]. `group` None is a group of one. Every rank
    must call it, also with nothing to send: the gradient takes the same way back.
    """
    if group is None:
        return rows
    return _AllToAll.apply(rows, send_counts, receive_counts, group)

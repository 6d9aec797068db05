"""The one collective of expert parallelism in two halves, start and finish, each with its gradient.

Between the halves other work runs. Backward mirrors forward: the gradient of finish starts the way back, the gradient
of start waits for it. PyTorch's engine takes, of the steps that are ready, the one recorded last; so what was recorded
between start and finish in forward runs between them in backward too, and every rank, having recorded the same steps,
calls its collectives in the same order. A group of one skips the call, not the code.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.phases import phase


class Transfer:
    """How many rows go to and come from each rank of `group`, and the exchange that is under way, if any.

    `group` None is a group of one. Every rank must start what its peers start, also with nothing to send.
    """

    def __init__(self, group: dist.ProcessGroup | None, send_counts: list[int], receive_counts: list[int]) -> None:
        self.group, self.send_counts, self.receive_counts = group, send_counts, receive_counts
        self._under_way: tuple[dist.Work, Tensor, Tensor] | None = None

    @phase("all_to_all")
    def begin(self, rows: Tensor, send_counts: list[int], receive_counts: list[int]) -> Tensor:
        """Start sending `rows` [sum(send_counts), h]; return where they arrive, [sum(receive_counts), h], unfilled."""
        rows = rows.contiguous()
        received = rows.new_empty((sum(receive_counts), *rows.shape[1:]))
        work = dist.all_to_all_single(received, rows, receive_counts, send_counts, group=self.group, async_op=True)
        # NCCL reads and writes on a stream of its own, of which the allocator knows nothing: both tensors must be held
        # until `end`, which makes the current stream, the one they were allocated on, wait for that stream. After that
        # their memory may be used again, and no record_stream is needed.
        self._under_way = (work, rows, received)
        return received

    @phase("all_to_all")
    def end(self) -> Tensor:
        """Wait until what was begun has arrived: on the host with gloo, on the current stream with NCCL."""
        if self._under_way is None:
            raise RuntimeError("an exchange was finished that nobody started")
        work, _, received = self._under_way
        work.wait()
        self._under_way = None
        return received


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.begin(rows, transfer.send_counts, transfer.receive_counts)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        # What is handed in is what `_Finish` sent off; what came back for it lies with the transfer.
        return ctx.transfer.end(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, received: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        transfer.end()
        return received.view_as(received)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.transfer.begin(grad, ctx.transfer.receive_counts, ctx.transfer.send_counts)
        return grad, None  # stands in for the gradient, in the shape that the engine expects here


def start_all_to_all(rows: Tensor, transfer: Transfer) -> Tensor:
    """Send the first send_counts[0] rows to rank 0 of the group, the next to rank 1, …

    `rows` is [sum(send_counts), h]; the result, [sum(receive_counts), h], is for `finish_all_to_all` alone: it is not
    filled before.
    """
    return rows if transfer.group is None else _Start.apply(rows, transfer)


def finish_all_to_all(received: Tensor, transfer: Transfer) -> Tensor:
    """What arrives from the ranks, in their order, [sum(receive_counts), h]: `received` once it is complete."""
    return received if transfer.group is None else _Finish.apply(received, transfer)

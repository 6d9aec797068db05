"""By which way rows travel to the ranks that own their experts: between whom, in how many chunks, in what order.

    E experts   G = N * L ranks share them: N nodes of L ranks each, numbered node by node   C chunks
    m experts of each rank in a chunk: expert e = (((node * L + local) * C) + chunk) * m + i

Flat, all G ranks send to each other. Hierarchical, a row first goes, inside its node, to the rank that has the local
number of its goal, then across nodes to the goal: N - 1 large messages leave a rank's node instead of G - L small
ones (DeepSpeed-MoE: Rajbhandari et al., 2022, section 5.3; 2DH all-to-all of Tutel: Hwang et al., 2022). What arrives
is the same, to the bit. In code flat is the hierarchy of one node.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.moe.collectives import Transfer, finish_all_to_all, start_all_to_all
from megamoe.moe.host_read import read_numbers
from megamoe.moe.rows import Order, Permute, blocks_swapped


@dataclass(frozen=True)
class Hop:
    """One exchange on the way of a chunk, and how what arrives is put in order after it (None: it is already)."""

    group: dist.ProcessGroup | None
    send_counts: list[int]  # rows to each rank of the group
    receive_counts: list[int]  # rows from each rank
    order: Order | None

    def there(self) -> Transfer:
        return Transfer(self.group, self.send_counts, self.receive_counts)

    def back(self) -> Transfer:
        return Transfer(self.group, self.receive_counts, self.send_counts)


@dataclass(frozen=True)
class ChunkRoute:
    """The way of one chunk, hop by hop, for this rank."""

    hops: tuple[Hop, ...]
    num_rows: int  # sent by this rank
    rows_per_expert: list[int]  # of each local expert of the chunk, in what arrives


UnderWay = tuple[Tensor, Transfer]


def send(rows: Tensor, route: ChunkRoute) -> UnderWay:
    """Set a chunk's rows [num_rows, h] out for their experts; the last hop is left under way."""
    *first, last = route.hops
    for hop in first:
        transfer = hop.there()
        rows = _ordered(finish_all_to_all(start_all_to_all(rows, transfer), transfer), hop.order)
    transfer = last.there()
    return start_all_to_all(rows, transfer), transfer


def receive(under_way: UnderWay, route: ChunkRoute) -> Tensor:
    """The chunk's buffer: sorted by local expert, then by sending rank."""
    return _ordered(finish_all_to_all(*under_way), route.hops[-1].order)


def send_back(buffer: Tensor, route: ChunkRoute) -> UnderWay:
    """Set results, in the order of the chunk's buffer, out for home; the first hop is left under way."""
    last = route.hops[-1]
    transfer = last.back()
    return start_all_to_all(_ordered(buffer, last.order and last.order.inverse), transfer), transfer


def receive_back(under_way: UnderWay, route: ChunkRoute) -> Tensor:
    """[num_rows, h]: a result for each row that `send` was given, in its order."""
    rows = finish_all_to_all(*under_way)
    for hop in reversed(route.hops[:-1]):
        transfer = hop.back()
        rows = _ordered(rows, hop.order and hop.order.inverse)
        rows = finish_all_to_all(start_all_to_all(rows, transfer), transfer)
    return rows


def _ordered(rows: Tensor, order: Order | None) -> Tensor:
    return rows if order is None else Permute.apply(rows, order)


@dataclass(frozen=True)
class Exchange:
    """Chosen once, at build time, and shared by the layers of a rank. The default is a rank alone with all experts."""

    local_group: dist.ProcessGroup | None = None  # flat: all G ranks; hierarchical: the L of this node
    num_local: int = 1
    across_group: dist.ProcessGroup | None = None  # hierarchical: the rank of each node with this rank's local number
    num_nodes: int = 1
    num_chunks: int = 1

    @classmethod
    def flat(cls, group: dist.ProcessGroup | None, *, num_chunks: int = 1) -> "Exchange":
        """Between all ranks of `group` (None: a group of one)."""
        size = 1 if group is None else dist.get_world_size(group)
        return cls(local_group=group if size > 1 else None, num_local=size, num_chunks=num_chunks)

    @classmethod
    def hierarchical(
        cls, local_group: dist.ProcessGroup, across_group: dist.ProcessGroup, *, num_chunks: int = 1
    ) -> "Exchange":
        """Inside the node, then across; see the fields."""
        return cls(
            local_group=local_group,
            num_local=dist.get_world_size(local_group),
            across_group=across_group,
            num_nodes=dist.get_world_size(across_group),
            num_chunks=num_chunks,
        )

    def place_of_expert(self, num_experts: int, device: torch.device) -> Tensor | None:
        """[E] int64: where each expert stands in the order of sending; None where that is the order of numbers.

        Rows are sent by chunk, then by first hop (local number of the owner), second hop (its node), then expert.
        """
        if self.num_chunks == 1 and self.num_nodes == 1:
            return None
        shape = (self.num_chunks, self.num_local, self.num_nodes, -1)
        return torch.arange(num_experts, device=device).view(shape).permute(2, 1, 0, 3).reshape(-1)

    def plan(self, tokens_per_expert: Tensor) -> list[ChunkRoute]:
        """The route of every chunk, given how many rows this rank has for each expert, [E] int64 on the device.

        Collective over the groups: the counts travel as the rows will. Here is the one wait of the host for the device
        in a layer; it must know the sizes of what it sends and receives.
        """
        sent = tokens_per_expert.view(self.num_nodes, self.num_local, self.num_chunks, -1)  # by owner
        # From each rank of this node what it has for each node: [L, N, C, m]. Then what all have for this rank.
        midway = _swap_counts(sent.transpose(0, 1), self.local_group)
        received = _swap_counts(midway.transpose(0, 1), self.across_group)  # [N, L, C, m], by sender
        read = np.array(read_numbers(torch.stack((sent, midway.transpose(0, 1), received)), "rows"), dtype=np.int64)
        return [self._route(chunk, midway[:, :, chunk], received[:, :, chunk], *read[:, :, :, chunk])
                for chunk in range(self.num_chunks)]  # fmt: skip

    def _route(
        self, chunk: int, midway: Tensor, received: Tensor, sent_read: np.ndarray, midway_read: np.ndarray,
        received_read: np.ndarray,
    ) -> ChunkRoute:  # fmt: skip
        """Counts of one chunk: midway [L, N, m] and received [N, L, m] on the device, all as [N, L, m] on the host."""
        num_sent, num_received = int(sent_read.sum()), int(received_read.sum())
        by_sender = received.reshape(self.num_nodes * self.num_local, -1)
        order = blocks_swapped(by_sender, num_received)
        to_local, from_local = sent_read.sum(axis=(0, 2)).tolist(), midway_read.sum(axis=(0, 2)).tolist()
        if self.across_group is None:
            hops = (Hop(self.local_group, to_local, from_local, order),)
        else:
            by_node = blocks_swapped(midway.sum(dim=2), int(midway_read.sum()))
            to_node, from_node = midway_read.sum(axis=(1, 2)).tolist(), received_read.sum(axis=(1, 2)).tolist()
            hops = (
                Hop(self.local_group, to_local, from_local, by_node),
                Hop(self.across_group, to_node, from_node, order),
            )
        return ChunkRoute(hops, num_sent, received_read.sum(axis=(0, 1)).tolist())


def _swap_counts(counts: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """counts [ranks, …]: give counts[r] to rank r, and return what each rank gives to this one."""
    counts = counts.contiguous()
    if group is None:
        return counts
    swapped = torch.empty_like(counts)
    dist.all_to_all_single(swapped, counts, group=group)
    return swapped

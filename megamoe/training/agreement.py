"""Decisions that all ranks must take alike, by small collectives: nobody goes on where another rank stops."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.model.parallel import ParallelGroups

MAX_MESSAGE_BYTES = 2048


def any_of(*flags: bool, groups: ParallelGroups, device: torch.device) -> list[bool]:
    """Each flag: whether it is set on any rank. One all-reduce; collective over all ranks."""
    values = torch.tensor([int(flag) for flag in flags], dtype=torch.int32, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=groups.world)
    return [bool(value) for value in values.tolist()]


def first_message(message: str | None, *, groups: ParallelGroups, device: torch.device) -> tuple[int, str] | None:
    """(rank, its message) of the first rank that has one, on every rank; None where none has. Collective.

    Long messages are cut at MAX_MESSAGE_BYTES of UTF-8.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    speaker = torch.tensor(world_size if message is None else rank, dtype=torch.int64, device=device)
    dist.all_reduce(speaker, op=dist.ReduceOp.MIN, group=groups.world)
    if int(speaker) == world_size:
        return None
    text = _packed(message or "", device) if rank == int(speaker) else _packed("", device)
    dist.broadcast(text, src=int(speaker), group=groups.world)
    return int(speaker), bytes(text.cpu().tolist()).rstrip(b"\0").decode("utf-8", errors="ignore")


def agreed_nonce(*, groups: ParallelGroups, device: torch.device) -> str:
    """Sixteen hexadecimal digits that the first rank drew. Collective over all ranks."""
    value = torch.randint(0, 2**62, (), generator=_fresh_generator(), dtype=torch.int64).to(device)
    dist.broadcast(value, src=0, group=groups.world)
    return f"{int(value):016x}"


def first_ranks_numbers(numbers: Sequence[int], *, device: torch.device) -> list[int]:
    """The first rank's whole numbers, on every rank, however many they are. Collective over all ranks."""
    count = torch.tensor(len(numbers), dtype=torch.int64, device=device)
    dist.broadcast(count, src=0)
    values = torch.zeros(int(count), dtype=torch.int64, device=device)
    if dist.get_rank() == 0:
        values.copy_(torch.tensor(numbers, dtype=torch.int64))
    if values.numel():
        dist.broadcast(values, src=0)
    return values.tolist()


def extremes(values: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Smallest and largest of each whole number [n] over a group's ranks, in one all-reduce."""
    both = torch.cat([values, ~values])  # ~x = -x - 1 turns the order around and cannot overflow
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
    largest, inverted = both.chunk(2)
    return ~inverted, largest


def _packed(message: str, device: torch.device) -> Tensor:
    data = message.encode("utf-8")[:MAX_MESSAGE_BYTES]
    return torch.tensor(list(data.ljust(MAX_MESSAGE_BYTES, b"\0")), dtype=torch.uint8, device=device)


def _fresh_generator() -> torch.Generator:
    """Not the default one: a save must not draw from the streams that training draws from."""
    generator = torch.Generator()
    generator.seed()
    return generator

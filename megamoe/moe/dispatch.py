"""Carry tokens to their experts and back. Two phases; the first returns what the second needs.

    S tokens   k choices   h hidden   T kept assignments here   R rows that arrive for a chunk of this rank's experts
    rows       [T, h]: one per kept assignment, sorted as they are sent (see `megamoe.moe.exchange`)
    buffer     [R, h]: what arrives for a chunk, sorted by local expert, then by sending rank

Every expert's rows are in one chunk, in the same order by whatever way they came: chunks and hierarchy change when
things happen, not a bit of what is computed. Time and memory are O(S * k * h): nothing here has the shape tokens x
experts or tokens x capacity.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megamoe.moe.exchange import ChunkRoute, Exchange, UnderWay, receive, receive_back, send, send_back
from megamoe.moe.routing import Routing
from megamoe.moe.rows import Places, TakeRows, WeighAndSum


@dataclass(frozen=True)
class DispatchMetadata:
    """How `dispatch` arranged the rows: all that `combine` needs to undo it."""

    places: Places
    routes: list[ChunkRoute]  # by chunk

    @property
    def rows_per_expert(self) -> list[list[int]]:
        """By chunk: rows of each of its local experts in the buffer; they sum to R."""
        return [route.rows_per_expert for route in self.routes]


def dispatch(x: Tensor, routing: Routing, exchange: Exchange) -> tuple[Iterator[Tensor], DispatchMetadata]:
    """Send every kept assignment's token of `x` [S, h] to the rank that owns its expert.

    Returns the buffers [R, h] of this rank's experts, chunk by chunk, and the metadata for `combine`. The first
    chunk is under way on return, each further one from when the one before is taken: what is done with a chunk runs
    while the next travels. `routing.by_expert` must be in the order of `exchange.place_of_expert`. Collective over
    the groups of `exchange`, also for a rank without tokens; all buffers must be taken.
    """
    routes = exchange.plan(routing.tokens_per_expert)
    sizes = [route.num_rows for route in routes]
    places = Places.of(routing, sum(sizes))
    rows = TakeRows.apply(x, places)
    chunks = (rows,) if len(routes) == 1 else rows.split(sizes)  # views, whose gradient is one concatenation
    first = send(chunks[0], routes[0])
    return _arrivals(first, chunks, routes), DispatchMetadata(places, routes)


def _arrivals(under_way: UnderWay, chunks: Sequence[Tensor], routes: list[ChunkRoute]) -> Iterator[Tensor]:
    for number, route in enumerate(routes):
        arriving = under_way
        if number + 1 < len(routes):
            under_way = send(chunks[number + 1], routes[number + 1])
        yield receive(arriving, route)


def combine(results: Iterable[Tensor], routing: Routing, metadata: DispatchMetadata) -> Tensor:
    """Bring the experts' results home and weigh them: [S, h], sum over choices of gate * result.

    `results` are [R, h] for each chunk, in the order of the buffers; made lazily, a chunk's results travel while the
    next chunk's are computed. A token all of whose assignments were dropped gets zeros. Collective like `dispatch`.
    """
    homeward = [send_back(y, route) for y, route in zip(results, metadata.routes, strict=True)]
    returned = [receive_back(*pair) for pair in zip(homeward, metadata.routes, strict=True)]
    rows = returned[0] if len(returned) == 1 else torch.cat(returned)  # [T, h]
    return WeighAndSum.apply(rows, routing.gate, metadata.places)

"""What the first rank does alone and all ranks need: texts to agree on, and work that takes longer than a wait may."""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from megamoe.errors import MegamoeError, PeerLost
from megamoe.inference.model import ForwardModel
from megamoe.training.agreement import first_ranks_numbers

_DONE, _WORKING, _FAILED = 0, 1, 2
_INTERVAL_SECONDS = 5.0


def first_ranks_text(model: ForwardModel, text: str) -> str:
    """The first rank's text, on every rank. Collective over all ranks."""
    return bytes(first_ranks_numbers(list(text.encode()), device=model.device)).decode()


def on_first_rank(model: ForwardModel, work: Callable[[Callable[[], None]], None]) -> None:
    """Do work(tick) on the first rank, while the others wait; it calls `tick` often, by which they know that it lives.

    Whatever the work takes, no single wait is longer than that between two ticks. Raises on the first rank what the
    work raises, PeerLost on the others. Collective over all ranks.
    """
    interval = min(_INTERVAL_SECONDS, model.config.parallel.timeout_seconds / 4)
    told = time.monotonic()

    def tell(state: int) -> int:
        value = torch.tensor(state if dist.get_rank() == 0 else 0, dtype=torch.int32, device=model.device)
        dist.broadcast(value, src=0, group=model.groups.world)
        return int(value)

    def tick() -> None:
        nonlocal told
        if time.monotonic() - told >= interval:
            tell(_WORKING)
            told = time.monotonic()

    if dist.get_rank() == 0:
        try:
            work(tick)
        except MegamoeError:
            tell(_FAILED)
            raise
        tell(_DONE)
        return
    while (state := tell(_WORKING)) == _WORKING:
        pass
    if state == _FAILED:
        raise PeerLost("the first rank has found an error in the texts")

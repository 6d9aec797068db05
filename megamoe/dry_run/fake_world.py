"""A world of any size in one process, in which the process plays one rank, then another: torch's "fake" backend.

Every call of a collective ends at once and moves nothing; all groups are made as in a real run. What tells a rank from
its neighbours is its number alone.
"""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megamoe.errors import MegamoeError
from megamoe.model import cpu_bridge


@contextmanager
def playing(rank: int, world_size: int) -> Iterator[None]:
    """Inside, torch.distributed is initialised and this process is `rank` of `world_size`; afterwards it is not.

    Whatever was built inside should be let go of inside (`Trainer.close`). Raises MegamoeError in a process that is a
    rank of a real run, and ValueError for a rank that the world does not have.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"there is no rank {rank} in a world of {world_size}")
    if dist.is_initialized():
        raise MegamoeError("a dry run cannot be made in a process that is a rank of a run already")
    # DeepSpeed reads these.
    here = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    before = {name: os.environ.get(name) for name in here}
    os.environ.update(here)
    cpu_bridge.apply_before_import()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        gc.collect()  # engines are full of cycles, and hold the groups
        if dist.is_initialized():
            dist.destroy_process_group()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

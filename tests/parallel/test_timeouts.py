"""parallel.timeout_seconds is the longest wait in every group of a rank, whichever engine made it."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megamoe.training.distributed import bound_waits
from tests.harness import run_ranks
from tests.parallel.worlds import LAUNCH_TIMEOUT_SECONDS, config, parallel, trainer_of

SECONDS = 47.5


def waits() -> set[timedelta]:
    return {group._get_backend(torch.device("cpu")).options._timeout for group in distributed_c10d._world.pg_map}


def timeouts() -> tuple[set[timedelta], set[timedelta], set[timedelta]]:
    """How long groups wait: those of the trainer; with one more that torch made by its default; all of them bounded."""
    settings = config("bias", (*parallel(pp=2, ep=2, zero=1), f"parallel.timeout_seconds={SECONDS}"))
    with trainer_of(settings):
        by_trainer = waits()
        dist.new_group()
        with_default = waits()
        bound_waits(SECONDS)
        return by_trainer, with_default, waits()


def test_every_group_waits_as_long_as_the_configuration_says():
    for by_trainer, with_default, bounded in run_ranks(timeouts, 4, init=False, timeout_seconds=LAUNCH_TIMEOUT_SECONDS):
        assert len(with_default) > 1 and bounded == {timedelta(seconds=SECONDS)}
        assert timedelta(seconds=SECONDS) in by_trainer and timedelta(minutes=1) not in by_trainer

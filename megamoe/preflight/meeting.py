"""Where all ranks meet before they trust each other: a store that rank 0 holds, and waits that all have an end."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch.distributed as dist

from megamoe.launch.environment import RankEnvironment

SLACK_SECONDS = 5.0  # what rank 0 has to tell the others what it gathered
NUM_CLOCK_EXCHANGES = 5


class Unreachable(Exception):
    """Rank 0, which holds the store, cannot be reached or does not answer. Its message says when."""


@dataclass(frozen=True)
class Gathered:
    """What every rank said, by rank; `missing` said nothing in time. The same on all ranks."""

    values: dict[int, Any]
    missing: tuple[int, ...]


class Meeting:
    """All ranks of a job. Every call is made by all of them, in the same order."""

    def __init__(self, environment: RankEnvironment, timeout_seconds: float) -> None:
        """Raises Unreachable where rank 0 does not come within `timeout_seconds`."""
        self.rank, self.world_size = environment.rank, environment.world_size
        try:
            self.store = dist.PrefixStore("megamoe-preflight", _open_store(environment, timeout_seconds))
            if self.rank == 0:
                self.store.set("open", b"1")
            self.store.wait(["open"], timedelta(seconds=timeout_seconds))
        except (RuntimeError, OSError) as error:  # of torch's stores
            raise Unreachable(f"within {timeout_seconds:g} s ({str(error).splitlines()[0][:200]})") from None

    def gather(self, what: str, value: Any, timeout_seconds: float) -> Gathered:
        """What all ranks say, as JSON. Rank 0 waits for them so long; raises Unreachable where it does not answer."""
        try:
            self.store.set(f"{what}/{self.rank}", json.dumps(value).encode())
            if self.rank == 0:
                self.store.set(f"{what}/all", json.dumps(self._collect(what, timeout_seconds)).encode())
            else:
                self.store.wait([f"{what}/all"], timedelta(seconds=timeout_seconds + SLACK_SECONDS))
            values = {int(rank): each for rank, each in json.loads(self.store.get(f"{what}/all")).items()}
        except (RuntimeError, OSError):
            raise Unreachable(f"while it was to gather what all say of: {what}") from None
        return Gathered(values, tuple(rank for rank in range(self.world_size) if rank not in values))

    def _collect(self, what: str, timeout_seconds: float) -> dict[int, Any]:
        keys = [f"{what}/{rank}" for rank in range(self.world_size)]
        with contextlib.suppress(RuntimeError):  # too late: who is there counts
            self.store.wait(keys, timedelta(seconds=timeout_seconds))
        return {
            rank: json.loads(self.store.get(key)) for rank, key in enumerate(keys) if self.store.check([key])
        }

    def clock_offset(
        self, ranks: list[int], timeout_seconds: float, now: Callable[[], float] = time.time
    ) -> tuple[float, float] | None:
        """For `ranks`, one of each node: seconds that this clock is ahead of rank 0's, and how far off that may be.

        Rank 0 answers one after another. None on other ranks, and where rank 0 did not answer in time.
        """
        if self.rank == 0:
            self._answer([rank for rank in ranks if rank != 0], timeout_seconds, now)
            return 0.0, 0.0
        if self.rank not in ranks:
            return None
        found = []
        for number in range(NUM_CLOCK_EXCHANGES):
            key = f"clock/{self.rank}/{number}"
            asked = now()
            try:
                self.store.set(f"{key}/ask", b"1")
                self.store.wait([f"{key}/answer"], timedelta(seconds=timeout_seconds))
                theirs, heard = float(self.store.get(f"{key}/answer")), now()
            except (RuntimeError, OSError):
                return None
            found.append(((heard - asked) / 2, (asked + heard) / 2 - theirs))
        error, offset = min(found)
        return offset, error

    def _answer(self, ranks: list[int], timeout_seconds: float, now: Callable[[], float]) -> None:
        deadline = time.monotonic() + timeout_seconds
        for rank in ranks:
            for number in range(NUM_CLOCK_EXCHANGES):
                key = f"clock/{rank}/{number}"
                left = max(0.001, deadline - time.monotonic())
                try:
                    self.store.wait([f"{key}/ask"], timedelta(seconds=left))
                except RuntimeError:  # what it has to say is missed later
                    break
                self.store.set(f"{key}/answer", repr(now()).encode())

    def leave(self, others: Iterable[int], timeout_seconds: float) -> None:
        """Rank 0, with whom the store goes, is the last to leave, and the others not before it is done."""
        with contextlib.suppress(RuntimeError, OSError):  # who has gone already need not be waited for
            if self.rank == 0:
                self.store.set("end", b"1")
                self.store.wait([f"left/{rank}" for rank in others], timedelta(seconds=SLACK_SECONDS))
            else:
                self.store.wait(["end"], timedelta(seconds=timeout_seconds))
                self.store.set(f"left/{self.rank}", b"1")


def _open_store(
    environment: RankEnvironment, timeout_seconds: float, env: Mapping[str, str] = os.environ
) -> dist.Store:
    place = urlsplit(environment.init_method)
    if environment.world_size == 1:
        return dist.HashStore()
    if place.scheme == "file":
        return dist.FileStore(place.path, -1)
    # torchrun's agent holds a store there already, and keeps it when it starts ranks anew.
    has_agent = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        place.hostname or "", place.port or 0, None, environment.rank == 0 and not has_agent,
        timedelta(seconds=timeout_seconds), False,
    )  # fmt: skip
    return dist.PrefixStore(env.get("TORCHELASTIC_RESTART_COUNT", "0"), store)

"""Whether a run stands still, and which rank is to blame. Arithmetic on what ranks report: no threads, no sockets."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

LOST_SECONDS = 1.0  # a broken connection may come back within these
CONSEQUENCE_SECONDS = 3.0  # only consequences have been heard of: a cause may still turn up


@dataclass(frozen=True)
class Limits:
    """timeout_seconds: longest silence of a rank, and longest time without progress but for slow work."""

    timeout_seconds: float


@dataclass(frozen=True)
class Report:
    """What a rank says of itself. `still_seconds`: how long nothing has changed, by its own clock; `limit_seconds`: how
    long that may last at this point. Asked in particular, also: whether one of its threads waits in a collective, and
    how many collectives it has called by group."""

    stage: str = "setup"
    step: int = 0
    phase: str = "setup"
    still_seconds: float = 0.0
    limit_seconds: float = float("inf")
    waits: bool | None = None
    groups: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What ended the run. hang: a rank made no progress; died: its process is gone; failed: it raised an error."""

    kind: Literal["hang", "died", "failed"]
    rank: int
    host: str
    step: int
    phase: str
    reason: str

    @property
    def message(self) -> str:
        what = {"hang": "hangs", "died": "died", "failed": "failed"}[self.kind]
        return f"rank {self.rank} on {self.host} {what} in step {self.step} ({self.phase}): {self.reason}"

    def as_tree(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class RankState:
    """One rank as the judge knows it. Times are of the judge's clock."""

    host: str
    heard: float
    report: Report = Report()
    has_left: bool = False
    lost_at: float | None = None
    failed_at: float | None = None
    failure: str = ""
    is_consequence: bool = False


class Judge:
    """Hears all ranks, on one of them. `now` is any clock of seconds that only goes forward."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.ranks: dict[int, RankState] = {}

    def joined(self, rank: int, host: str, now: float) -> None:
        state = self.ranks.setdefault(rank, RankState(host, now))
        state.heard, state.lost_at = now, None

    def heard(self, rank: int, report: Report, now: float) -> None:
        state = self.ranks[rank]
        if report.waits is None:  # a heartbeat after the answer, which said more
            report = replace(report, waits=state.report.waits, groups=state.report.groups)
        state.report, state.heard = report, now

    def left(self, rank: int) -> None:
        self.ranks[rank].has_left = True

    def lost(self, rank: int, now: float) -> None:
        """Its connection broke, without a word."""
        state = self.ranks[rank]
        if not state.has_left and state.failed_at is None:
            state.lost_at = now

    def failed(self, rank: int, message: str, is_consequence: bool, now: float) -> None:
        state = self.ranks[rank]
        if state.failed_at is None:
            state.failed_at, state.failure, state.is_consequence = now, message, is_consequence

    def ended(self, now: float) -> Verdict | None:
        """The verdict on a rank that has failed or is gone, if there is one."""
        causes = [(s.failed_at, r) for r, s in self.ranks.items() if s.failed_at is not None and not s.is_consequence]
        if causes:
            return self._verdict("failed", min(causes)[1])
        gone = [(s.lost_at, r) for r, s in self.ranks.items() if s.lost_at is not None]
        if gone and now - min(gone)[0] > LOST_SECONDS:
            return self._verdict("died", min(gone)[1])
        failed = [(s.failed_at, r) for r, s in self.ranks.items() if s.failed_at is not None]
        if failed and not gone and now - min(failed)[0] > CONSEQUENCE_SECONDS:
            return self._verdict("failed", min(failed)[1])
        return None

    def stands_still(self, now: float) -> bool:
        """Whether a rank is over its limit, or silent for too long, while none has failed or is gone."""
        if any(state.failed_at is not None or state.lost_at is not None for state in self.ranks.values()):
            return False
        return bool(self.silent(now)) or any(
            state.report.still_seconds > state.report.limit_seconds for state in self._watched().values()
        )

    def silent(self, now: float) -> set[int]:
        """Ranks whose heartbeat stands still for too long: they will not answer either."""
        watched = self._watched()
        return {rank for rank, state in watched.items() if now - state.heard > self.limits.timeout_seconds}

    def culprit(self, now: float, asked_at: float) -> Verdict:
        """Who holds the others up, once all that can have answered what they were asked at `asked_at`."""
        watched = self._watched()
        silent = [rank for rank, state in watched.items() if state.heard < asked_at]
        if silent:
            rank = min(silent, key=lambda each: (watched[each].heard, each))
            seconds = now - watched[rank].heard
            return self._verdict("hang", rank, f"its heartbeat has stood still for {seconds:.0f} s")
        rank, reason = blame({rank: state.report for rank, state in watched.items()})
        return self._verdict("hang", rank, f"no progress for {watched[rank].report.still_seconds:.0f} s; {reason}")

    def _watched(self) -> dict[int, RankState]:
        return {rank: state for rank, state in self.ranks.items() if not state.has_left}

    def _verdict(self, kind: Literal["hang", "died", "failed"], rank: int, reason: str = "") -> Verdict:
        state = self.ranks[rank]
        if kind == "died":
            reason = "its process ended without a word"
        if kind == "failed":
            reason = state.failure
        return Verdict(kind, rank, state.host, state.report.step, state.report.phase, reason)


def blame(reports: Mapping[int, Report]) -> tuple[int, str]:
    """(rank, why) of ranks that all answer: the one furthest behind, outside a collective while others wait inside.

    A rank waits for another where it has called more collectives of a group that both are in. Whoever is waited for
    and waits for nobody holds the others up.
    """
    ranks = sorted(reports)
    first_step = min(reports[rank].step for rank in ranks)
    candidates = [rank for rank in ranks if reports[rank].step == first_step]
    if len(candidates) == 1 and len(ranks) > 1:
        return candidates[0], "it is a step behind all others"
    ahead, behind = _order(reports)
    held_up = [rank for rank in candidates if rank in behind and rank not in ahead]
    outside = [rank for rank in held_up or candidates if reports[rank].waits is False]
    others_wait = any(reports[rank].waits for rank in ranks)
    if held_up and outside:
        return _stillest(outside, reports), "the others wait for it in a collective that it has not called"
    if held_up:
        return _stillest(held_up, reports), "it has called fewer collectives than the others"
    if outside and others_wait:
        return _stillest(outside, reports), "the others wait in a collective"
    if others_wait:
        reason = "all ranks wait in collectives that they have called alike: the network or a device stands still"
        return _stillest(candidates, reports), reason
    return _stillest(candidates, reports), "it stopped before the others" if len(ranks) > 1 else "it stands still"


def _order(reports: Mapping[int, Report]) -> tuple[set[int], set[int]]:
    """Ranks that are ahead of another in some group, and those that are behind another."""
    counts: dict[str, dict[int, int]] = {}
    for rank, report in reports.items():
        for group, count in report.groups.items():
            counts.setdefault(group, {})[rank] = count
    ahead, behind = set(), set()
    for members in counts.values():
        least, most = min(members.values()), max(members.values())
        ahead |= {rank for rank, count in members.items() if count > least}
        behind |= {rank for rank, count in members.items() if count < most}
    return ahead, behind


def _stillest(ranks: Sequence[int], reports: Mapping[int, Report]) -> int:
    return max(ranks, key=lambda rank: (reports[rank].still_seconds, -rank))

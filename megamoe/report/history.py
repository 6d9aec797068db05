"""What became of a run, from its events and attempts: who trained when, how it ended, what was lost. No numpy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megamoe.report.values import count_at, number_at, plain, text_at
from megamoe.runs.events import EVENTS_FILE
from megamoe.runs.line_stream import json_lines

ATTEMPTS_FILE = "attempts.jsonl"
FIRST_EVENTS, LAST_EVENTS = 2_000, 8_000  # how many of a long history are kept from its beginning and its end
ENDINGS = ("end", "interrupted", "stopped", "failed", "hang")
OUTCOMES = {
    0: "finished", 1: "failed (a defect)", 2: "failed", 3: "stopped itself", 4: "hung", 5: "bad nodes",
    75: "interrupted, saved", 130: "Ctrl-C",
}  # fmt: skip
_OUTCOME_OF_EVENT = {
    "end": "finished", "interrupted": "interrupted, saved", "stopped": "stopped itself", "failed": "failed",
    "hang": "hung",
}  # fmt: skip


@dataclass(frozen=True)
class Attempt:
    """One start of training, or of the script around it. Times in seconds since 1970."""

    number: int
    started: float | None = None
    ended: float | None = None
    outcome: str = ""  # "" while nothing is known of an end
    reason: str = ""
    hosts: tuple[str, ...] = ()
    world_size: int | None = None
    from_step: int | None = None  # None where training did not begin
    to_step: int | None = None  # the last step it is known to have reached
    lost_steps: int = 0  # of those, how many the next attempt had to do again
    verdict: str = ""


@dataclass(frozen=True)
class History:
    events: list[dict[str, Any]]  # in order, each with a text under "kind"
    num_left_out: int  # events between the first and the last ones that are not among them
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def num_restarts(self) -> int:
        return max(0, sum(attempt.from_step is not None for attempt in self.attempts) - 1)

    @property
    def lost_steps(self) -> int:
        """Steps that were done and had to be done again, as far as the events tell."""
        rolled_back = 0
        for event in self.of_kind("roll_back"):
            step, to_step = count_at(event, "step"), count_at(event, "to_step")
            rolled_back += max(0, step - to_step) if step is not None and to_step is not None else 0
        return rolled_back + sum(attempt.lost_steps for attempt in self.attempts)

    def of_kind(self, *kinds: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["kind"] in kinds]

    def last_of(self, *kinds: str) -> dict[str, Any] | None:
        return next((event for event in reversed(self.events) if event["kind"] in kinds), None)


def read_history(run_dir: Path) -> History:
    """From `events.jsonl` and `attempts.jsonl`, either of which may be missing, torn, or huge."""
    first: list[dict[str, Any]] = []
    last: list[dict[str, Any]] = []
    num_left_out = 0
    for event in json_lines(run_dir / EVENTS_FILE):
        if not isinstance(event.get("kind"), str):
            continue
        (first if len(first) < FIRST_EVENTS else last).append(event)
        if len(last) >= 2 * LAST_EVENTS:
            num_left_out += len(last) - LAST_EVENTS
            del last[:-LAST_EVENTS]
    events = first + last
    records: dict[int, dict[str, Any]] = {}
    for record in json_lines(run_dir / ATTEMPTS_FILE):
        number = count_at(record, "attempt")
        if number is not None and len(records) < LAST_EVENTS:
            known = records.setdefault(number, record)
            if known.get("id") == record.get("id"):  # of two that took one number, the first line wins
                records[number] = record
    return History(events, num_left_out, attempts_of(events, records))


def attempts_of(events: Sequence[Mapping[str, Any]], records: Mapping[int, Mapping[str, Any]]) -> list[Attempt]:
    """Every attempt that either of them knows, by number."""
    found: dict[int, Attempt] = {}
    current: int | None = None
    for event in events:
        if event["kind"] == "start":
            number = count_at(event, "attempt") or max(found, default=0) + 1
            previous, current = current, number
            step = count_at(event, "step") or 0
            found[number] = Attempt(
                number, started=number_at(event, "time"), hosts=hosts_of(event), from_step=step, to_step=step,
                world_size=count_at(event, "world_size"),
            )  # fmt: skip
            if previous is not None and previous != number:
                reached = found[previous].to_step or 0
                found[previous] = replace(found[previous], lost_steps=max(0, reached - step))
        elif current is not None:
            found[current] = _told_by(found[current], event)
    for number, record in records.items():
        found[number] = _recorded(found.get(number, Attempt(number)), record)
    return [found[number] for number in sorted(found)]


def hosts_of(tree: Mapping[str, Any]) -> tuple[str, ...]:
    hosts = tree.get("hosts")
    return tuple(plain(host) for host in hosts[:10_000] if isinstance(host, str)) if isinstance(hosts, list) else ()


def _told_by(attempt: Attempt, event: Mapping[str, Any]) -> Attempt:
    """With what an event between its start and the next one adds."""
    step, seconds = count_at(event, "step"), number_at(event, "time")
    if step is not None and event["kind"] != "save_failed":
        attempt = replace(attempt, to_step=max(step, attempt.to_step or 0))
    if event["kind"] in ENDINGS and not attempt.outcome:  # the first failure is the cause, what follows its effects
        outcome = _OUTCOME_OF_EVENT[event["kind"]]
        return replace(attempt, ended=seconds, outcome=outcome, reason=text_at(event, "message"))
    return attempt


def _recorded(attempt: Attempt, record: Mapping[str, Any]) -> Attempt:
    """With what `attempts.jsonl` says: when its script began and ended, the exit code, and what was decided."""
    exit_code, steps = record.get("exit_code"), (count_at(record, "step_before"), count_at(record, "step_after"))
    outcome = attempt.outcome
    if not outcome and isinstance(exit_code, int):
        outcome = OUTCOMES.get(exit_code, f"exit code {exit_code}"[:40])
    started, ended = number_at(record, "started"), number_at(record, "ended")
    reached = [step for step in (attempt.to_step, *steps) if step is not None]
    return replace(
        attempt,
        started=attempt.started if started is None else started,
        ended=attempt.ended if ended is None else ended,
        outcome=outcome,
        reason=attempt.reason or text_at(record, "reason"),
        hosts=attempt.hosts or hosts_of(record),
        to_step=max(reached) if reached and attempt.from_step is not None else None,
        verdict=text_at(record, "verdict"),
    )

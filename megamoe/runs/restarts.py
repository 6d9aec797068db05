"""Whether a run that ended is started again, and without which hosts: rules over what its folder records. No torch.

The attempts that count are those since somebody last started the run by hand, that is after the last "stop". A run is
given up when too many of them failed, or when several in a row left no newer checkpoint.
"""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megamoe.config.loading import load_config
from megamoe.config.schema import RestartConfig
from megamoe.errors import ConfigError, PreflightFailed, TrainingInterrupted, TrainingStopped
from megamoe.runs.attempts import Attempt, begin_attempt, events_of, newest_step, read_attempts, write_attempt
from megamoe.runs.events import append_event, read_events
from megamoe.runs.stop_file import STOP_FILE

DONE, USER_ERROR, CTRL_C = 0, 2, 130
INTERRUPTED = TrainingInterrupted.exit_code
_KNOWN_CODES = {1: "a defect", 3: "training stopped itself", 4: "a rank hung", PreflightFailed.exit_code: "preflight"}
_MOST_BLAMES = 2  # attempts that may name a host as the first to fail before it is left out: the first may be chance
_HOST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")


@dataclass(frozen=True)
class Verdict:
    """What the batch script is to do. `is_failure`: the run is given up although it is not done."""

    decision: Literal["requeue", "stop"]
    reason: str
    excluded_hosts: tuple[str, ...] = ()
    is_failure: bool = False

    @property
    def line(self) -> str:
        """What `megamoe after-attempt` prints."""
        if self.decision == "stop":
            return f"stop {self.reason}"
        return f"requeue exclude={','.join(self.excluded_hosts)}" if self.excluded_hosts else "requeue"


def restart_settings(run_dir: str) -> RestartConfig:
    """Those of the run; the defaults where it has not come so far as to record its configuration."""
    try:
        return load_config(str(Path(run_dir) / "config.yaml")).restart
    except ConfigError:
        return RestartConfig()


def start_attempt(run_dir: str, env: Mapping[str, str]) -> Attempt:
    """Record the start of the next attempt. OSErrors of the folder pass.

    Raises TrainingStopped where attempts that were killed together with their scripts have used up what is allowed.
    """
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    attempts = read_attempts(run_dir)
    if attempts and attempts[-1].verdict is None:
        last = attempts[-1].model_copy(update={"step_after": newest_step(run_dir)})
        reason = _used_up([*_since_stop(attempts[:-1]), last], restart_settings(run_dir))
        if reason is not None:
            write_attempt(run_dir, last.model_copy(update={"verdict": "stop", "reason": reason}))
            append_event(run_dir, "give_up", f"attempt {last.attempt}: {reason}", attempt=last.attempt)
            raise TrainingStopped(f"{run_dir} is given up: {reason}. Start it once more by hand to begin a new count")
    return begin_attempt(run_dir, env)


def finish_attempt(run_dir: str, exit_code: int, env: Mapping[str, str]) -> Verdict:
    """Record how the attempt ended and decide. Asked twice about one attempt, the first answer stands.

    The attempt is the one in `env` under MEGAMOE_ATTEMPT, else the newest. OSErrors of the folder pass.
    """
    attempts = read_attempts(run_dir)
    number = env.get("MEGAMOE_ATTEMPT", str(attempts[-1].attempt) if attempts else "")
    found = next((each for each in attempts if str(each.attempt) == number), None)
    if found is None:  # nobody recorded its start
        found = begin_attempt(run_dir, env)
        attempts.append(found)
    if found.verdict is not None:
        return Verdict(found.verdict, found.reason or "", found.excluded_hosts)
    step = newest_step(run_dir)
    ended = found.model_copy(update={"ended": time.time(), "exit_code": exit_code, "step_after": step})
    chain = [*_since_stop([each for each in attempts if each.attempt < found.attempt]), ended]
    verdict = decide(
        chain, [events_of(read_events(run_dir), attempts, each.attempt) for each in chain], restart_settings(run_dir),
        stop_file=(Path(run_dir) / STOP_FILE).exists(),
    )  # fmt: skip
    update = {"verdict": verdict.decision, "reason": verdict.reason, "excluded_hosts": verdict.excluded_hosts}
    write_attempt(run_dir, ended.model_copy(update=update))
    _tell(run_dir, found.attempt, verdict)
    return verdict


def decide(
    chain: Sequence[Attempt],
    events: Sequence[Sequence[Mapping[str, Any]]],
    settings: RestartConfig,
    *,
    stop_file: bool = False,
) -> Verdict:
    """What follows the last attempt of `chain`, those that count; `events` of each of them."""
    last = chain[-1]
    if last.exit_code == DONE:
        return Verdict("stop", "done")
    asked = any(event["kind"] == "interrupted" and event.get("reason") == "stop file" for event in events[-1])
    if last.exit_code == INTERRUPTED and (asked or stop_file):
        return Verdict("stop", "stop file")
    if last.exit_code == USER_ERROR:
        return Verdict("stop", "the user must mend what the log says (exit code 2)", is_failure=True)
    if last.exit_code == CTRL_C:
        return Verdict("stop", "Ctrl-C")
    reason = _used_up(chain, settings)
    if reason is not None:
        return Verdict("stop", reason, is_failure=True)
    if last.exit_code == PreflightFailed.exit_code and (problem := _problem(events[-1])) is not None:
        return Verdict("stop", problem, is_failure=True)
    excluded = _excluded_hosts(chain, events, settings.max_excluded_hosts)
    return Verdict("requeue", _words(last.exit_code), excluded)


def _since_stop(attempts: Sequence[Attempt]) -> list[Attempt]:
    stops = [place for place, each in enumerate(attempts) if each.verdict == "stop"]
    return list(attempts[stops[-1] + 1 if stops else 0 :])


def _used_up(chain: Sequence[Attempt], settings: RestartConfig) -> str | None:
    """Why there is no further attempt; None where there may be one. An attempt without an end has failed."""
    num_failed = sum(each.exit_code not in (DONE, INTERRUPTED) for each in chain)
    if num_failed >= settings.max_attempts:
        return f"{num_failed} attempts failed (restart.max_attempts), the last by {_words(chain[-1].exit_code)}"
    num_stuck = 0
    for each in reversed(chain):
        if (each.step_after or 0) > each.step_before:
            break
        num_stuck += 1
    if num_stuck < settings.max_attempts_without_progress:
        return None
    return (
        f"{num_stuck} attempts in a row left no checkpoint newer than step {chain[-1].step_after or 0} "
        f"(restart.max_attempts_without_progress), the last ended by {_words(chain[-1].exit_code)}"
    )


def _words(exit_code: int | None) -> str:
    if exit_code is None:
        return "a kill of its script"
    if exit_code == INTERRUPTED:
        return f"a signal, its state saved (exit code {INTERRUPTED})"
    if exit_code in _KNOWN_CODES:
        return f"{_KNOWN_CODES[exit_code]} (exit code {exit_code})"
    return f"signal {exit_code - 128}" if 128 < exit_code < 160 else f"exit code {exit_code}"


def _excluded_hosts(
    chain: Sequence[Attempt], events: Sequence[Sequence[Mapping[str, Any]]], limit: int
) -> tuple[str, ...]:
    """Hosts that the next attempt does without, those left out already first; at most `limit`."""
    excluded, blames = list(chain[-2].excluded_hosts) if len(chain) > 1 else [], {}
    for attempt, its_events in zip(chain, events, strict=True):
        host = _first_failed(attempt, its_events)
        if host is not None and attempt.exit_code != INTERRUPTED:
            blames[host] = blames.get(host, 0) + 1
    bad = [host for attempt, its_events in zip(chain, events, strict=True) for host in _found_bad(attempt, its_events)]
    for host in (*bad, *(host for host, count in blames.items() if count >= _MOST_BLAMES)):
        if host not in excluded:
            excluded.append(host)
    return tuple(excluded[:limit])


def _problem(events: Sequence[Mapping[str, Any]]) -> str | None:
    """What preflight found that other hosts would not mend; None where it blames some, or could not say."""
    reports = [event for event in events if event["kind"] == "preflight" and isinstance(event.get("problems"), list)]
    if not reports or not reports[-1]["problems"] or reports[-1].get("bad_hosts"):
        return None
    return f"preflight: {reports[-1]['problems'][0]}"


def _found_bad(attempt: Attempt, events: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What preflight measured is no chance. Without rank 0 nobody gathers, and the other hosts' majority counts."""
    own = [event for event in events if event["kind"] == "preflight"]
    reports = [event for event in own if "unreachable_host" not in event]
    for event in reports:
        names = event.get("bad_hosts")
        for name in names if isinstance(names, list) else ():
            if (host := _host_of(attempt, name)) is not None:
                yield host
    votes: dict[str, set[str]] = {}
    for event in () if reports else own:
        host = _host_of(attempt, event.get("unreachable_host"))
        if host is not None:
            votes.setdefault(host, set()).add(str(event.get("hosts")))
    yield from (host for host, voters in votes.items() if 2 * len(voters) > len(attempt.hosts) - 1 > 0)


def _first_failed(attempt: Attempt, events: Sequence[Mapping[str, Any]]) -> str | None:
    """Who was first: what is told after it may be its consequence. What a user is to mend is no host's fault."""
    first = next((event for event in events if event["kind"] in ("failed", "hang")), None)
    return None if first is None or first.get("cause") == "user" else _host_of(attempt, first.get("host"))


def _host_of(attempt: Attempt, name: Any) -> str | None:
    """The host as SLURM knows it; None where the attempt had none of that name."""
    if not isinstance(name, str) or _HOST_NAME.fullmatch(name) is None:
        return None
    if not attempt.hosts or name in attempt.hosts:
        return name
    return next((host for host in attempt.hosts if host.partition(".")[0] == name.partition(".")[0]), None)


def _tell(run_dir: str, number: int, verdict: Verdict) -> None:
    if verdict.decision == "requeue":
        without = f" without {', '.join(verdict.excluded_hosts)}" if verdict.excluded_hosts else ""
        text = f"attempt {number} ended by {verdict.reason}: another one follows{without}"
        append_event(run_dir, "requeue", text, attempt=number, excluded_hosts=list(verdict.excluded_hosts))
    elif verdict.is_failure:
        append_event(run_dir, "give_up", f"attempt {number}: {verdict.reason}", attempt=number)

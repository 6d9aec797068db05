"""Who tried to train a run, when, on which hosts, and how it ended: `attempts.jsonl` of its folder.

Every line is the whole record of one attempt as it was known then, the last line of an attempt counts:

    attempt         1, 2, ...: the number of the attempt
    id              who wrote it: of two that take one number at the same time, the first line wins
    started, ended  seconds since 1970; an attempt that was killed together with its script has no end
    job_id, array_task, restart_count   of SLURM, as text and a number; null elsewhere
    hosts           of the job
    num_events      lines of events.jsonl before it, so that its own are known whatever the clocks say
    exit_code       of training
    step_before, step_after   of the newest good checkpoint, 0 without one
    verdict         "requeue" or "stop", with the reason for it
    excluded_hosts  what the attempts after it are to do without
"""

import itertools
import json
import os
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megamoe.errors import CheckpointError, ConfigError, TopologyError
from megamoe.launch.environment import expand_node_list, node_name
from megamoe.runs.events import read_events
from megamoe.runs.json_lines import append_json_line, read_json_lines
from megamoe.runs.run_folder import resumable_manifest

ATTEMPTS_FILE = "attempts.jsonl"
ATTEMPT_VARIABLE = "MEGAMOE_ATTEMPT"  # the batch script sets it, so that all ranks agree
_MAX_RACES = 100  # numbers that others took first

Count = Annotated[int, Field(ge=0)]


class Attempt(BaseModel):
    """One line; the module's docstring says what its keys are."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    attempt: Annotated[int, Field(ge=1)]
    id: str
    started: float
    ended: float | None = None
    job_id: str | None = None
    array_task: str | None = None
    restart_count: Count | None = None
    hosts: tuple[str, ...] = ()
    num_events: Count = 0
    exit_code: int | None = None
    step_before: Count = 0
    step_after: Count | None = None
    verdict: Literal["requeue", "stop"] | None = None
    reason: str | None = None
    excluded_hosts: tuple[str, ...] = ()


def read_attempts(run_dir: str | os.PathLike[str]) -> list[Attempt]:
    """All attempts by number; lines that a crash tore, or that are none of ours, are left out.

    Of an attempt without an end that was followed by another, `step_after` is the step which that one found.
    """
    newest: dict[int, Attempt] = {}
    for tree in read_json_lines(Path(run_dir) / ATTEMPTS_FILE):
        found = _attempt_of(tree)
        if found is not None and newest.setdefault(found.attempt, found).id == found.id:
            newest[found.attempt] = found
    attempts = [newest[number] for number in sorted(newest)]
    for place, (this, following) in enumerate(itertools.pairwise(attempts)):
        if this.step_after is None:
            attempts[place] = this.model_copy(update={"step_after": following.step_before})
    return attempts


def current_attempt(run_dir: str | os.PathLike[str], env: Mapping[str, str] = os.environ) -> int:
    """The number of the attempt that this process belongs to.

    Without MEGAMOE_ATTEMPT it is the one that begins now: ask before the event "start" is written.
    Raises ConfigError where the variable holds no number of an attempt.
    """
    text = env.get(ATTEMPT_VARIABLE)
    if text is None:
        return _next_number(run_dir)
    if re.fullmatch(r"[1-9][0-9]{0,8}", text) is None:
        raise ConfigError(
            f'{ATTEMPT_VARIABLE} is "{text}": set it to what `megamoe before-attempt` printed, or leave it unset'
        )
    return int(text)


def begin_attempt(run_dir: str | os.PathLike[str], env: Mapping[str, str] = os.environ) -> Attempt:
    """Take the next number and record the start. OSErrors of the folder pass."""
    job_id, restart_count = env.get("SLURM_JOB_ID"), env.get("SLURM_RESTART_COUNT", "0")
    for _ in range(_MAX_RACES):
        attempt = Attempt(
            attempt=_next_number(run_dir),
            id=uuid.uuid4().hex,
            started=time.time(),
            job_id=job_id,
            array_task=env.get("SLURM_ARRAY_TASK_ID"),
            restart_count=int(restart_count) if job_id is not None and restart_count.isdecimal() else None,
            hosts=job_hosts(env),
            num_events=len(read_events(run_dir)),
            step_before=newest_step(run_dir),
        )
        write_attempt(run_dir, attempt)
        if any(each.id == attempt.id for each in read_attempts(run_dir)):
            return attempt
    raise OSError(f"no number could be taken in {_MAX_RACES} tries: too many write it")


def write_attempt(run_dir: str | os.PathLike[str], attempt: Attempt) -> None:
    """Append the record as it is now. OSErrors pass."""
    append_json_line(Path(run_dir) / ATTEMPTS_FILE, attempt.model_dump(mode="json"), durable=True)


def newest_step(run_dir: str | os.PathLike[str]) -> int:
    """The step of the newest checkpoint that training could go on from; 0 where there is none."""
    try:
        found = resumable_manifest(run_dir)
    except CheckpointError:  # `latest` names none: training will say so
        return 0
    return 0 if found is None else found[1].step


def events_of(events: Sequence[Mapping[str, Any]], attempts: Sequence[Attempt], number: int) -> list[Mapping[str, Any]]:
    """Those of `events`, all of a run, that were written while attempt `number` was the newest."""
    first = next(each.num_events for each in attempts if each.attempt == number)
    last = min((each.num_events for each in attempts if each.attempt > number), default=len(events))
    return list(events[first:last])


def job_hosts(env: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The hosts of this SLURM job; this one elsewhere. Empty where SLURM's list is of a form that we do not know."""
    node_list = env.get("SLURM_JOB_NODELIST")
    if not node_list:
        return (node_name(env),)
    try:
        return tuple(expand_node_list(node_list))
    except TopologyError:
        return ()


def _next_number(run_dir: str | os.PathLike[str]) -> int:
    """After every attempt on record, and after every start without a script that would have recorded it."""
    recorded = [tree.get("attempt") for tree in read_json_lines(Path(run_dir) / ATTEMPTS_FILE)]
    starts = [event.get("attempt") for event in read_events(run_dir) if event["kind"] == "start"]
    numbers = [number for number in (*recorded, *starts) if isinstance(number, int)]
    return max([0, len(starts), *numbers]) + 1


def _attempt_of(tree: Mapping[str, Any]) -> Attempt | None:
    try:
        return Attempt.model_validate_json(json.dumps(tree))
    except ValidationError:
        return None

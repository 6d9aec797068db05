"""What happened to a run, one JSON object a line in `events.jsonl` of its folder: starts, stops, saves, faults.

Unlike metrics, events of steps that are repeated after a restart stay: they are the history of the run.

    {"time": 1767225600.0, "kind": "save", "step": 200, "message": "...", ...}

`time` is in seconds since 1970, UTC. Kinds, and what they carry beside a message:

    start         attempt, world_size, hosts, step: training begins or goes on from there
    end           step: all steps are done
    interrupted   step, reason ("signal" or "stop file"): it was asked for, the state is saved
    stopped       step: training ended itself
    failed        rank, host, phase, step: a rank ended in an error or was killed
    hang          rank, host, phase, step: a rank made no progress for too long
    save          step, seconds; save_failed: step
    spike         step, loss, expected (the median of recent ones), grad_norm, action; divergence: the same
    roll_back     step, to_step, skipped_samples: training goes on from to_step, with the samples behind those of step
    alert         title, level: what a tracking service was told
    preflight     attempt, hosts, bad_hosts, problems: what no host is to blame for; of one host without rank 0's
                  answer: hosts, unreachable_host
    requeue       attempt, excluded_hosts; give_up: why no further attempt is made
"""

import os
import time
from pathlib import Path
from typing import Any

from megamoe.runs.json_lines import append_json_line, read_json_lines

EVENTS_FILE = "events.jsonl"


def append_event(run_dir: str | os.PathLike[str], kind: str, message: str, **details: Any) -> dict[str, Any]:
    """Append one line, in one write, so that processes of several hosts may append at the same time; returns it.

    Raises OSError where the folder cannot be written.
    """
    event = {"time": time.time(), "kind": kind, "message": message, **details}
    append_json_line(Path(run_dir) / EVENTS_FILE, event)
    return event


def read_events(run_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All events in the order in which they were written; lines that a crash tore are left out."""
    found = read_json_lines(Path(run_dir) / EVENTS_FILE)
    return [event for event in found if isinstance(event.get("kind"), str)]

"""Where each run of a study stands, read from its folder, and what it has cost so far. No torch."""

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamoe.checkpoint.folders import complete_checkpoints, step_of
from megamoe.checkpoint.manifest import Manifest
from megamoe.errors import CheckpointError
from megamoe.runs.events import read_events
from megamoe.runs.metrics import METRICS_FILE, read_metrics
from megamoe.study.ladder import StudyRun

_TAIL_BYTES = 1 << 14


@dataclass(frozen=True)
class Cost:
    """Up to a step. None: the run's record does not say."""

    seconds: float | None
    peak_memory_bytes: int | None


def saved_steps(run: StudyRun) -> list[int]:
    """Steps of complete checkpoints, ascending."""
    found = complete_checkpoints(run.dir / "checkpoints")
    return sorted(step for path in found if (step := step_of(path.name)) is not None)


def saved_checksums(run: StudyRun) -> dict[int, str]:
    """By step, what tells one save from another; a damaged one is left out, evaluating it will say why."""
    found = {}
    for path in complete_checkpoints(run.dir / "checkpoints"):
        step = step_of(path.name)
        if step is None:
            continue
        with contextlib.suppress(CheckpointError):
            found[step] = Manifest.read(path).checksum
    return found


def is_trained(run: StudyRun) -> bool:
    """Its last checkpoint is there, or was, before somebody freed the disk: the run's record says that it ended."""
    return run.config.run.num_steps in saved_steps(run) or _has_ended(run)


def _has_ended(run: StudyRun) -> bool:
    last = run.config.run.num_steps
    return any(event["kind"] == "end" and event.get("step") == last for event in read_events(run.dir))


def reached_step(run: StudyRun) -> int:
    """How far the run's record says that it has come."""
    return run.config.run.num_steps if _has_ended(run) else int(last_line(run).get("step", 0))


def last_line(run: StudyRun) -> dict[str, Any]:
    """The last whole line of metrics, read from the end of the file; {} where there is none."""
    try:
        with open(run.dir / METRICS_FILE, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            tree = json.loads(line)
        except ValueError:
            continue
        if isinstance(tree, dict) and "step_seconds" in tree:
            return tree
    return {}


def costs_of(run: StudyRun, steps: tuple[int, ...]) -> dict[int, Cost]:
    """By step. A line of metrics speaks for all steps since the one before it: a restart cuts the lines it repeats."""
    path = Path(run.dir) / METRICS_FILE
    lines = [line for line in read_metrics(path) if "step_seconds" in line] if path.exists() else []
    found: dict[int, Cost] = {}
    for step in steps:
        before, seconds, memory, complete = 0, 0.0, 0, True
        for line in lines:
            if before >= step:
                break
            upto = min(int(line["step"]), step)
            if line["step_seconds"] is None:
                complete = False
            else:
                seconds += (upto - before) * line["step_seconds"]
            memory, before = max(memory, int(line.get("memory_bytes") or 0)), upto
        found[step] = Cost(seconds if complete and before == step else None, memory or None)
    return found

"""How a run stands: its state, what is done and left, and what a glance needs to know. No numpy."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megamoe.errors import ConfigError
from megamoe.report.history import History, hosts_of
from megamoe.report.values import count_at, number_at, plain, section, text_at
from megamoe.runs.metrics import METRICS_FILE

CONFIG_FILE = "config.yaml"
MAX_CONFIG_BYTES = 4 << 20
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
QUIET_SECONDS = 60.0  # a run that is silent for less is never called stale
QUIET_INTERVALS = 4.0  # nor one that is silent for less than so many times its usual time between lines

STATES = {
    "running": "running",
    "finished": "finished",
    "interrupted": "interrupted, its state is saved",
    "stopped": "stopped itself",
    "failed": "failed",
    "hung": "hung",
    "gave up": "failed, no further attempt is made",
    "requeued": "requeued, waits for its next attempt",
    "stale": "stale, it was killed or hangs",
    "not started": "not started",
}
_STATE_OF_EVENT = {
    "end": "finished", "interrupted": "interrupted", "stopped": "stopped", "failed": "failed", "hang": "hung",
    "give_up": "gave up",
}  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """Units as in the names; None where nothing tells."""

    name: str
    state: str  # a key of STATES
    message: str  # of the event that the state is from
    quiet_seconds: float | None  # since the last sign of life
    step: int
    num_steps: int | None
    tokens: float | None
    num_tokens: float | None  # when all steps are done
    seconds_left: float | None  # of training at the speed of the last line
    checkpoint_step: int | None
    checkpoint_age_seconds: float | None
    wall_seconds: float | None  # from the first start to the last sign of life
    num_ranks: int | None
    num_hosts: int | None

    @property
    def share_done(self) -> float | None:
        return min(1.0, self.step / self.num_steps) if self.num_steps else None


def check_is_run(run_dir: Path) -> None:
    """Raises ConfigError for what holds nothing of a run."""
    if not run_dir.is_dir():
        raise ConfigError(f"{plain(str(run_dir))} is no folder: name the folder of a run, its run.dir")
    if not any((run_dir / name).exists() for name in (METRICS_FILE, CONFIG_FILE, "events.jsonl")):
        raise ConfigError(
            f"{plain(str(run_dir))} is no run's folder: it holds neither {CONFIG_FILE} nor {METRICS_FILE}"
        )


def read_config(run_dir: Path) -> dict[str, Any]:
    """The sections of `config.yaml`, unchecked: an old run's may have other keys. Empty where it cannot be read."""
    try:
        with open(run_dir / CONFIG_FILE, "rb", opener=_without_waiting) as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
        if len(text) > MAX_CONFIG_BYTES:
            return {}
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, _LOADER)):
            return {}  # a run's own file has no aliases, and a few lines of them make a tree without end
        tree = yaml.load(text, _LOADER)
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def facts_of(
    run_dir: Path, config: Mapping[str, Any], history: History, last_line: Mapping[str, Any], now: float | None = None
) -> Facts:
    """`last_line` is the last training line of the metrics, {} without one; `now` in seconds since 1970."""
    now = time.time() if now is None else now
    run, step = section(config, "run"), count_at(last_line, "step") or 0
    start = history.last_of("start")
    if not last_line and start is not None:
        step = count_at(start, "step") or 0
    num_steps, tokens = count_at(run, "num_steps"), number_at(last_line, "tokens")
    alive = last_sign_of_life(run_dir, history)
    quiet = None if alive is None else max(0.0, now - alive)
    state, message = _state(config, history, last_line, num_steps, quiet)
    step_seconds = number_at(last_line, "step_seconds")
    left = max(0, num_steps - step) if num_steps is not None else None
    first_start = next((number_at(event, "time") for event in history.of_kind("start")), None)
    ended = now if state == "running" else _last_moment(history, last_line) or alive
    checkpoint = newest_checkpoint(run_dir)
    return Facts(
        name=plain(run_dir.resolve().name) or "run",
        state=state,
        message=message,
        quiet_seconds=quiet,
        step=step,
        num_steps=num_steps,
        tokens=tokens,
        num_tokens=_tokens_in_all(config, tokens, last_line, left),
        seconds_left=left * step_seconds if left is not None and step_seconds is not None else None,
        checkpoint_step=checkpoint[0] if checkpoint else None,
        checkpoint_age_seconds=max(0.0, now - checkpoint[1]) if checkpoint else None,
        wall_seconds=max(0.0, ended - first_start) if first_start is not None and ended is not None else None,
        num_ranks=count_at(start, "world_size") if start else None,
        num_hosts=len(hosts_of(start)) or None if start else None,
    )


def _state(
    config: Mapping[str, Any], history: History, last_line: Mapping[str, Any], num_steps: int | None,
    quiet_seconds: float | None,
) -> tuple[str, str]:  # fmt: skip
    """A key of STATES, and the message of the event that says so."""
    decisive = history.last_of("start", "requeue", *_STATE_OF_EVENT)
    if decisive is not None and decisive["kind"] != "start":
        first = _first_ending(history)
        if decisive["kind"] in ("give_up", "requeue"):
            return {"give_up": "gave up", "requeue": "requeued"}[decisive["kind"]], text_at(decisive, "message")
        return _STATE_OF_EVENT[first["kind"]], text_at(first, "message")
    step = count_at(last_line, "step")
    if decisive is None and step is None:
        return "not started", ""
    if decisive is None and num_steps is not None and step is not None and step >= num_steps:
        return "finished", ""  # of before events were written
    interval = count_at(section(config, "monitor"), "log_interval_steps") or 1
    between = interval * (number_at(last_line, "step_seconds") or 0.0)
    patience = max(QUIET_SECONDS, QUIET_INTERVALS * between)
    if not last_line:  # nothing tells how long its steps take
        patience = max(patience, number_at(section(config, "parallel"), "timeout_seconds") or 0.0)
    return ("stale" if quiet_seconds is None or quiet_seconds > patience else "running"), ""


def _first_ending(history: History) -> Mapping[str, Any]:
    """Of the events that end the newest attempt, the first: what follows are its effects."""
    found: Mapping[str, Any] = {}
    for event in history.events:
        if event["kind"] == "start":
            found = {}
        elif event["kind"] in _STATE_OF_EVENT and not found:
            found = event
    return found


def _tokens_in_all(
    config: Mapping[str, Any], tokens: float | None, last_line: Mapping[str, Any], steps_left: int | None
) -> float | None:
    """Tokens when all steps are done, at the batch size of the last line; exact but where a ramp is still going on."""
    batch = count_at(section(config, "run"), "global_batch_size") or count_at(last_line, "global_batch_size")
    length = count_at(section(config, "model"), "seq_length")
    if batch is None or length is None or steps_left is None:
        return None
    return (tokens or 0.0) + steps_left * batch * length


def _last_moment(history: History, last_line: Mapping[str, Any]) -> float | None:
    """The last one that the record itself names: files that were copied are younger than what they tell."""
    ending = _first_ending(history)
    moments = [number_at(ending, "time")] if ending else [number_at(last_line, "time")]
    moments += [number_at(event, "time") for event in history.events[-1:]] if not ending else []
    return max((each for each in moments if each is not None), default=None)


def last_sign_of_life(run_dir: Path, history: History) -> float | None:
    """Seconds since 1970 when something was last written of this run's training."""
    times = [number_at(event, "time") for event in history.events[-1:]]
    for name in (METRICS_FILE, "log.txt", "expert_loads.jsonl"):
        try:
            times.append((run_dir / name).stat().st_mtime)
        except OSError:
            continue
    return max((each for each in times if each is not None), default=None)


def newest_checkpoint(run_dir: Path) -> tuple[int, float] | None:
    """(step, seconds since 1970 when it was written) of the checkpoint in force."""
    from megamoe.checkpoint.folders import complete_checkpoints, step_of  # brings numpy: only where there are any
    from megamoe.errors import CheckpointError

    root = run_dir / "checkpoints"
    try:
        found = complete_checkpoints(root) if root.is_dir() else []
        return (step_of(found[0].name) or 0, (found[0] / "manifest.json").stat().st_mtime) if found else None
    except (OSError, CheckpointError):
        return None

"""Everything that a page tells of one run, read once, in bounded memory."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megamoe.errors import MegamoeError
from megamoe.report.facts import Facts, check_is_run, facts_of, read_config
from megamoe.report.history import History, read_history
from megamoe.report.loads import ExpertLoads, read_loads
from megamoe.report.table import Column, Table, growing_runs, to_columns, trailing_mean
from megamoe.report.values import number_at
from megamoe.runs.line_stream import json_chunks, json_lines
from megamoe.runs.metrics import METRICS_FILE

TRAINING_KEYS = ("step_seconds", "loss", "lm_loss", "tokens_per_second")  # one of them makes a line one of training
NOT_SMOOTHED = frozenset(
    {"tokens", "time", "lr", "loss_scale", "skipped_steps", "global_batch_size", "memory_bytes", "unused_experts"}
)  # a mean of what moves in steps would be wrong at every one of them
NOT_DRAWN = frozenset({"samples", "nonfinite"})
STEPS, TOKENS, HOURS = "steps", "tokens", "hours"
_STEP, _TOKENS, _TIME = "step", "tokens", "time"
_KEPT_SECONDS = "kept seconds"  # columns of ours have names that no key of a file has: they hold spaces
_SMOOTH = " smoothed"


@dataclass
class Record:
    """A run's own record. `training` and `held_out` hold the two kinds of lines of its metrics."""

    path: Path
    config: dict[str, Any]
    history: History
    facts: Facts
    training: Table
    held_out: Table
    loads: ExpertLoads
    last_line: dict[str, Any]
    test: dict[str, Any]  # the line with test_loss, where there is one
    num_parameters: int | None = None
    num_active_parameters: int | None = None
    hours_are_wall: bool = False
    name: str = ""
    _axes: dict[tuple[int, str], Column] = field(default_factory=dict)

    @property
    def kept_seconds(self) -> float | None:
        """Seconds of steps whose result is part of the run as it stands."""
        seconds = float(self.training.sum(_KEPT_SECONDS).sum())
        return seconds if seconds > 0 else None

    @property
    def goodput(self) -> float | None:
        """The share of the time since the first start that was training whose result was kept."""
        wall, kept = self.facts.wall_seconds, self.kept_seconds
        return min(1.0, kept / wall) if wall and kept and self.facts.state != "not started" else None

    def axis(self, table: Table, axis: str) -> Column | None:
        """Where the pieces of a table lie on an x axis; None where nothing tells."""
        if table.num_pieces == 0:
            return None
        steps = table.mean(_STEP)
        if axis == STEPS:
            return steps
        training = self.training
        if training.num_pieces == 0:
            return None
        if axis == TOKENS:
            known = training.mean(_TOKENS) if _TOKENS in training.keys else None
        else:
            known = self._training_hours()
        if known is None or not np.isfinite(known).any():
            return None
        return known if table is training else self.place(steps, axis, known)

    def place(self, steps: Column, axis: str, known: Column | None = None) -> Column:
        """Where steps lie on an x axis, between those of the training lines."""
        if axis == STEPS:
            return steps
        known = self.axis(self.training, axis) if known is None else known
        if known is None:
            return np.full(len(steps), np.nan)
        good = np.isfinite(known)
        return np.interp(steps, np.append(0.0, self.training.mean(_STEP)[good]), np.append(0.0, known[good]))

    def _training_hours(self) -> Column | None:
        if self.hours_are_wall:
            return self.training.mean(_TIME) / 3600.0
        seconds = self.training.sum(_KEPT_SECONDS)
        return np.cumsum(seconds) / 3600.0 if seconds.any() else None


def read_record(run_dir: Path, *, smoothing_lines: int = 1) -> Record:
    """Raises ConfigError where there is no run. What is missing or torn is left out."""
    check_is_run(run_dir)
    config, history = read_config(run_dir), read_history(run_dir)
    metrics = _MetricsReader(smoothing_lines)
    for chunk in json_chunks(run_dir / METRICS_FILE):
        metrics.add(chunk)
    facts = facts_of(run_dir, config, history, metrics.last_line)
    record = Record(
        run_dir, config, history, facts, metrics.training, metrics.held_out,
        read_loads(json_lines(run_dir / "expert_loads.jsonl")), metrics.last_line, metrics.test, name=facts.name,
        hours_are_wall=_TIME in metrics.training.keys,
    )  # fmt: skip
    record.num_parameters, record.num_active_parameters = _num_parameters(config)
    return record


class _MetricsReader:
    def __init__(self, smoothing_lines: int) -> None:
        self.training, self.held_out = Table(), Table()
        self.last_line: dict[str, Any] = {}
        self.test: dict[str, Any] = {}
        self._smoothing_lines = smoothing_lines
        self._before: dict[str, Column] = {}
        self._first_time: float | None = None

    def add(self, lines: Sequence[dict[str, Any]]) -> None:
        training, held_out = [], []
        for line in lines:
            if any(key in line for key in TRAINING_KEYS):
                training.append(line)
            else:
                held_out.append(line)
                if number_at(line, "test_loss") is not None:
                    self.test = line
        self._add_to(self.training, training)
        self._add_to(self.held_out, held_out)

    def _add_to(self, table: Table, lines: Sequence[dict[str, Any]]) -> None:
        if not lines:
            return
        columns = to_columns(lines)
        steps = columns.pop(_STEP, np.full(len(lines), np.nan))
        good = np.isfinite(steps) & (steps >= 0)
        if not good.any():
            return
        steps = steps[good]
        columns = {
            key: column[good]
            for key, column in columns.items()
            if key not in NOT_DRAWN and np.isfinite(column[good]).any()
        }
        if table is self.training:
            self.last_line = lines[int(np.flatnonzero(good)[-1])]
            columns |= self._smoothed(columns)
        if _TIME in columns:
            if self._first_time is None:
                self._first_time = float(columns[_TIME][np.isfinite(columns[_TIME])][0])
            columns[_TIME] = columns[_TIME] - self._first_time
        for part in growing_runs(steps):
            cut = {key: column[part] for key, column in columns.items()}
            self._add_growing(table, steps[part], cut)

    def _add_growing(self, table: Table, steps: Column, columns: dict[str, Column]) -> None:
        columns[_STEP] = steps
        if "step_seconds" in columns:
            before = table.last_steps[table.last_steps < steps[0]]
            num_steps = np.diff(steps, prepend=before[-1] if len(before) else 0.0)
            columns[_KEPT_SECONDS] = num_steps * columns["step_seconds"]
        table.add(steps, columns)

    def _smoothed(self, columns: Mapping[str, Column]) -> dict[str, Column]:
        if self._smoothing_lines == 1:
            return {}
        found = {}
        for key, column in columns.items():
            if key in NOT_SMOOTHED:
                continue
            before = self._before.get(key, np.empty(0))
            found[key + _SMOOTH], self._before[key] = trailing_mean(column, before, self._smoothing_lines)
        return found


def smooth_key(key: str) -> str:
    return key + _SMOOTH


def _num_parameters(config: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """In total and of one token, where the configuration is one that this version understands."""
    from pydantic import ValidationError

    from megamoe.config.schema import Config
    from megamoe.topology.parameters import num_active_parameters, num_parameters, param_table

    try:
        valid = Config.model_validate({name: config[name] for name in ("model", "moe") if name in config})
        if valid.model.num_layers > 10_000 or valid.moe.num_experts > 1_000_000:
            return None, None
        table = param_table(valid.model, valid.moe)
        return num_parameters(table), num_active_parameters(table, valid.moe)
    except (ValidationError, MegamoeError, ValueError, ArithmeticError, KeyError, IndexError, TypeError):
        return None, None


def last_number(record: Record, key: str) -> float:
    """Of the last training line; NaN where it has none."""
    value = number_at(record.last_line, key)
    return math.nan if value is None else value

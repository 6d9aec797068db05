"""A run at a glance: read from the ends of its files in a fraction of a second, and told in a terminal's width."""

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamoe.report.facts import STATES, Facts, facts_of, read_config
from megamoe.report.history import History, read_history
from megamoe.report.values import bytes_text, count_text, duration, number_at, plain, section, short, text_at
from megamoe.runs.line_stream import last_json_lines
from megamoe.runs.metrics import METRICS_FILE

TAIL_BYTES = 256 << 10
LOADS_TAIL_BYTES = 4 << 20  # a line has every expert of every layer
HOT = 2.0  # an expert with so many times the mean load is named
_SPARKS = "▁▂▃▄▅▆▇█"
_COLOURS = {"running": "32", "finished": "36", "interrupted": "33", "requeued": "33", "not started": "33"}  # else red


@dataclass(frozen=True)
class Glance:
    """What is shown of a run."""

    facts: Facts
    history: History
    training: list[dict[str, Any]]  # the last lines
    validation: dict[str, Any]  # the last one
    loads: dict[str, Any]  # the last line of expert_loads.jsonl
    config: dict[str, Any]


def read_glance(run_dir: Path, now: float | None = None) -> Glance:
    config, history = read_config(run_dir), read_history(run_dir)
    lines = last_json_lines(run_dir / METRICS_FILE, TAIL_BYTES)
    training = [line for line in lines if number_at(line, "step") is not None and "step_seconds" in line]
    validation = next((line for line in reversed(lines) if number_at(line, "valid_loss") is not None), {})
    loads = next(iter(reversed(last_json_lines(run_dir / "expert_loads.jsonl", LOADS_TAIL_BYTES))), {})
    last = training[-1] if training else {}
    return Glance(facts_of(run_dir, config, history, last, now), history, training, validation, loads, config)


def status_tree(glance: Glance) -> dict[str, Any]:
    """For --json: the facts by name, and the last lines as they were written."""
    facts, history = glance.facts, glance.history
    return {
        "name": facts.name,
        "state": facts.state,
        "message": facts.message,
        "quiet_seconds": facts.quiet_seconds,
        "step": facts.step,
        "num_steps": facts.num_steps,
        "tokens": facts.tokens,
        "num_tokens": facts.num_tokens,
        "seconds_left": facts.seconds_left,
        "checkpoint_step": facts.checkpoint_step,
        "checkpoint_age_seconds": facts.checkpoint_age_seconds,
        "num_ranks": facts.num_ranks,
        "num_hosts": facts.num_hosts,
        "num_attempts": len(history.attempts),
        "num_restarts": history.num_restarts,
        "lost_steps": history.lost_steps,
        "training": finite(glance.training[-1]) if glance.training else None,
        "validation": finite(glance.validation) or None,
        "dead_experts": [list(each) for each in _dead_and_hot(glance.loads)[0]],
        "hot_experts": [list(each) for each in _dead_and_hot(glance.loads)[1]],
        "events": finite(history.events[-10:]),
    }


def finite(tree: Any) -> Any:
    """The same without the infinities that a file may spell as 1e999: JSON has none."""
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def status_text(glance: Glance, width: int, *, colour: bool = False, unicode: bool = True) -> str:
    """Lines of at most `width` characters."""
    rows = [
        _headline(glance.facts, colour),
        _progress(glance.facts, width, unicode),
        *_figures(glance, width, unicode),
        _checkpoint(glance.facts),
        _attempts(glance.history),
        *_experts(glance.loads),
        *_events(glance.history),
    ]
    return "".join(_cut(row, width) + "\n" for row in rows if row)


def _headline(facts: Facts, colour: bool) -> str:
    state = STATES[facts.state]
    if colour:
        state = f"\x1b[1;{_COLOURS.get(facts.state, '31')}m{state}\x1b[0m"
    quiet = f", last line {duration(facts.quiet_seconds)} ago" if facts.quiet_seconds is not None else ""
    ranks = f", {facts.num_ranks} ranks" if facts.num_ranks else ""
    hosts = f" on {facts.num_hosts} hosts" if facts.num_ranks and (facts.num_hosts or 0) > 1 else ""
    message = f": {facts.message}" if facts.message else ""
    return f"{facts.name}: {state}{quiet}{ranks}{hosts}{message}"


def _progress(facts: Facts, width: int, unicode: bool) -> str:
    share = facts.share_done
    if share is None:
        return f"step {facts.step:,}"
    full, empty = ("█", "░") if unicode else ("#", ".")
    length = max(8, min(40, width - 52))
    filled = round(length * share)
    text = f"{full * filled}{empty * (length - filled)} {share:.1%}  step {facts.step:,} of {facts.num_steps:,}"
    if facts.tokens is not None:
        of = f" of {count_text(facts.num_tokens)}" if facts.num_tokens is not None else ""
        text += f"  tokens {count_text(facts.tokens)}{of}"
    if facts.seconds_left:
        text += f"  {duration(facts.seconds_left)} of training left"
    return text


def _figures(glance: Glance, width: int, unicode: bool) -> list[str]:
    """One line each: name, value, and how it went lately."""
    last = glance.training[-1] if glance.training else {}
    rows = []
    for key, label, show in (
        ("loss", "loss", lambda value: f"{value:.4f}"),
        ("lm_loss", "language loss", lambda value: f"{value:.4f}"),
        ("grad_norm", "gradient norm", short),
        ("tokens_per_second", "tokens/s", count_text),
        ("flops_utilization", "of peak FLOP/s", lambda value: f"{value:.1%}"),
        ("step_seconds", "a step", duration),
        ("memory_bytes", "memory, fullest", bytes_text),
        ("dropped_fraction", "dropped", lambda value: f"{value:.2%}"),
        ("expert_load_max_over_mean", "load, max/mean", lambda value: f"{value:.2f}"),
    ):
        value = number_at(last, key)
        if value is None:
            if key in last.get("nonfinite", ()) if isinstance(last.get("nonfinite"), list) else False:
                rows.append(f"  {label:<16} not finite")
            continue
        spark = sparkline([number_at(line, key) for line in glance.training], min(32, width - 34), unicode)
        rows.append(f"  {label:<16} {show(value):>12}  {spark}".rstrip())
    valid = number_at(glance.validation, "valid_loss")
    if valid is not None:
        at = number_at(glance.validation, "step")
        after = f"  after step {at:,.0f}" if at is not None else ""
        rows.append(f"  {'validation loss':<16} {valid:>12.4f}{after}")
    return rows


def sparkline(values: Sequence[float | None], length: int, unicode: bool) -> str:
    """The last values as little bars, the least the lowest; means of neighbours where there are more than fit."""
    known = [value for value in values if value is not None]
    if len(known) < 3 or length < 3 or not unicode:
        return ""
    per_bar = math.ceil(len(known) / length)
    known = known[len(known) % per_bar :]
    bars = [sum(known[at : at + per_bar]) / per_bar for at in range(0, len(known), per_bar)]
    least, largest = min(bars), max(bars)
    scale = (len(_SPARKS) - 1) / (largest - least) if largest > least else 0.0
    return "".join(_SPARKS[round((bar - least) * scale)] for bar in bars)


def _checkpoint(facts: Facts) -> str:
    if facts.checkpoint_step is None:
        return "  checkpoint       none yet"
    age = duration(facts.checkpoint_age_seconds or 0.0)
    return f"  checkpoint       step {facts.checkpoint_step:,}, {age} old"


def _attempts(history: History) -> str:
    if not history.attempts:
        return ""
    restarts, lost = history.num_restarts, history.lost_steps
    text = f"  attempts         {len(history.attempts)}, {restarts} restart{'' if restarts == 1 else 's'}"
    return text + (f", {lost:,} steps done twice" if lost else "")


def _experts(loads: Mapping[str, Any]) -> list[str]:
    dead, hot = _dead_and_hot(loads)
    rows = []
    for label, found in (("no tokens", dead), ("hot", hot)):
        if found:
            names = ", ".join(
                f"{layer}/{expert}" + (f" {share:.1f}x" if label == "hot" else "") for layer, expert, share in found[:6]
            )
            more = f" and {len(found) - 6} more" if len(found) > 6 else ""
            rows.append(f"  {label:<16} layer/expert {names}{more}")
    return rows


def _dead_and_hot(loads: Mapping[str, Any]) -> tuple[list[tuple[str, int, float]], list[tuple[str, int, float]]]:
    """(layer, expert, load over the layer's mean) of experts that nobody chose, and of the fullest ones."""
    dead, hot = [], []
    for layer, row in section(loads, "layers").items():
        numbers = [each for each in row if isinstance(each, int | float) and each >= 0] if isinstance(row, list) else []
        mean = sum(numbers) / len(numbers) if numbers else 0.0
        if not mean or len(numbers) != len(row):
            continue
        for expert, number in enumerate(numbers):
            if number == 0:
                dead.append((plain(str(layer))[:20], expert, 0.0))
            elif number / mean >= HOT:
                hot.append((plain(str(layer))[:20], expert, round(number / mean, 2)))
    return dead, sorted(hot, key=lambda each: -each[2])


def _events(history: History) -> list[str]:
    rows = []
    for event in history.events[-5:]:
        moment = number_at(event, "time")
        rows.append(f"  {clock(moment):<16} {plain(event['kind'])}: {text_at(event, 'message')}")
    return rows


def clock(seconds: float | None) -> str:
    """Local time of a moment since 1970."""
    try:
        return time.strftime("%m-%d %H:%M:%S", time.localtime(seconds)) if seconds is not None else ""
    except (OverflowError, ValueError, OSError):
        return ""


def _cut(row: str, width: int) -> str:
    """Cut to `width` visible characters; the escapes of our own colours take none."""
    visible, kept, index = 0, "", 0
    while index < len(row):
        if row[index] == "\x1b":
            end = row.index("m", index) + 1
            kept += row[index:end]
            index = end
            continue
        if visible == width - 1 and len(row) - index > 1 and "\x1b" not in row[index:]:
            return kept + "…"
        if visible >= width:
            break
        kept += row[index]
        visible += 1
        index += 1
    return kept + ("\x1b[0m" if "\x1b" in kept and not kept.endswith("\x1b[0m") and "\x1b" in row else "")


def terminal_width() -> int:
    try:
        return max(40, os.get_terminal_size().columns)
    except OSError:
        return 100

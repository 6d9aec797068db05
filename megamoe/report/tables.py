"""The words of a page: key facts, attempts, events, and the settings in which runs differ."""

import math
import time
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from megamoe.report.facts import STATES
from megamoe.report.history import Attempt
from megamoe.report.record import Record
from megamoe.report.values import (
    bytes_text,
    count_at,
    count_text,
    duration,
    number_at,
    plain,
    section,
    short,
    text_at,
)

SHOWN_EVENTS = 400
_STATE_CLASS = {
    "running": "good", "finished": "good", "interrupted": "wait", "requeued": "wait", "stale": "wait",
    "not started": "soft",
}  # fmt: skip


def facts_of_record(record: Record) -> list[tuple[str, str, str]]:
    """(name, value, what more there is to say) in the order of their weight; those that nothing tells are left out."""
    facts, last = record.facts, record.last_line
    more = STATES[facts.state].partition(", ")[2]
    found = [("State", facts.state, facts.message or ", ".join(part for part in (more, _quiet(record)) if part))]
    steps = f"of {facts.num_steps:,}" if facts.num_steps else ""
    share = f" · {facts.share_done:.1%}" if facts.share_done is not None else ""
    found.append(("Step", f"{facts.step:,}", steps + share))
    if facts.tokens is not None:
        left = None if facts.num_tokens is None else max(0.0, facts.num_tokens - facts.tokens)
        more = f"of {count_text(facts.num_tokens or 0.0)}" if left is not None else ""
        more += f", {count_text(left)} left" if left else ""
        found.append(("Tokens", count_text(facts.tokens), more))
    if facts.seconds_left:
        found.append(("Time left", duration(facts.seconds_left), "of training, at the last line's speed"))
    loss = number_at(last, "lm_loss")
    if loss is not None:
        found.append(("Training loss", f"{loss:.4f}", f"perplexity {short(math.exp(min(loss, 700)))}"))
    found += _validation(record)
    speed, ranks = number_at(last, "tokens_per_second"), facts.num_ranks
    if speed is not None:
        more = f"{count_text(speed / ranks)} a rank" if ranks else ""
        found.append(("Tokens a second", count_text(speed), more))
    utilization = number_at(last, "flops_utilization")
    if utilization is not None:
        found.append(("Model FLOP/s", f"{utilization:.1%}", "of the peak"))
    if record.goodput is not None and facts.wall_seconds:
        more = f"of {duration(facts.wall_seconds)} was training that was kept"
        found.append(("Goodput", f"{record.goodput:.1%}", more))
    if record.history.attempts:
        restarts, lost = record.history.num_restarts, record.history.lost_steps
        found.append(("Restarts", f"{restarts}", f"{lost:,} steps done again" if lost else "no step done again"))
    memory = number_at(last, "memory_bytes")
    if memory is not None:
        found.append(("Peak memory", bytes_text(memory), "of the fullest rank"))
    if facts.checkpoint_step is not None:
        age = duration(facts.checkpoint_age_seconds or 0.0)
        found.append(("Checkpoint", f"step {facts.checkpoint_step:,}", f"{age} old"))
    return [*found, *_model(record)]


def _validation(record: Record) -> list[tuple[str, str, str]]:
    found = []
    table = record.held_out
    if "valid_loss" in table.keys:
        values = table.mean("valid_loss")
        good = values[~(values != values)]  # NaN is not itself
        if len(good):
            found.append(("Validation loss", f"{good[-1]:.4f}", f"least {good.min():.4f}"))
    test = number_at(record.test, "test_loss")
    if test is not None:
        found.append(("Test loss", f"{test:.4f}", f"perplexity {short(math.exp(min(test, 700)))}"))
    return found


def _model(record: Record) -> list[tuple[str, str, str]]:
    model, moe, parallel = (section(record.config, name) for name in ("model", "moe", "parallel"))
    found = []
    if record.num_parameters is not None and record.num_active_parameters is not None:
        layers, experts = count_at(model, "num_layers"), count_at(moe, "num_experts")
        shape = f"{layers} layers" + (f", {experts} experts" if experts else "")
        active = f"{count_text(record.num_active_parameters)} a token, " if experts else ""
        found.append(("Parameters", count_text(record.num_parameters), active + shape))
    sizes = [
        (f"{prefix}{count_at(parallel, key + '_parallel_size')}")
        for prefix, key in (("TP", "tensor"), ("PP", "pipeline"), ("EP", "expert"))
        if (count_at(parallel, key + "_parallel_size") or 1) > 1
    ]
    ranks, zero = record.facts.num_ranks, count_at(parallel, "zero_stage")
    if parallel:
        name = " × ".join(sizes) if sizes else "data parallel"
        more = [f"{ranks} ranks"] if ranks else []
        more += [f"ZeRO-{zero}"] if zero is not None else []
        precision = text_at(section(record.config, "run"), "precision")
        found.append(("Layout", name, ", ".join([*more, precision] if precision else more)))
    return found


def _quiet(record: Record) -> str:
    quiet = record.facts.quiet_seconds
    return f"last written {duration(quiet)} ago" if quiet is not None and record.facts.state != "finished" else ""


def cards(record: Record) -> str:
    """The facts of one run, large."""
    state = _STATE_CLASS.get(record.facts.state, "bad")
    parts = []
    for name, value, more in facts_of_record(record):
        kind = f' class="{state}"' if name == "State" else ""
        bar = ""
        if name == "Step" and record.facts.share_done is not None:
            share = 100 * record.facts.share_done
            bar = f'<svg class="bar" viewBox="0 0 100 3" preserveAspectRatio="none" aria-hidden="true"><rect class="of" width="100" height="3"/><rect width="{share:.1f}" height="3"/></svg>'  # noqa: E501
        note = f"<small>{escape(more)}</small>" if more else ""
        parts.append(f"<div><dt>{escape(name)}</dt><dd{kind}>{escape(value)}</dd>{bar}{note}</div>")
    return f'<dl class="cards">{"".join(parts)}</dl>'


def facts_table(records: Sequence[Record]) -> str:
    """The facts of several runs beside each other."""
    columns = [{name: (value, more) for name, value, more in facts_of_record(record)} for record in records]
    names = list(dict.fromkeys(name for column in columns for name in column))
    head = "".join(
        f'<th scope="col"><span class="swatch c{index % 8}"></span>{escape(record.name)}</th>'
        for index, record in enumerate(records)
    )
    rows = []
    for name in names:
        cells = []
        for column, record in zip(columns, records, strict=True):
            value, more = column.get(name, ("–", ""))
            kind = f' class="{_STATE_CLASS.get(record.facts.state, "bad")}"' if name == "State" else ""
            note = f"<small>{escape(more)}</small>" if more else ""
            cells.append(f"<td><b{kind}>{escape(value)}</b>{note}</td>")
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>')
    return f'<div class="scroll"><table class="facts"><thead><tr><td></td>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'  # noqa: E501


def moment(seconds: float | None) -> str:
    """UTC."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds)) if seconds is not None else ""
    except (OverflowError, ValueError, OSError):
        return ""


def attempts_section(records: Sequence[Record]) -> str:
    parts = []
    for record in records:
        attempts = record.history.attempts
        if not attempts:
            continue
        shown = attempts if len(attempts) <= SHOWN_EVENTS else [attempts[0], *attempts[-SHOWN_EVENTS:]]
        rows = "".join(_attempt_row(attempt) for attempt in shown)
        head = ("attempt", "began (UTC)", "took", "from step", "to step", "done again", "hosts", "how it ended")
        parts.append(_named(record, records) + _table(head, rows))
    return f'<section id="attempts"><h2>Attempts</h2>{"".join(parts)}</section>' if parts else ""


def _attempt_row(attempt: Attempt) -> str:
    took = attempt.ended - attempt.started if attempt.ended is not None and attempt.started is not None else None
    hosts = ", ".join(attempt.hosts[:4]) + (f" and {len(attempt.hosts) - 4} more" if len(attempt.hosts) > 4 else "")
    verdict = f" ({attempt.verdict})" if attempt.verdict else ""
    ended = attempt.outcome + verdict + (f": {attempt.reason}" if attempt.reason else "")
    cells = (
        str(attempt.number), moment(attempt.started), duration(took) if took is not None else "",
        "" if attempt.from_step is None else f"{attempt.from_step:,}",
        "" if attempt.to_step is None else f"{attempt.to_step:,}",
        f"{attempt.lost_steps:,}" if attempt.lost_steps else "", hosts, ended or "no end on record",
    )  # fmt: skip
    return _row(cells, numbers=(0, 2, 3, 4, 5))


def events_section(records: Sequence[Record]) -> str:
    parts = []
    for record in records:
        events = record.history.events
        if not events:
            continue
        shown = events[-SHOWN_EVENTS:]
        rows = "".join(_event_row(event) for event in reversed(shown))
        num_all = len(events) + record.history.num_left_out
        note = f'<p class="soft">The last {len(shown):,} of {num_all:,} events.</p>' if num_all > len(shown) else ""
        parts.append(_named(record, records) + note + _table(("time (UTC)", "what", "step", ""), rows, "events"))
    return f'<section id="events"><h2>Events, latest first</h2>{"".join(parts)}</section>' if parts else ""


def _event_row(event: Mapping[str, Any]) -> str:
    kind, step = plain(event["kind"]), count_at(event, "step")
    cells = (moment(number_at(event, "time")), kind, "" if step is None else f"{step:,}", _event_text(event))
    is_bad = kind in ("failed", "hang", "stopped", "save_failed", "give_up", "spike", "divergence")
    return _row(cells, numbers=(2,), kind=' class="bad"' if is_bad else "")


def _event_text(event: Mapping[str, Any]) -> str:
    """The message, and the details that say where."""
    details = [
        f"{name} {plain(str(event[name]))}"
        for name in ("rank", "host", "phase", "to_step", "skipped_samples", "seconds", "world_size")
        if isinstance(event.get(name), str | int | float) and not isinstance(event.get(name), bool)
    ]
    message = text_at(event, "message")
    return f"{message} ({', '.join(details)})" if message and details else message or ", ".join(details)


def settings_section(records: Sequence[Record]) -> str:
    """The settings of one run; of several those in which they differ."""
    settings = [_flat(record.config) for record in records]
    keys = sorted({key for each in settings for key in each})
    if len(records) == 1:
        rows = "".join(_row((key, settings[0][key])) for key in keys)
        table = _table(("setting", "value"), rows, "settings")
        return f'<section id="settings"><h2>Settings</h2><details><summary>{len(keys)} settings</summary>{table}</details></section>' if keys else ""  # noqa: E501
    differing = [key for key in keys if len({each.get(key) for each in settings}) > 1 and key != "run.dir"]
    if not differing:
        return '<section id="settings"><h2>Settings</h2><p>The runs have equal settings.</p></section>' if keys else ""
    rows = "".join(_row((key, *(each.get(key, "–") for each in settings))) for key in differing)
    head = ("setting", *(record.name for record in records))
    return f'<section id="settings"><h2>Settings that differ</h2>{_table(head, rows, "settings")}</section>'


def _flat(config: Mapping[str, Any]) -> dict[str, str]:
    """section.key -> its value as text. Deeper groups stay one value."""
    found = {}
    for name, group in list(config.items())[:100]:
        for key, value in list(group.items())[:500] if isinstance(group, dict) else ():
            found[plain(f"{name}.{key}")] = plain(str(value))
    return found


def _named(record: Record, records: Sequence[Record]) -> str:
    return f"<h3>{escape(record.name)}</h3>" if len(records) > 1 else ""


def _table(head: Sequence[str], rows: str, kind: str = "") -> str:
    cells = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    head_row = f"<thead><tr>{cells}</tr></thead>"
    return f'<div class="scroll"><table class="{kind}">{head_row}<tbody>{rows}</tbody></table></div>'


def _row(cells: Sequence[str], *, numbers: Sequence[int] = (), kind: str = "") -> str:
    classes = [' class="n"' if index in numbers else "" for index in range(len(cells))]
    inside = "".join(f"<td{of}>{escape(cell)}</td>" for of, cell in zip(classes, cells, strict=True))
    return f"<tr{kind}>{inside}</tr>"

"""The page: header, controls, pictures by group, maps, tables; and the data that its script redraws them from."""

import time
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

from megamoe.pictures.colours import LIGHT, LOG2_RANGE
from megamoe.pictures.page import page
from megamoe.pictures.ticks import Scale
from megamoe.report import chart as drawing
from megamoe.report.build import axes_of, chart_of, phase_chart, x_scale_of
from megamoe.report.chart import Chart, compact, data_of, draw
from megamoe.report.curves import groups_of
from megamoe.report.heat import heat_section
from megamoe.report.marks import draw_marks, key_of_marks, marks_data, marks_of
from megamoe.report.record import HOURS, STEPS, TOKENS, Record
from megamoe.report.tables import (
    attempts_section,
    cards,
    events_section,
    facts_table,
    moment,
    settings_section,
)

SPARSE_POINTS_DIGITS = 7  # of places on an x axis


def html_report(records: Sequence[Record], *, smoothing_lines: int = 1) -> str:
    """The page of one run, or of several over each other."""
    axes = axes_of(records)
    axis = TOKENS if len(records) > 1 and TOKENS in axes else STEPS
    x_scale, names = x_scale_of(records, axis), axis_names(records)
    marks, totals = marks_of(records)
    sections, charts = _chart_sections(records, axis, x_scale, names[axis])
    num_shown = {kind: sum(mark.kind == kind for mark in marks) for kind in totals}
    names_of_runs = ", ".join(record.name for record in records)
    title = names_of_runs if len(records) == 1 else f"{len(records)} runs: {names_of_runs}"
    facts = cards(records[0]) if len(records) == 1 else facts_table(records)
    experts, attempts = heat_section(records), attempts_section(records)
    events, settings = events_section(records), settings_section(records)
    written = f"Written {moment(time.time())} UTC from the files of the run{'s' if len(records) > 1 else ''}."
    body = "\n".join(
        [
            f'<header><h1>{escape(title)}</h1><p class="soft">{written}</p></header>',
            facts,
            _navigation([*[(name, text) for name, text, _ in sections],
                         *([("experts", "Load of experts")] if experts else []),
                         *([("attempts", "Attempts")] if attempts else []), *([("events", "Events")] if events else []),
                         *([("settings", "Settings")] if settings else [])]),
            _controls(records, axes, axis, names, bool(marks)) if charts else "<p>No metrics are on record yet.</p>",
            key_of_marks(totals, num_shown) if charts else "",
            _note(records, smoothing_lines) if charts else "",
            _definitions(draw_marks(marks, records, axis, x_scale, len(LIGHT))),
            *[markup for _, _, markup in sections],
            experts, attempts, events, settings,
        ]
    )  # fmt: skip
    style, script = (files("megamoe.report").joinpath(name).read_text("utf-8") for name in ("report.css", "report.js"))
    data = _data(records, charts, axes, axis, names) | {"marks": marks_data(marks, records)}
    return page(f"{title} · megamoe report", body, style=style, script=script, data=data)


def axis_names(records: Sequence[Record]) -> dict[str, str]:
    wall = all(record.hours_are_wall for record in records if record.training.num_pieces)
    return {STEPS: "step", TOKENS: "tokens", HOURS: "hours since the start" if wall else "hours of training"}


def _chart_sections(
    records: Sequence[Record], axis: str, x_scale: Scale, x_name: str
) -> tuple[list[tuple[str, str, str]], list[Chart]]:
    """(id, title, markup) of each group of curves, and all charts."""
    sections, charts = [], []
    for group in groups_of(records):
        found = [made for curve in group.curves if (made := chart_of(records, curve, axis)) is not None]
        if group.name == "speed":
            phases = [phase_chart(records, run, axis) for run in range(len(records))]
            found += [made for made in phases if made is not None]
        if found:
            figures = "".join(_figure(made, x_scale, x_name) for made in found)
            head = f'<section id="{group.name}"><h2>{escape(group.title)}</h2>'
            sections.append((group.name, group.title, f'{head}<div class="charts">{figures}</div></section>'))
            charts += found
    return sections, charts


def _figure(chart: Chart, x_scale: Scale, x_name: str) -> str:
    buttons = _legend(chart)
    log = "log scale" if chart.scale.is_log else ""
    unit = ", ".join(part for part in (chart.unit, log) if part)
    return (
        f'<figure data-chart="{escape(chart.name)}"><figcaption><h3>{escape(chart.title)}</h3>'
        f'<span class="soft">{escape(unit)}</span></figcaption>'
        f'{f"<div class=legend>{buttons}</div>" if buttons else ""}{draw(chart, x_scale, x_name, "marks")}</figure>'
    )


def _legend(chart: Chart) -> str:
    """A button a metric; with several runs colours are theirs, and named at the top."""
    shown = {line.metric: line for line in reversed(chart.lines)}
    is_of_one_run = len({line.run for line in chart.lines}) == 1
    if len(shown) < 2:
        return ""
    parts = []
    for metric, line in sorted(shown.items()):
        if line.is_area:
            swatch = '<rect class="swatch-area" width="22" height="8" rx="2"/>'
        else:
            dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
            swatch = f'<path class="swatch-line"{dash} d="M2 4H20"/>'
        colour = line.colour if is_of_one_run else "ink"
        parts.append(
            f'<button type="button" aria-pressed="true" data-metric="{metric}"><svg class="{colour}" '
            f'viewBox="0 0 22 8" aria-hidden="true">{swatch}</svg>{escape(line.metric_name)}</button>'
        )
    return "".join(parts)


def _navigation(places: Sequence[tuple[str, str]]) -> str:
    links = "".join(f'<a href="#{name}">{escape(title)}</a>' for name, title in places)
    return f'<nav aria-label="Parts of this page">{links}</nav>'


def _controls(
    records: Sequence[Record], axes: Sequence[str], axis: str, names: dict[str, str], has_marks: bool
) -> str:
    choices = "".join(
        f'<label><input type="radio" name="axis" value="{each}"{" checked" if each == axis else ""}>'
        f"<span>{escape(names[each])}</span></label>"
        for each in axes
    )
    parts = [f'<fieldset class="seg js-only"><legend>x axis</legend>{choices}</fieldset>']
    if has_marks:
        parts.append('<label class="js-only"><input type="checkbox" id="show-marks" checked> marks</label>')
    if len(records) > 1:
        buttons = "".join(
            f'<button type="button" aria-pressed="true" data-run="{index}"><svg class="c{index % len(LIGHT)}" '
            f'viewBox="0 0 22 8" aria-hidden="true"><path class="swatch-line" d="M2 4H20"/></svg>'
            f"{escape(record.name)}</button>"
            for index, record in enumerate(records)
        )
        parts.append(f'<div class="legend runs">{buttons}</div>')
    return f'<div class="controls">{"".join(parts)}</div>'


def _note(records: Sequence[Record], smoothing_lines: int) -> str:
    """How the curves were made from the lines, where that is not one point a line."""
    parts = []
    longest = max((record.training.lines_per_piece for record in records), default=1)
    if longest > 1:
        parts.append(f"Up to {longest:,} lines of metrics are one point: their mean, their range shaded.")
    if smoothing_lines > 1:
        parts.append(f"Curves are means of the last {smoothing_lines:,} lines, the range of the lines shaded.")
    return f'<p class="note">{" ".join(parts)}</p>' if parts else ""


def _definitions(marks: str) -> str:
    width, height = drawing.RIGHT_EDGE - drawing.LEFT, drawing.BOTTOM_EDGE - drawing.TOP + 4
    return (
        '<svg width="0" height="0" aria-hidden="true" style="position:absolute"><defs><clipPath id="plot">'
        f'<rect x="{drawing.LEFT}" y="{drawing.TOP - 2}" width="{width + 3}" height="{height}"/></clipPath>'
        f'<g id="marks">{marks}</g></defs></svg>'
    )


def _data(
    records: Sequence[Record], charts: Sequence[Chart], axes: Sequence[str], axis: str, names: dict[str, str]
) -> dict[str, Any]:
    runs = [
        [
            {each: compact(record.axis(table, each), SPARSE_POINTS_DIGITS) for each in axes}
            for table in (record.training, record.held_out)
        ]
        for record in records
    ]
    return {
        "box": {
            "left": drawing.LEFT, "right": drawing.RIGHT_EDGE, "top": drawing.TOP, "bottom": drawing.BOTTOM_EDGE,
            "width": drawing.WIDTH,
        },
        "axes": list(axes), "axis": axis, "names": names, "heat": LOG2_RANGE,
        "ends": {each: x_scale_of(records, each).high for each in axes},
        "runs": runs, "charts": {chart.name: data_of(chart) for chart in charts},
    }  # fmt: skip

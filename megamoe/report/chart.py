"""A picture of curves as SVG, complete without a script; what a script needs to redraw it over another x axis."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from megamoe.pictures.ticks import Scale, linear_ticks, make_scale, scale_ticks
from megamoe.report.curves import BYTES, COUNT, FLOPS, PERCENT, SECONDS
from megamoe.report.table import Column
from megamoe.report.values import duration, short

WIDTH, HEIGHT = 560, 284
LEFT, RIGHT, TOP, BOTTOM = 58, 24, 20, 38
RIGHT_EDGE, BOTTOM_EDGE = WIDTH - RIGHT, HEIGHT - BOTTOM
X_TICKS, Y_TICKS = 7, 6


@dataclass(frozen=True)
class Line:
    """One curve. `low` and `high` are the range of the values behind each mean, None where each is one value."""

    run: int
    table: int  # 0: over the run's training lines, 1: over its lines of validation
    metric: int  # its place among the metrics of the chart, whose name is in the legend
    metric_name: str
    label: str  # with the run's name, where there are several
    colour: str  # a class of the style sheet
    dash: str
    x: Column
    y: Column
    low: Column | None = None
    high: Column | None = None
    has_dots: bool = False  # few points: each is shown
    is_area: bool = False  # filled from low to high; no line


@dataclass(frozen=True)
class Chart:
    name: str
    title: str
    unit: str
    kind: str
    scale: Scale
    lines: Sequence[Line]


def scale_of(lines: Sequence[Line], *, is_log: bool, from_zero: bool) -> Scale:
    """Holds every mean and, unless they would squeeze them flat, the ranges behind the means."""
    means = np.concatenate([line.y for line in lines])
    ranges = [edge for line in lines for edge in (line.low, line.high) if edge is not None]
    means = means[np.isfinite(means)]
    if is_log and (means <= 0).any():
        is_log = False
    low, high = float(means.min()), float(means.max())
    if is_log and high / 3.0 < low:
        is_log = False
    edges = np.concatenate([*ranges, means])
    edges = edges[np.isfinite(edges) & ((edges > 0) | (not is_log))]
    if is_log:
        reach = math.sqrt(high) / math.sqrt(low)
        low, high = max(low / reach, float(edges.min())), min(high * reach, float(edges.max()))
    else:
        reach = high - low
        low, high = max(low - reach, float(edges.min())), min(high + reach, float(edges.max()))
    return make_scale(low, high, is_log=is_log, from_zero=from_zero)


def draw(chart: Chart, x_scale: Scale, x_name: str, marks_id: str | None) -> str:
    """The SVG. Marks are drawn once a page, under `marks_id`, and shown in every picture."""
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{escape(describe(chart))}">',
        _y_axis(chart),
        f'<g class="x">{x_ticks(x_scale)}</g>',
        f'<text class="xname" x="{RIGHT_EDGE}" y="{HEIGHT - 5}" text-anchor="end">{escape(x_name)}</text>',
    ]
    if marks_id is not None:
        parts.append(f'<use href="#{escape(marks_id)}"/>')
    parts.append('<g clip-path="url(#plot)">')
    for index, line in enumerate(chart.lines):
        parts.append(f'<g class="s {line.colour}" data-line="{index}">')
        if line.low is not None and line.high is not None:
            shape = "area" if line.is_area else "range"
            parts.append(f'<path class="{shape}" d="{area_path(line, x_scale, chart.scale)}"/>')
        if not line.is_area:
            dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
            dots = " dots" if line.has_dots else ""
            parts.append(f'<path class="line{dots}"{dash} d="{line_path(line.x, line.y, x_scale, chart.scale)}"/>')
            if line.has_dots:
                parts.append(f'<path class="dot" d="{dots_path(line.x, line.y, x_scale, chart.scale)}"/>')
        parts.append("</g>")
    parts.append('</g><line class="cursor" hidden=""/></svg>')
    return "".join(parts)


def describe(chart: Chart) -> str:
    """In words, for those who cannot see it."""
    texts = []
    for line in chart.lines[:8]:
        known = line.y[np.isfinite(line.y)]
        if line.is_area:
            shares = (line.high - line.low)[np.isfinite(line.y)] if line.low is not None else known
            texts.append(f"{line.label} on average {value_text(float(shares.mean()), chart.kind)}")
        elif len(known):
            first, last = value_text(float(known[0]), chart.kind), value_text(float(known[-1]), chart.kind)
            texts.append(f"{line.label} from {first} to {last}")
    unit = f" ({chart.unit})" if chart.unit else ""
    return f"{chart.title}{unit}: {'; '.join(texts)}"


def x_of(value: float, scale: Scale) -> float:
    return LEFT + (RIGHT_EDGE - LEFT) * scale(value)


def y_of(value: float, scale: Scale) -> float:
    """Kept near the picture: what is far outside would make numbers that no one can draw."""
    return BOTTOM_EDGE - (BOTTOM_EDGE - TOP) * min(max(scale(value), -3.0), 4.0)


def line_path(x: Column, y: Column, x_scale: Scale, y_scale: Scale) -> str:
    parts, pen_is_down = [], False
    for at, value in zip(x.tolist(), y.tolist(), strict=True):
        if not (math.isfinite(at) and math.isfinite(value)):
            pen_is_down = False
            continue
        parts.append(f"{'L' if pen_is_down else 'M'}{x_of(at, x_scale):.1f} {y_of(value, y_scale):.1f}")
        pen_is_down = True
    return "".join(parts)


def dots_path(x: Column, y: Column, x_scale: Scale, y_scale: Scale) -> str:
    """Lines of no length, which round caps make dots."""
    return "".join(
        f"M{x_of(at, x_scale):.1f} {y_of(value, y_scale):.1f}h0"
        for at, value in zip(x.tolist(), y.tolist(), strict=True)
        if math.isfinite(at) and math.isfinite(value)
    )


def area_path(line: Line, x_scale: Scale, y_scale: Scale) -> str:
    assert line.low is not None and line.high is not None
    known = np.isfinite(line.low) & np.isfinite(line.high) & np.isfinite(line.x)
    x, low, high = line.x[known].tolist(), line.low[known].tolist(), line.high[known].tolist()
    there = [f"{x_of(at, x_scale):.1f} {y_of(value, y_scale):.1f}" for at, value in zip(x, high, strict=True)]
    back = [f"{x_of(at, x_scale):.1f} {y_of(value, y_scale):.1f}" for at, value in zip(x, low, strict=True)]
    return "M" + "L".join([*there, *reversed(back)]) + "Z" if there else ""


def x_ticks(scale: Scale) -> str:
    parts = []
    for value in linear_ticks(scale.low, scale.high, X_TICKS):
        at, text = f"{x_of(value, scale):.1f}", escape(tick_text(value, COUNT))
        parts.append(f'<path d="M{at} {BOTTOM_EDGE}v4"/>')
        parts.append(f'<text x="{at}" y="{BOTTOM_EDGE + 16}" text-anchor="middle">{text}</text>')
    return "".join(parts)


def y_ticks(chart: Chart) -> list[float]:
    unit = 2.0**30 if chart.kind == BYTES else 1.0  # round numbers of GiB, not of bytes
    scale = Scale(chart.scale.low / unit, chart.scale.high / unit, chart.scale.is_log)
    return [unit * value for value in scale_ticks(scale, Y_TICKS)]


def _y_axis(chart: Chart) -> str:
    parts = ['<g class="y">']
    for value in y_ticks(chart):
        at = f"{y_of(value, chart.scale):.1f}"
        parts.append(f'<path d="M{LEFT} {at}H{RIGHT_EDGE}"/>')
        text = escape(tick_text(value, chart.kind))
        parts.append(f'<text x="{LEFT - 6}" y="{float(at) + 4:.1f}" text-anchor="end">{text}</text>')
    return "".join([*parts, f'<path class="base" d="M{LEFT} {BOTTOM_EDGE}H{RIGHT_EDGE}"/></g>'])


def tick_text(value: float, kind: str) -> str:
    if kind == PERCENT:
        return f"{100 * value:.4g}%"
    if kind == BYTES:
        return f"{value / 2**30:.4g} GiB"
    if kind == SECONDS:
        return f"{value:.4g} s"
    text = short(round(value, 12))
    return text.replace("G", "B") if kind != FLOPS else text


def value_text(value: float, kind: str) -> str:
    if kind == SECONDS:
        return duration(value)
    return tick_text(float(f"{value:.5g}"), kind)


def compact(values: Column | None, digits: int = 6) -> list[float | None] | None:
    """For JSON: as many digits as a picture can show; NaN as null."""
    if values is None:
        return None
    found: list[float | None] = []
    for value in values.tolist():
        if not math.isfinite(value):
            found.append(None)
            continue
        rounded = float(f"{value:.{digits}g}")
        found.append(int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded)
    return found


def data_of(chart: Chart) -> dict[str, Any]:
    """What the script needs to redraw it and to tell its values."""
    scale = chart.scale
    return {
        "kind": chart.kind,
        "y": [scale.low, scale.high, int(scale.is_log)],
        "lines": [
            {
                "run": line.run, "table": line.table, "metric": line.metric, "label": line.label, "y": compact(line.y),
                "low": compact(line.low), "high": compact(line.high), "area": int(line.is_area),
            }
            for line in chart.lines
        ],
    }  # fmt: skip

"""From records to charts: which lines each picture holds, over which axes."""

from collections.abc import Sequence

import numpy as np

from megamoe.pictures.colours import FILLS, LIGHT
from megamoe.pictures.ticks import Scale
from megamoe.report.chart import Chart, Line, scale_of
from megamoe.report.curves import DASHES, SECONDS, Curve, has_key, phase_key, phases_of, table_of
from megamoe.report.record import HOURS, STEPS, TOKENS, Record, smooth_key
from megamoe.report.values import plain

FEW_POINTS = 60  # each is shown as a dot, too
AXES = (STEPS, TOKENS, HOURS)


def axes_of(records: Sequence[Record]) -> list[str]:
    """The x axes that every run with training lines has."""
    drawn = [record for record in records if record.training.num_pieces]
    return [
        axis
        for axis in AXES
        if axis == STEPS or all(record.axis(record.training, axis) is not None for record in drawn)
    ]


def x_scale_of(records: Sequence[Record], axis: str) -> Scale:
    """From 0 to where the longest run is."""
    ends = [
        float(np.nanmax(places))
        for record in records
        for table in (record.training, record.held_out)
        if (places := record.axis(table, axis)) is not None and np.isfinite(places).any()
    ]
    return Scale(0.0, max([*ends, 1e-9]))


def chart_of(records: Sequence[Record], curve: Curve, axis: str, prefix: str = "") -> Chart | None:
    """None where no run has a number for it. With several runs a colour is a run and a dash a metric."""
    lines = []
    several = len(records) > 1
    for run, record in enumerate(records):
        for place, (key, label) in enumerate(curve.keys):
            if not has_key(record, key):
                continue
            style = (run, DASHES[place % len(DASHES)]) if several else (place, "" if place < len(LIGHT) else DASHES[1])
            name = label if not several else f"{record.name}: {label}" if len(curve.keys) > 1 else record.name
            lines += _lines(record, run, (key, place, label), name, style, axis)
    lines = [line for line in lines if np.isfinite(line.y).any()]
    if not lines:
        return None
    values = np.concatenate([line.y[np.isfinite(line.y)] for line in lines])
    if curve.only_if_varied and values.min() == values.max():
        return None
    scale = scale_of(lines, is_log=curve.is_log, from_zero=curve.from_zero)
    return Chart(prefix + curve.name, curve.title, curve.unit, curve.kind, scale, lines)


def _lines(
    record: Record, run: int, metric: tuple[str, int, str], label: str, style: tuple[int, str], axis: str
) -> list[Line]:
    """`metric`: its key, its place among those of the chart, its name in the legend. Empty where there is no x axis."""
    key, place, metric_name = metric
    table = table_of(record, key)
    assert table is not None
    x = record.axis(table, axis)
    if x is None:
        return []
    y, (low, high) = table.mean(key), table.range(key)
    smooth = smooth_key(key)
    is_smooth = smooth in table.keys and table is record.training
    has_range = table.lines_per_piece > 1 or is_smooth
    if is_smooth:
        y = table.mean(smooth)
    known = int(np.isfinite(y).sum())
    if known < len(y) / 2:  # a key of few lines: what is between them is no gap
        y = _filled(y, np.isfinite(y))
    return [
        Line(
            run, 0 if table is record.training else 1, place, metric_name, label, f"c{style[0] % len(LIGHT)}", style[1],
            x, y, low if has_range else None, high if has_range else None, has_dots=known <= FEW_POINTS,
        )
    ]  # fmt: skip


def _filled(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Straight lines between the known values; nothing before the first and after the last one."""
    places = np.flatnonzero(known)
    if not len(places):
        return values
    filled = values.copy()
    inside = np.arange(places[0], places[-1] + 1)
    filled[inside] = np.interp(inside, places, values[places])
    return filled


def phase_chart(records: Sequence[Record], run: int, axis: str) -> Chart | None:
    """Time of a step by phase of one run, stacked; what no phase accounts for is the rest."""
    record = records[run]
    names, table = phases_of(record), record.training
    x = record.axis(table, axis)
    if not names or x is None:
        return None
    lines: list[Line] = []
    below = np.zeros(table.num_pieces)
    parts = [(plain(name.replace("_", "-")), np.nan_to_num(table.mean(phase_key(name)))) for name in names]
    if "step_seconds" in table.keys:
        rest = np.nan_to_num(table.mean("step_seconds")) - sum(values for _, values in parts)
        if rest.mean() > 0.005 * np.nanmean(table.mean("step_seconds")):
            parts.append(("rest", np.maximum(rest, 0.0)))
    for place, (name, values) in enumerate(parts):
        above = below + np.maximum(values, 0.0)
        colour = f"f{place % len(FILLS)}"
        lines.append(Line(run, 0, place, name, name, colour, "", x, above, below, above, is_area=True))
        below = above
    if not (below > 0).any():
        return None
    scale = scale_of([*lines], is_log=False, from_zero=True)
    title = "Time of a step by phase" + (f": {record.name}" if len(records) > 1 else "")
    return Chart(f"phases{run}", title, "seconds, mean of the ranks", SECONDS, scale, lines)

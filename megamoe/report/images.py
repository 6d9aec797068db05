"""The pictures of a report as PNG files, for papers, slides and messages, where matplotlib is there to draw them."""

import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from megamoe.pictures.colours import COLD, FILLS, HOT, LIGHT, LOG2_RANGE, NONE
from megamoe.report.build import axes_of, chart_of, phase_chart
from megamoe.report.chart import Chart, tick_text, y_ticks
from megamoe.report.curves import COUNT, groups_of
from megamoe.report.html import axis_names
from megamoe.report.marks import Mark, marks_of
from megamoe.report.record import STEPS, TOKENS, Record

DOTS_PER_INCH = 110
MAX_ROWS = 60  # layers of a map of which each has its number


def has_matplotlib() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def png_images(records: Sequence[Record]) -> Iterator[tuple[str, bytes]]:
    """(file name, content) of a picture a group of curves, and of one a run of the loads of its experts."""
    axes = axes_of(records)
    axis = TOKENS if len(records) > 1 and TOKENS in axes else STEPS
    marks, _ = marks_of(records)
    for group in groups_of(records):
        charts = [made for curve in group.curves if (made := chart_of(records, curve, axis)) is not None]
        if group.name == "speed":
            charts += [made for run in range(len(records)) if (made := phase_chart(records, run, axis)) is not None]
        if charts:
            yield f"{group.name}.png", _curves_png(records, charts, marks, axis)
    for index, record in enumerate(records):
        if record.loads.num_pieces:
            yield f"experts{'' if len(records) == 1 else index + 1}.png", _loads_png(record)


def _curves_png(records: Sequence[Record], charts: Sequence[Chart], marks: Sequence[Mark], axis: str) -> bytes:
    from matplotlib.figure import Figure

    columns = min(3, len(charts))
    rows = -(-len(charts) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.4 * rows), dpi=DOTS_PER_INCH, layout="constrained")
    for place, chart in enumerate(charts):
        _draw(figure.add_subplot(rows, columns, place + 1), chart, records, marks, axis)
    return _png(figure)


def _draw(plot: Any, chart: Chart, records: Sequence[Record], marks: Sequence[Mark], axis: str) -> None:
    for line in chart.lines:
        number = int(line.colour[1:])
        colour = FILLS[number] if line.is_area else LIGHT[number]
        if line.low is not None and line.high is not None:
            label = _verbatim(line.label) if line.is_area else None
            opacity = 1.0 if line.is_area else 0.18
            plot.fill_between(line.x, line.low, line.high, color=colour, alpha=opacity, linewidth=0, label=label)
        if not line.is_area:
            style = (0, tuple(float(part) / 1.4 for part in line.dash.split())) if line.dash else "-"
            plot.plot(line.x, line.y, color=colour, linestyle=style, linewidth=1.3, label=_verbatim(line.label),
                      marker="o" if line.has_dots else None, markersize=3)  # fmt: skip
    for mark in marks:
        if mark.kind in ("restart", "roll_back"):
            at = float(records[mark.run].place(np.array([float(mark.step)]), axis)[0])
            plot.axvline(at, color="#777777", linewidth=0.8, linestyle="--" if mark.kind == "restart" else ":")
    if chart.scale.is_log:
        plot.set_yscale("log")
    plot.set_ylim(chart.scale.low, chart.scale.high)
    plot.set_title(_verbatim(chart.title), loc="left", fontsize=10, fontweight="bold")
    plot.set_ylabel(chart.unit, fontsize=8)
    plot.set_xlabel(axis_names(records)[axis], fontsize=8)
    plot.xaxis.set_major_formatter(lambda value, _: tick_text(value, COUNT))
    plot.yaxis.set_major_formatter(lambda value, _: tick_text(value, chart.kind))
    plot.yaxis.set_minor_formatter(lambda value, _: "")
    plot.set_yticks(y_ticks(chart))
    plot.tick_params(labelsize=8)
    plot.grid(axis="y", color="#e6e9ed", linewidth=0.7)
    plot.set_axisbelow(True)
    plot.spines[["top", "right"]].set_visible(False)
    if len(chart.lines) > 1:
        plot.legend(fontsize=7, framealpha=0.85, edgecolor="none", ncols=1 + any(line.is_area for line in chart.lines))


def _loads_png(record: Record) -> bytes:
    """Latest loads, layer by expert, and the fullest expert of each layer over time."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    loads = record.loads
    colours = LinearSegmentedColormap.from_list(
        "loads", [_share(COLD), (1.0, 1.0, 1.0), _share(HOT)], bad=_share(NONE)
    )
    figure = Figure(figsize=(11, 3.6), dpi=DOTS_PER_INCH, layout="constrained")
    left, right = figure.subplots(1, 2)
    latest = np.full((len(loads.layers), max(loads.num_experts)), np.nan)
    for row, size in enumerate(loads.num_experts):
        latest[row, :size] = loads.latest_over_mean(row)
    fullest = np.stack([loads.over_mean(row).max(axis=1) for row in range(len(loads.layers))])
    for plot, cells, title, name in (
        (left, latest, f"Load of experts, step {loads.latest_step:,}", "expert"),
        (right, fullest, "Fullest expert of each layer over time", f"step {loads.steps[0]:,} to {loads.steps[-1]:,}"),
    ):
        with np.errstate(divide="ignore", invalid="ignore"):
            doublings = np.log2(np.where(cells > 0, cells, np.nan))
        picture = plot.imshow(doublings, aspect="auto", cmap=colours, vmin=-LOG2_RANGE, vmax=LOG2_RANGE,
                              interpolation="nearest")  # fmt: skip
        plot.set_title(_verbatim(title), loc="left", fontsize=10, fontweight="bold")
        plot.set_xlabel(name, fontsize=8)
        plot.set_ylabel("layer", fontsize=8)
        if len(loads.layers) <= MAX_ROWS:
            plot.set_yticks(range(len(loads.layers)), [str(layer) for layer in loads.layers])
        plot.tick_params(labelsize=8)
    right.set_xticks([])
    bar = figure.colorbar(picture, ax=[left, right], ticks=[-2, -1, 0, 1, 2], shrink=0.9)
    bar.ax.set_yticklabels(["≤ ¼", "½", "mean", "2×", "≥ 4×"], fontsize=8)
    return _png(figure)


def _png(figure: Any) -> bytes:
    """A figure of its own canvas: no state of pyplot, no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _share(colour: tuple[int, int, int]) -> tuple[float, float, float]:
    red, green, blue = (part / 255 for part in colour)
    return red, green, blue


def _verbatim(text: str) -> str:
    """$ would begin a formula."""
    return text.replace("$", r"\$")

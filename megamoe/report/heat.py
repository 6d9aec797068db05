"""Loads of experts as heat maps: small PNGs in the page, cells of which are the loads over the mean of their layer."""

import math
from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from megamoe.pictures.colours import COLD, HOT, LOG2_RANGE, NONE, SHADES
from megamoe.pictures.png import data_uri, indexed_png
from megamoe.report.record import Record
from megamoe.report.values import count_text

NONE_INDEX = 2 * SHADES + 1
MAX_OPEN_LAYERS = 8


def palette() -> list[tuple[int, int, int, int]]:
    """2 * SHADES + 1 steps from cold over nothing to hot, then the colour of no load at all."""
    steps = [(*COLD, round(255 * (SHADES - index) / SHADES)) for index in range(SHADES)]
    steps += [(*HOT, round(255 * index / SHADES)) for index in range(SHADES + 1)]
    return [*steps, (*NONE, 255)]


def shades(over_mean: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Indices into the palette; the scale is even in doublings."""
    with np.errstate(divide="ignore"):
        places = np.log2(over_mean) / LOG2_RANGE
    indices = SHADES + np.rint(np.clip(places, -1.0, 1.0) * SHADES)
    return np.where(over_mean <= 0.0, NONE_INDEX, indices).astype(np.uint8)


def picture(over_mean: NDArray[np.float64], alt: str, *, rows: str, columns: str) -> str:
    """An <img> of [rows, columns], and what a cell is called: `rows` and `columns` say it with {} for a number."""
    indices = shades(over_mean)
    uri = data_uri(indexed_png([row.tobytes() for row in indices], palette()))
    height, width = indices.shape
    return (
        f'<img class="heat" src="{uri}" width="{width}" height="{height}" alt="{escape(alt)}" '
        f'data-rows="{escape(rows)}" data-columns="{escape(columns)}">'
    )


def latest_map(record: Record) -> str:
    """Layer by expert, of the last line; layers of a pyramid with fewer experts end earlier."""
    loads = record.loads
    widest = max(loads.num_experts)
    cells = np.full((len(loads.layers), widest), 1.0)
    for row in range(len(loads.layers)):
        cells[row, : loads.num_experts[row]] = loads.latest_over_mean(row)
    dead = int(sum((loads.latest_over_mean(row) == 0).sum() for row in range(len(loads.layers))))
    alt = (
        f"Load of every expert at step {loads.latest_step}: {len(loads.layers)} layers by {widest} experts, "
        f"the fullest has {cells.max():.2f} times its layer's mean, {dead} have none"
    )
    image = picture(cells, alt, rows=_names("layer", loads.layers), columns="expert {}")
    return _framed(image, _row_labels([str(layer) for layer in loads.layers], "layer"),
                   f"expert 0 to {widest - 1}, step {loads.latest_step:,}")  # fmt: skip


def fullest_map(record: Record) -> str:
    """Layer by time: the fullest expert of each layer."""
    loads = record.loads
    cells = np.stack([loads.over_mean(row).max(axis=1) for row in range(len(loads.layers))])
    alt = f"Load of the fullest expert of each layer over time, at most {cells.max():.2f} times the mean"
    image = picture(cells, alt, rows=_names("layer", loads.layers), columns=_names("step", loads.steps))
    return _framed(image, _row_labels([str(layer) for layer in loads.layers], "layer"), _span(loads.steps))


def layer_map(record: Record, row: int) -> str:
    """Expert by time, of one layer."""
    loads = record.loads
    cells = loads.over_mean(row).T
    alt = (
        f"Load of the {loads.num_experts[row]} experts of layer {loads.layers[row]} over time, "
        f"between {cells.min():.2f} and {cells.max():.2f} times the mean"
    )
    image = picture(cells, alt, rows="expert {}", columns=_names("step", loads.steps))
    return _framed(image, _row_labels(["0", str(loads.num_experts[row] - 1)], "expert"), _span(loads.steps))


def heat_section(records: Sequence[Record]) -> str:
    """Everything about the experts of every run that has loads on record."""
    parts = []
    for record in records:
        loads = record.loads
        if loads.too_large:
            parts.append(f'<p class="soft">{escape(record.name)}: too many experts for a map.</p>')
        if not loads.num_pieces:
            continue
        name = f"{record.name}: " if len(records) > 1 else ""
        per_layer = "".join(
            f"<figure><figcaption><h3>Layer {layer}</h3></figcaption>{layer_map(record, row)}</figure>"
            for row, layer in enumerate(loads.layers)
        )
        is_open = " open" if len(loads.layers) <= MAX_OPEN_LAYERS and len(records) == 1 else ""
        parts.append(
            f'<div class="charts"><figure><figcaption><h3>{escape(name)}Latest loads</h3></figcaption>'
            f"{latest_map(record)}</figure><figure><figcaption><h3>{escape(name)}Fullest expert of each layer</h3>"
            f"</figcaption>{fullest_map(record)}</figure></div>"
            f"<details{is_open}><summary>{escape(name)}Every expert over time, by layer</summary>"
            f'<div class="charts small">{per_layer}</div></details>'
        )
    if not parts:
        return ""
    return f'<section id="experts"><h2>Load of experts</h2>{legend()}{"".join(parts)}</section>'


def legend() -> str:
    """The colours with what they stand for."""
    ramp = indexed_png([bytes(range(2 * SHADES + 1))], palette())
    grey = indexed_png([bytes([NONE_INDEX])], palette())
    return (
        f'<p class="key"><span>a quarter of the mean or less <img src="{data_uri(ramp)}" alt="blue to orange" '
        f'class="ramp"> four times the mean or more</span><span><img src="{data_uri(grey)}" alt="grey" class="none"> '
        "no tokens at all</span></p>"
    )


def _framed(image: str, rows: str, below: str) -> str:
    return f'<div class="map"><div class="rows">{rows}</div>{image}<div class="below">{escape(below)}</div></div>'


def _row_labels(labels: Sequence[str], name: str) -> str:
    """At most nine of them, evenly spread, the first with what they are."""
    step = math.ceil(len(labels) / 9)
    shown = [label if index % step == 0 else "" for index, label in enumerate(labels)] if step > 1 else list(labels)
    shown = [label for label in shown if label] if step > 1 else shown
    return f"<i>{escape(name)}</i>" + "".join(f"<span>{escape(label)}</span>" for label in shown)


def _span(steps: Sequence[int]) -> str:
    return f"step {count_text(steps[0])} to {count_text(steps[-1])}"


def _names(what: str, numbers: Sequence[int]) -> str:
    """For the script: "layer 1,3,5": the number of each row."""
    return what + " " + ",".join(str(number) for number in numbers)

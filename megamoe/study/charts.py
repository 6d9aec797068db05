"""Pictures of a study as SVG: points, lines and bands over two axes, each even or by powers. Complete without a script.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from megamoe.pictures.ticks import Scale, make_scale, scale_ticks

WIDTH, HEIGHT = 620, 380
LEFT, RIGHT, TOP, BOTTOM = 58, 20, 14, 46
RIGHT_EDGE, BOTTOM_EDGE = WIDTH - RIGHT, HEIGHT - BOTTOM
X_TICKS, Y_TICKS = 7, 7
LABEL_GAP = 14  # between the ends of two lines' names

Pairs = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """One line or cloud. `colour` is a class of the style sheet, c0 to c7. Pairs with NaN are gaps."""

    name: str
    colour: str
    pairs: Pairs
    dash: str = ""
    has_line: bool = True
    dot: float = 0.0  # diameter; 0: none
    is_open: bool = False  # its dots are rings
    width: float = 1.8
    hints: Sequence[str] = ()  # told where a dot is pointed at
    end_label: str = ""  # at the right end
    low: Sequence[float] = ()  # a band from low to high, over the same x; infinite: up to the edge; NaN: a gap
    high: Sequence[float] = ()
    in_legend: bool = True


@dataclass(frozen=True)
class Picture:
    """`x_text`, `y_text`: how marks are written."""

    title: str
    subtitle: str
    x_name: str
    y_name: str
    series: Sequence[Series]
    x_text: Callable[[float], str]
    y_text: Callable[[float], str]
    x_log: bool = False
    y_log: bool = False
    y_line: float | None = None  # a line across, as where a factor is 1
    y_from: tuple[float, ...] = ()  # values that the axis must hold


def figure(picture: Picture) -> str:
    """A figure with title, legend and picture."""
    note = f'<span class="soft">{escape(picture.subtitle)}</span>' if picture.subtitle else ""
    return (
        f"<figure><figcaption><h3>{escape(picture.title)}</h3>{note}</figcaption>{_legend(picture)}{svg(picture)}"
        "</figure>"
    )


def svg(picture: Picture) -> str:
    label = escape(description(picture))
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{chart_marks(picture)}</svg>'


def chart_marks(picture: Picture) -> str:
    """Axes, lines, dots and bands: what an SVG of WIDTH x HEIGHT holds."""
    x_scale, y_scale = _scales(picture)
    parts = [*_axes(picture, x_scale, y_scale)]
    for each in picture.series:
        if len(each.low):
            parts.append(f'<path class="range {each.colour}" d="{_band(each, x_scale, y_scale)}"/>')
    for each in picture.series:
        parts += _drawn(each, x_scale, y_scale)
    parts += _end_labels(picture.series, x_scale, y_scale)
    return "".join(parts)


def _scales(picture: Picture) -> tuple[Scale, Scale]:
    known = [pair for each in picture.series for pair in each.pairs if all(map(math.isfinite, pair))]
    edges = [value for each in picture.series for value in (*each.low, *each.high) if math.isfinite(value)]
    xs, ys = [x for x, _ in known] or [1.0], [*(y for _, y in known), *edges, *picture.y_from] or [1.0]
    right = max(xs)
    if any(each.end_label for each in picture.series):  # room for names
        right += 0.22 * (right - min(xs))
    return (
        make_scale(min(xs), right, is_log=picture.x_log),
        make_scale(min(ys), max(ys), is_log=picture.y_log and min(ys) > 0),
    )


def _x(value: float, scale: Scale) -> float:
    return LEFT + (RIGHT_EDGE - LEFT) * scale(value)


def _y(value: float, scale: Scale) -> float:
    if math.isinf(value):
        return TOP if value > 0 else BOTTOM_EDGE
    return BOTTOM_EDGE - (BOTTOM_EDGE - TOP) * scale(value)


def _axes(picture: Picture, x_scale: Scale, y_scale: Scale) -> Iterator[str]:
    yield '<g class="y">'
    for value in scale_ticks(y_scale, Y_TICKS):
        at = _y(value, y_scale)
        yield f'<path d="M{LEFT} {at:.1f}H{RIGHT_EDGE}"/>'
        yield f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{escape(picture.y_text(value))}</text>'
    yield f'<path class="base" d="M{LEFT} {BOTTOM_EDGE}H{RIGHT_EDGE}"/>'
    if picture.y_line is not None:
        yield f'<path class="base" stroke-dasharray="2 4" d="M{LEFT} {_y(picture.y_line, y_scale):.1f}H{RIGHT_EDGE}"/>'
    yield '</g><g class="x">'
    for value in scale_ticks(x_scale, X_TICKS):
        at = _x(value, x_scale)
        yield f'<path d="M{at:.1f} {BOTTOM_EDGE}v4"/>'
        yield f'<text x="{at:.1f}" y="{BOTTOM_EDGE + 17}" text-anchor="middle">{escape(picture.x_text(value))}</text>'
    yield f'</g><text x="{RIGHT_EDGE}" y="{HEIGHT - 8}" text-anchor="end">{escape(picture.x_name)}</text>'
    yield f'<text x="{LEFT}" y="{HEIGHT - 8}">{escape("↑ " + picture.y_name)}</text>'


def _band(each: Series, x_scale: Scale, y_scale: Scale) -> str:
    """Pieces without gaps, each there and back."""
    pieces: list[list[tuple[float, float, float]]] = [[]]
    for (x, _), low, high in zip(each.pairs, each.low, each.high, strict=True):
        if math.isfinite(x) and not math.isnan(low + high):
            pieces[-1].append((_x(x, x_scale), _y(low, y_scale), _y(high, y_scale)))
        elif pieces[-1]:
            pieces.append([])
    texts = []
    for piece in pieces:
        if len(piece) > 1:
            there = [f"{x:.1f} {high:.1f}" for x, _, high in piece]
            back = [f"{x:.1f} {low:.1f}" for x, low, _ in reversed(piece)]
            texts.append("M" + "L".join([*there, *back]) + "Z")
    return "".join(texts)


def _drawn(each: Series, x_scale: Scale, y_scale: Scale) -> Iterator[str]:
    yield f'<g class="{each.colour}">'
    if each.has_line:
        path, pen_is_down = "", False
        for x, y in each.pairs:
            if math.isfinite(x) and math.isfinite(y):
                path += f"{'L' if pen_is_down else 'M'}{_x(x, x_scale):.1f} {_y(y, y_scale):.1f}"
            pen_is_down = math.isfinite(x) and math.isfinite(y)
        dash = f' stroke-dasharray="{each.dash}"' if each.dash else ""
        yield f'<path class="line" style="stroke-width:{each.width}"{dash} d="{path}"/>'
    for place, (x, y) in enumerate(each.pairs if each.dot else ()):
        if math.isfinite(x) and math.isfinite(y):
            hint = f"<title>{escape(each.hints[place])}</title>" if each.hints else ""
            kind = "ring" if each.is_open else "disc"
            yield (
                f'<circle class="{kind}" cx="{_x(x, x_scale):.1f}" cy="{_y(y, y_scale):.1f}" r="{each.dot / 2:.1f}">'
                f"{hint}</circle>"
            )
    yield "</g>"


def _end_labels(series: Sequence[Series], x_scale: Scale, y_scale: Scale) -> Iterator[str]:
    """Names beside the right ends of lines, moved apart where they would lie on each other."""
    ends = []
    for each in series:
        known = [pair for pair in each.pairs if all(map(math.isfinite, pair))]
        if each.end_label and known:
            x, y = known[-1]
            ends.append([_y(y, y_scale), _x(x, x_scale), each])
    ends.sort(key=lambda end: end[0])
    for above, below in itertools.pairwise(ends):
        below[0] = max(below[0], above[0] + LABEL_GAP)
    if ends and (over := ends[-1][0] - (BOTTOM_EDGE - 4)) > 0:  # pushed out below: all go up as far as needed
        ends[-1][0] -= over
        for below, above in itertools.pairwise(ends[::-1]):
            above[0] = min(above[0], below[0] - LABEL_GAP)
    for y, x, each in ends:
        yield f'<text class="end {each.colour}" x="{x + 7:.1f}" y="{y + 4:.1f}">{escape(each.end_label)}</text>'


def _legend(picture: Picture) -> str:
    parts = []
    for each in picture.series:
        if not each.in_legend:
            continue
        parts.append(
            f'<span><svg class="{each.colour}" viewBox="0 0 26 10" aria-hidden="true">{legend_marks(each)}</svg>'
            f"{escape(each.name)}</span>"
        )
    return f'<div class="study-legend">{"".join(parts)}</div>' if parts else ""


def legend_marks(each: Series) -> str:
    """What stands before a name in a legend: 26 x 10."""
    dash = f' stroke-dasharray="{each.dash}"' if each.dash else ""
    line = f'<path class="swatch-line"{dash} d="M1 5H25"/>' if each.has_line else ""
    kind = "ring" if each.is_open else "disc"
    dot = f'<circle class="{kind}" cx="13" cy="5" r="{min(each.dot, 7) / 2:.1f}"/>' if each.dot else ""
    return line + dot


def description(picture: Picture) -> str:
    """In words, for those who cannot see it."""
    texts = []
    for each in picture.series:
        known = [pair for pair in each.pairs if all(map(math.isfinite, pair))]
        if known and each.in_legend:
            (x0, y0), (x1, y1) = known[0], known[-1]
            texts.append(
                f"{each.name} from {picture.y_text(y0)} at {picture.x_text(x0)} to {picture.y_text(y1)} at "
                f"{picture.x_text(x1)}"
            )
    return f"{picture.title}: {picture.y_name} over {picture.x_name}; {'; '.join(texts)}"

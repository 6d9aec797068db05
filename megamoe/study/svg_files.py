"""A study's picture as an SVG file of its own: for a README, a talk or a paper. It has title, legend and style."""

from collections.abc import Iterator
from html import escape

from megamoe.pictures.colours import GROUND_CSS, MARKS_CSS, scale_css
from megamoe.study.charts import HEIGHT, LEFT, RIGHT_EDGE, WIDTH, Picture, chart_marks, description, legend_marks

HEAD, ROW = 46, 18  # height of title and subtitle, and of a row of the legend
MARK_WIDTH, CHARACTER_WIDTH, GAP = 32, 6.6, 18  # of a legend's entry; text is measured by its reader's font

TITLE_CSS = "svg text.title{font-size:15px;font-weight:600;fill:var(--ink)}\n"


def svg_file(picture: Picture) -> str:
    """The whole file: nothing is fetched, no script runs, light or dark by the reader's own setting."""
    legend, num_rows = _legend(picture)
    top = HEAD + num_rows * ROW
    return "".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top + HEIGHT}" width="{WIDTH}" '
            f'height="{top + HEIGHT}" role="img" aria-label="{escape(description(picture))}">\n',
            f"<style>{GROUND_CSS}{MARKS_CSS}{TITLE_CSS}{scale_css()}</style>\n",
            f'<rect width="{WIDTH}" height="{top + HEIGHT}" fill="var(--bg)"/>\n',
            f'<text class="title" x="{LEFT}" y="22">{escape(picture.title)}</text>',
            f'<text x="{LEFT}" y="40">{escape(picture.subtitle)}</text>\n',
            *legend,
            f'<g transform="translate(0 {top})">\n{chart_marks(picture)}</g>\n</svg>\n',
        ]
    )


def _legend(picture: Picture) -> tuple[list[str], int]:
    """Its entries, in as many rows as they take."""
    parts, x, row = [], float(LEFT), 0
    for name, colour, mark in _entries(picture):
        width = MARK_WIDTH + CHARACTER_WIDTH * len(name)
        if x > LEFT and x + width > RIGHT_EDGE:
            x, row = float(LEFT), row + 1
        y = HEAD + row * ROW + 8
        parts.append(
            f'<g transform="translate({x:.0f} {y})"><g class="{colour}" transform="translate(0 -5)">{mark}</g>'
            f'<text x="{MARK_WIDTH}" y="4">{escape(name)}</text></g>\n'
        )
        x += width + GAP
    return parts, row + 1 if parts else 0


def _entries(picture: Picture) -> Iterator[tuple[str, str, str]]:
    for each in picture.series:
        if each.in_legend:
            yield each.name, each.colour, legend_marks(each)

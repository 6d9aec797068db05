"""A plan as one HTML page without scripts or outside files: memory by stage and time by kind, drawn; then the words."""

from collections.abc import Sequence
from dataclasses import fields
from html import escape

from megamoe.pictures.colours import FILLS
from megamoe.pictures.page import page
from megamoe.plan.plan import Plan
from megamoe.plan.remedies import Remedy
from megamoe.plan.report import GIB, PART_NAMES, stages_of, text_report

_WIDTH, _LEFT, _BAR, _GAP = 900, 150, 26, 12


def html_report(plan: Plan, remedies: Sequence[Remedy], title: str) -> str:
    """The page."""
    verdict = "fits" if plan.fits else "does not fit"
    body = f"""<h1>{escape(title)}: <span class="{"good" if plan.fits else "bad"}">{verdict}</span></h1>
<h2>Memory of a rank by pipeline stage, GiB</h2>
{_memory_picture(plan)}
<h2>Time of a step on the slowest stage, seconds</h2>
{_time_picture(plan)}
<h2>The plan in words</h2>
<pre>{escape(text_report(plan, remedies))}</pre>"""
    return page(title, body, style=f"body{{max-width:{_WIDTH + 90}px}}svg{{display:block;width:100%;height:auto}}")


def _memory_picture(plan: Plan) -> str:
    """A stacked bar a role, and a line where the accelerator's memory ends."""
    names = [field.name for field in fields(plan.worst.memory.num_bytes)]
    rows = [
        (
            stages_of(each),
            [getattr(each.memory.num_bytes, name) / GIB for name in names],
            f"{each.memory.num_bytes.total / GIB:.1f}",
        )
        for each in plan.roles
    ]
    limit = plan.cluster.memory_bytes / GIB
    return _bars(rows, [PART_NAMES[name] for name in names], limit=limit, limit_name=f"{limit:.1f} GiB")


def _time_picture(plan: Plan) -> str:
    """One bar a kind, the longest first."""
    kinds = sorted(((name, s) for name, s in plan.step.by_kind.items() if s > 0), key=lambda item: -item[1])
    rows = [(name, [s], f"{s:.3f} s, {100 * s / plan.step.seconds:.1f} %") for name, s in kinds]
    return _bars(rows, [], limit=None, limit_name="")


def _bars(
    rows: Sequence[tuple[str, Sequence[float], str]], legend: Sequence[str], *, limit: float | None, limit_name: str
) -> str:
    """Rows of (name, parts of its bar, text at its end)."""
    longest = max([sum(parts) for _, parts, _ in rows] + ([limit] if limit is not None else []))
    left = max(_LEFT, 7 * max(len(name) for name, _, _ in rows) + 12)
    scale = (_WIDTH - left - 130) / longest if longest else 0.0
    top = 24 if limit is not None else 4
    drawn, bottom = [], top + len(rows) * (_BAR + _GAP)
    for index, (name, parts, text) in enumerate(rows):
        y, x = top + index * (_BAR + _GAP), float(left)
        drawn.append(f'<text x="{left - 8}" y="{y + 18}" text-anchor="end">{escape(name)}</text>')
        for number, part in enumerate(parts):
            hint = f"{legend[number]}: {part:.2f}" if legend else f"{part:.4f}"
            drawn.append(
                f'<rect x="{x:.1f}" y="{y}" width="{part * scale:.1f}" height="{_BAR}" fill="{FILLS[number]}">'
                f"<title>{escape(hint)}</title></rect>"
            )
            x += part * scale
        drawn.append(f'<text x="{x + 6:.1f}" y="{y + 18}">{escape(text)}</text>')
    if limit is not None:
        x = left + limit * scale
        drawn.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="18" y2="{bottom}" stroke="#b03000" stroke-width="2"/>')
        drawn.append(f'<text x="{x:.1f}" y="13" text-anchor="middle">{escape(limit_name)}</text>')
    height = bottom + 8
    for number, name in enumerate(legend):
        x, y = left + number % 4 * 170, height + number // 4 * 22
        drawn.append(f'<rect x="{x}" y="{y}" width="14" height="14" fill="{FILLS[number]}"/>')
        drawn.append(f'<text x="{x + 20}" y="{y + 12}">{escape(name)}</text>')
    height += (len(legend) + 3) // 4 * 22 + 4
    return f'<svg viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" role="img">{"".join(drawn)}</svg>'

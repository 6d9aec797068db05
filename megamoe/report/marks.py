"""What happened on the way, as marks in every picture: restarts, roll-backs, spikes, skipped steps, saves, ends."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megamoe.pictures.ticks import Scale
from megamoe.report.chart import BOTTOM_EDGE, TOP, x_of
from megamoe.report.record import HOURS, STEPS, TOKENS, Record
from megamoe.report.values import count_at, text_at

MAX_MARKS = 120  # of one kind and run
NAMES = {
    "restart": "restart", "roll_back": "rolled back", "spike": "loss spike", "skip": "skipped steps",
    "save": "checkpoint", "failure": "failed or stopped",
}  # fmt: skip
# Shapes in a picture, relative to the x of the step.
_SHAPES = {
    "restart": f"M0 {TOP - 14}V{BOTTOM_EDGE}",
    "roll_back": f"M0 {TOP - 14}V{BOTTOM_EDGE}",
    "spike": f"M-5 {TOP - 13}H5L0 {TOP - 5}Z",
    "skip": f"M-3 {TOP - 12}l6 6m0 -6l-6 6",
    "save": f"M0 {BOTTOM_EDGE}v-6",
    "failure": f"M0 {TOP - 14}l5 5l-5 5l-5 -5Z",
}


@dataclass(frozen=True)
class Mark:
    kind: str  # a key of NAMES
    run: int
    step: int
    text: str


def marks_of(records: Sequence[Record]) -> tuple[list[Mark], dict[str, int]]:
    """The marks, evenly thinned where one run has too many of a kind; and how many there are of each kind in truth."""
    found: list[Mark] = []
    totals = dict.fromkeys(NAMES, 0)
    for index, record in enumerate(records):
        by_kind: dict[str, list[Mark]] = {kind: [] for kind in NAMES}
        for mark in [*_from_events(index, record), *_from_skips(index, record)]:
            by_kind[mark.kind].append(mark)
        for kind, marks in by_kind.items():
            totals[kind] += len(marks)
            keep = np.unique(np.linspace(0, len(marks) - 1, min(len(marks), MAX_MARKS)).round().astype(int))
            found += [marks[place] for place in keep]
    return found, totals


def _from_events(index: int, record: Record) -> list[Mark]:
    found, num_starts = [], 0
    kinds = {
        "roll_back": "roll_back", "spike": "spike", "divergence": "spike", "save": "save", "failed": "failure",
        "hang": "failure", "stopped": "failure",
    }  # fmt: skip
    for event in record.history.events:
        step, text = count_at(event, "step"), text_at(event, "message")
        if event["kind"] == "start":
            num_starts += 1
            if num_starts > 1 and step is not None:
                number = count_at(event, "attempt") or num_starts
                found.append(Mark("restart", index, step, f"attempt {number}: {text or f'from step {step}'}"))
        elif event["kind"] in kinds and step is not None:
            kind = kinds[event["kind"]]
            if kind == "roll_back":  # where the curves were cut and go on
                step = count_at(event, "to_step") or 0
            found.append(Mark(kind, index, step, text or f"{NAMES[kind]} at step {step}"))
    return found


def _from_skips(index: int, record: Record) -> list[Mark]:
    """Where the number of skipped steps has grown, to the piece."""
    if "skipped_steps" not in record.training.keys:
        return []
    _, most = record.training.range("skipped_steps")
    steps, found, before = record.training.last_steps, [], 0.0
    for step, count in zip(steps.tolist(), most.tolist(), strict=True):
        if count > before:
            found.append(Mark("skip", index, int(step), f"{count - before:.0f} skipped up to step {step:.0f}"))
            before = count
    return found


def draw_marks(marks: Sequence[Mark], records: Sequence[Record], axis: str, scale: Scale, num_colours: int) -> str:
    """The group that every picture shows."""
    parts = []
    for mark in marks:
        record = records[mark.run]
        at = float(record.place(np.array([float(mark.step)]), axis)[0])
        if np.isfinite(at):
            colour = f" c{mark.run % num_colours}" if len(records) > 1 else ""
            parts.append(
                f'<path class="m m-{mark.kind}{colour}" data-run="{mark.run}" d="{_SHAPES[mark.kind]}" '
                f'transform="translate({x_of(at, scale):.1f} 0)"/>'
            )
        else:
            parts.append(f'<path class="m" data-run="{mark.run}" d=""/>')
    return "".join(parts)


def marks_data(marks: Sequence[Mark], records: Sequence[Record]) -> list[list[Any]]:
    """Run, kind, text, and the place on each axis, for the script."""
    found = []
    for mark in marks:
        places = []
        for axis in (STEPS, TOKENS, HOURS):
            at = float(records[mark.run].place(np.array([float(mark.step)]), axis)[0])
            places.append(float(f"{at:.7g}") if np.isfinite(at) else None)
        found.append([mark.run, mark.kind, mark.text, *places])
    return found


def key_of_marks(totals: dict[str, int], num_shown: dict[str, int]) -> str:
    """The legend of the marks that there are."""
    parts = []
    for kind, name in NAMES.items():
        if not totals[kind]:
            continue
        top = BOTTOM_EDGE - 10 if kind == "save" else TOP - 16
        icon = f'<svg viewBox="-8 {top} 16 14" width="16" height="14" aria-hidden="true"><path class="m m-{kind}" '
        few = f", {num_shown[kind]} drawn" if num_shown[kind] < totals[kind] else ""
        parts.append(f'<span>{icon}d="{_SHAPES[kind]}"/></svg> {name} ({totals[kind]:,}{few})</span>')
    return f'<p class="key">{"".join(parts)}</p>' if parts else ""

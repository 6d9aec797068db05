"""Whether the slices of a tensor hold each of its elements exactly once."""

import itertools
from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from megamoe.checkpoint.slices import Box, boxes_of, volume, whole_box
from megamoe.errors import CheckpointError

_MAX_CELLS = 1 << 20  # of one compressed grid; above it the tensor is halved


def check_coverage(what: str, shape: tuple[int, ...], pieces: Iterable[tuple[Box, int, int]]) -> None:
    """Raises CheckpointError, naming `what` and an element, unless (box, first, last) pieces hold each element once.

    Pieces lie inside the tensor (`Slice.check`). Ranges that together fill their box count as the box; the boxes are
    then counted on the grid of their own edges, so the cost depends on the number of cuts, not on the size.
    """
    by_box: dict[Box, list[tuple[int, int]]] = defaultdict(list)
    for box, first, last in pieces:
        by_box[box].append((first, last))
    boxes = []
    for box, ranges in by_box.items():
        ranges.sort()
        ends = [0, *(last for _, last in ranges)]
        if ends[:-1] == [first for first, _ in ranges] and ends[-1] == volume(box):
            boxes.append(box)
        else:
            boxes += [inner for first, last in ranges for inner, _ in boxes_of(box, first, last)]
    if boxes == [whole_box(shape)]:
        return
    if not boxes:
        raise CheckpointError(f"{what} has no slices at all")
    if not shape:
        raise CheckpointError(f"{what} is stored {len(boxes)} times")
    edges = np.array(boxes, dtype=np.int64)  # [boxes, dimensions, 2]
    _count(what, edges[:, :, 0], edges[:, :, 1], np.zeros(len(shape), np.int64), np.array(shape, np.int64))


def _count(what: str, starts: np.ndarray, stops: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
    """Count the boxes over every cell of their common grid within [low, high)."""
    starts, stops = np.maximum(starts, low), np.minimum(stops, high)
    inside = (starts < stops).all(axis=1)
    starts, stops = starts[inside], stops[inside]
    axes = [
        np.unique(np.concatenate([starts[:, d], stops[:, d], low[d : d + 1], high[d : d + 1]])) for d in range(len(low))
    ]
    if np.prod([len(axis) - 1.0 for axis in axes]) > _MAX_CELLS:
        widest = max(range(len(axes)), key=lambda d: len(axes[d]))
        middle = axes[widest][len(axes[widest]) // 2]
        lower_high, upper_low = high.copy(), low.copy()
        lower_high[widest] = upper_low[widest] = middle
        _count(what, starts, stops, low, lower_high)
        _count(what, starts, stops, upper_low, high)
        return
    # +1 and -1 at the corners of each box; summed up along every dimension they count the boxes over each cell.
    counts = np.zeros([len(axis) for axis in axes], np.int32)
    ends = [(np.searchsorted(a, starts[:, d]), np.searchsorted(a, stops[:, d])) for d, a in enumerate(axes)]
    for corner in itertools.product((0, 1), repeat=len(axes)):
        np.add.at(counts, tuple(end[side] for end, side in zip(ends, corner, strict=True)), (-1) ** sum(corner))
    for dim in range(len(axes)):
        np.cumsum(counts, axis=dim, out=counts)
    counts = counts[tuple(slice(-1) for _ in axes)]
    wrong = np.argwhere(counts != 1)
    if len(wrong):
        cell = tuple(wrong[0])
        element = [int(axis[index]) for axis, index in zip(axes, cell, strict=True)]
        times = int(counts[cell])
        raise CheckpointError(
            f"element {element} of {what} is " + ("missing: no slice holds it" if not times else f"held {times} times")
        )

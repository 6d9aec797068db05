"""A stream of metrics in bounded memory: many lines become few pieces with their mean, least and largest values.

Lines are put into pieces of equal length; when there are too many pieces, neighbours are joined and pieces become twice
as long. As long as the lines are few, each is a piece of its own and nothing is lost.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Column = NDArray[np.float64]

MAX_PIECES = 320
MAX_KEYS = 400  # different keys of one table; more are left out
LARGEST = 1e300  # a value beyond is none: sums of some must stay finite


class Table:
    """Columns over steps. `add` takes lines in the order of the file; a step that comes again replaces what was."""

    def __init__(self, max_pieces: int = MAX_PIECES) -> None:
        self._capacity = max_pieces + max_pieces % 2
        self.lines_per_piece = 1
        self.num_lines = 0
        self._sums: dict[str, Column] = {}
        self._counts: dict[str, Column] = {}
        self._least: dict[str, Column] = {}
        self._largest: dict[str, Column] = {}
        self._steps = np.zeros((self._capacity, 2))  # first and last step of each piece

    @property
    def num_pieces(self) -> int:
        return -(-self.num_lines // self.lines_per_piece)

    @property
    def keys(self) -> list[str]:
        return list(self._sums)

    @property
    def last_steps(self) -> Column:
        return self._steps[: self.num_pieces, 1]

    def add(self, steps: Column, columns: Mapping[str, Column]) -> None:
        """Lines with `steps` [n], which grow, and columns [n] with NaN where a line lacks the key."""
        if not len(steps):
            return
        self._rewind(steps[0])
        places = (self.num_lines + np.arange(len(steps))) // self.lines_per_piece
        while places[-1] >= self._capacity:
            self._join_neighbours()
            places //= 2
        begins = np.flatnonzero(np.diff(places, prepend=-1))
        rows = places[begins]
        fresh = rows >= self.num_pieces
        self._steps[rows[fresh], 0] = steps[begins[fresh]]
        self._steps[rows, 1] = steps[np.append(begins[1:], len(steps)) - 1]
        for key, values in columns.items():
            if key in self._sums or len(self._sums) < MAX_KEYS:
                self._add_column(key, values, begins, rows)
        self.num_lines += len(steps)

    def mean(self, key: str) -> Column:
        """[pieces], NaN where no line of a piece has the key."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return (self._sums[key] / self._counts[key])[: self.num_pieces]

    def sum(self, key: str) -> Column:
        return self._sums[key][: self.num_pieces] if key in self._sums else np.zeros(self.num_pieces)

    def range(self, key: str) -> tuple[Column, Column]:
        """Least and largest value of each piece, NaN where there is none."""
        least, largest = self._least[key][: self.num_pieces], self._largest[key][: self.num_pieces]
        return np.where(np.isfinite(least), least, np.nan), np.where(np.isfinite(largest), largest, np.nan)

    def _add_column(self, key: str, values: Column, begins: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
        if key not in self._sums:
            self._sums[key], self._counts[key] = np.zeros(self._capacity), np.zeros(self._capacity)
            self._least[key] = np.full(self._capacity, np.inf)
            self._largest[key] = np.full(self._capacity, -np.inf)
        known = np.isfinite(values)
        self._sums[key][rows] += np.add.reduceat(np.where(known, values, 0.0), begins)
        self._counts[key][rows] += np.add.reduceat(known.astype(float), begins)
        least = np.minimum.reduceat(np.where(known, values, np.inf), begins)
        largest = np.maximum.reduceat(np.where(known, values, -np.inf), begins)
        self._least[key][rows] = np.minimum(self._least[key][rows], least)
        self._largest[key][rows] = np.maximum(self._largest[key][rows], largest)

    def _join_neighbours(self) -> None:
        half = self._capacity // 2
        for columns, join, empty in (
            (self._sums, np.add, 0.0),
            (self._counts, np.add, 0.0),
            (self._least, np.minimum, np.inf),
            (self._largest, np.maximum, -np.inf),
        ):
            for column in columns.values():
                column[:half] = join(column[0::2], column[1::2])
                column[half:] = empty
        first, last = self._steps[0::2, 0].copy(), self._steps[:, 1].copy()
        self._steps[:half, 0], self._steps[:half, 1] = first, np.maximum(last[0::2], last[1::2])
        self._steps[half:] = 0.0
        self.lines_per_piece *= 2

    def _rewind(self, step: float) -> None:
        """Forget the pieces that reach up to `step` or beyond: training has gone back, and they come again."""
        kept = int(np.searchsorted(self.last_steps, step))
        if kept >= self.num_pieces:
            return
        for columns, empty in (
            (self._sums, 0.0), (self._counts, 0.0), (self._least, np.inf), (self._largest, -np.inf),
        ):  # fmt: skip
            for column in columns.values():
                column[kept:] = empty
        self._steps[kept:] = 0.0
        self.num_lines = kept * self.lines_per_piece


def to_columns(lines: Sequence[Mapping[str, Any]]) -> dict[str, Column]:
    """The numbers of lines by key, each column [lines], NaN for everything else that a line may hold there."""
    names = list(map(tuple, lines))
    groups: dict[tuple[str, ...], list[int]] = {keys: [] for keys in set(names)}
    for place, keys in enumerate(names):
        groups[keys].append(place)  # lines of the same keys are turned to numbers together
    columns: dict[str, Column] = {}
    for keys, places in groups.items():
        values = _numbers([lines[place] for place in places], len(keys))
        for number, key in enumerate(keys):
            if key not in columns:
                if len(columns) >= MAX_KEYS:
                    continue
                columns[key] = np.full(len(lines), np.nan)
            columns[key][places] = values[:, number]
    return columns


def _numbers(lines: Sequence[Mapping[str, Any]], num_keys: int) -> NDArray[np.float64]:
    """[lines, keys] of lines that have the same keys in the same order."""
    everything = itertools.chain.from_iterable(line.values() for line in lines)
    try:
        values = np.fromiter(everything, np.float64, len(lines) * num_keys)
    except (OverflowError, TypeError, ValueError):  # not all are numbers
        values = np.array([_number(value) for line in lines for value in line.values()])
    with np.errstate(invalid="ignore"):
        return np.where(np.abs(values) <= LARGEST, values, np.nan).reshape(len(lines), num_keys)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def growing_runs(steps: Column) -> list[slice]:
    """The stretches of lines whose steps grow; one stretch where training never went back."""
    cuts = [0, *(np.flatnonzero(np.diff(steps) <= 0) + 1).tolist(), len(steps)]
    return [slice(begin, end) for begin, end in itertools.pairwise(cuts)]


def trailing_mean(values: Column, before: Column, num_lines: int) -> tuple[Column, Column]:
    """Mean of each value and the `num_lines` - 1 before it, NaNs left out; and what the next call wants as `before`."""
    everything = np.concatenate([before, values])
    known = np.isfinite(everything)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, everything, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    ends = np.arange(len(before), len(everything)) + 1
    begins = np.maximum(ends - num_lines, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (sums[ends] - sums[begins]) / (counts[ends] - counts[begins])
    return np.where(np.isfinite(values), means, np.nan), everything[max(0, len(everything) - num_lines + 1) :]

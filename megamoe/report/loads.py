"""The load of every expert over a run, from `expert_loads.jsonl`, in bounded memory."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megamoe.report.values import count_at, section

MAX_PIECES = 96
MIN_PIECES = 16
MAX_CELLS = 4_000_000  # of all layers and pieces: 32 MB
MAX_PICTURE_CELLS = 260_000  # of all layers over time, as they are drawn


@dataclass
class ExpertLoads:
    """Tokens by layer, piece of time and expert. Lines of another shape than the first one are left out."""

    layers: list[int] = field(default_factory=list)
    num_experts: list[int] = field(default_factory=list)  # of each layer
    steps: list[int] = field(default_factory=list)  # the last one of each piece
    sums: list[NDArray[np.float64]] = field(default_factory=list)  # of each layer: [pieces, experts]
    latest: list[NDArray[np.float64]] = field(default_factory=list)  # of each layer: [experts], of the last line
    latest_step: int = 0
    too_large: bool = False

    @property
    def num_pieces(self) -> int:
        return len(self.steps)

    def over_mean(self, layer_index: int) -> NDArray[np.float64]:
        """[pieces, experts]: load over the mean of its layer, in each piece."""
        return _over_mean(self.sums[layer_index][: self.num_pieces])

    def latest_over_mean(self, layer_index: int) -> NDArray[np.float64]:
        """[experts]."""
        return _over_mean(self.latest[layer_index][None])[0]


def read_loads(lines: Iterable[Mapping[str, Any]]) -> ExpertLoads:
    loads, reader = ExpertLoads(), None
    for line in lines:
        step, rows = count_at(line, "step"), _rows_of(line)
        if step is None or not rows:
            continue
        if reader is None:
            reader = _Reader(loads, rows)
            if loads.too_large:
                return loads
        reader.add(step, rows)
    return loads


class _Reader:
    """Fills an ExpertLoads as `megamoe.report.table.Table` fills its columns."""

    def __init__(self, loads: ExpertLoads, first: Mapping[int, list[float]]) -> None:
        self._loads = loads
        loads.layers = sorted(first)
        loads.num_experts = [len(first[layer]) for layer in loads.layers]
        self._total = sum(loads.num_experts)
        loads.too_large = self._total * MIN_PIECES > MAX_CELLS
        wanted = min(MAX_PIECES, MAX_PICTURE_CELLS // self._total)
        self._capacity = max(MIN_PIECES, wanted - wanted % 2)
        self._lines_per_piece, self._num_lines = 1, 0
        if not loads.too_large:
            loads.sums = [np.zeros((self._capacity, size)) for size in loads.num_experts]

    def add(self, step: int, rows: Mapping[int, list[float]]) -> None:
        loads = self._loads
        if sorted(rows) != loads.layers or [len(rows[layer]) for layer in loads.layers] != loads.num_experts:
            return
        if not all(set(map(type, rows[layer])) <= {int, float} for layer in loads.layers):
            return
        try:
            values = [np.array(rows[layer], dtype=np.float64) for layer in loads.layers]
        except OverflowError:
            return
        if not all(np.isfinite(row).all() and (row >= 0).all() and (row < 1e200).all() for row in values):
            return
        while loads.steps and loads.steps[-1] >= step:  # training has gone back: what follows comes again
            self._forget_last()
        if self._num_lines == self._capacity * self._lines_per_piece:
            self._join_neighbours()
        piece = self._num_lines // self._lines_per_piece
        for sums, row in zip(loads.sums, values, strict=True):
            sums[piece] += row
        loads.steps[piece:] = [step]
        loads.latest, loads.latest_step = values, step
        self._num_lines += 1

    def _forget_last(self) -> None:
        loads = self._loads
        loads.steps.pop()
        for sums in loads.sums:
            sums[len(loads.steps)] = 0.0
        self._num_lines = len(loads.steps) * self._lines_per_piece

    def _join_neighbours(self) -> None:
        half = self._capacity // 2
        for sums in self._loads.sums:
            sums[:half] = sums[0::2] + sums[1::2]
            sums[half:] = 0.0
        self._loads.steps = self._loads.steps[1::2]
        self._lines_per_piece *= 2


def _rows_of(line: Mapping[str, Any]) -> dict[int, list[float]]:
    rows = {}
    for name, row in section(line, "layers").items():
        if not (name.isascii() and name.isdecimal() and len(name) <= 6 and isinstance(row, list) and row):
            return {}
        rows[int(name)] = row
    return rows


def _over_mean(loads: NDArray[np.float64]) -> NDArray[np.float64]:
    means = loads.mean(axis=1, keepdims=True)
    return np.divide(loads, means, out=np.zeros_like(loads), where=means > 0)

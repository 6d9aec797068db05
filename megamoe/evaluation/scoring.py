"""Windows in, nats out: micro-batches of windows through a model on all ranks.

    b windows of a micro-batch   s tokens of each   n predictions that count
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice

import numpy as np
import torch

from megamoe.evaluation.corpora import OpenSet
from megamoe.evaluation.sums import Sums
from megamoe.evaluation.windows import Window, WindowPlan
from megamoe.inference.model import ForwardModel
from megamoe.inference.rows import TokenRows

# Micro-batches that a data-parallel rank computes between two meetings: more hide the filling of a pipeline.
PASSES, PASSES_PER_STAGE = 4, 4
ROUNDS = 4  # rounds of a batch of windows, which are sorted by length among themselves


@dataclass(frozen=True)
class Round:
    """Micro-batches of one shape, by the numbers of their windows in a batch."""

    micro_batches: tuple[tuple[int, ...], ...]
    length: int  # s: shorter windows are filled up on the right
    kept: int | None  # n; None: all predictions of all windows count


def score_set(
    model: ForwardModel, opened: OpenSet, sums: Sums, place: tuple[int, int],
    done: Callable[[Sums, tuple[int, int]], None],
) -> None:  # fmt: skip
    """Score the windows from `place` on into `sums`; `done` is called after each batch with the next place.

    The cut into batches is that from the beginning as long as `place` is one that `done` was given. Collective over all
    ranks, which all have the same sums.
    """
    plan = opened.plan
    passes = max(PASSES, PASSES_PER_STAGE * model.groups.grid.pipeline)
    at_once = passes * model.num_data_ranks
    micro_batch_size, fills_up = model.config.run.micro_batch_size, not model.evaluation.drop_tokens
    for windows in _batches(plan, place, ROUNDS * at_once * micro_batch_size):
        nats = np.zeros(len(windows))
        for round_ in cut_rounds(windows, micro_batch_size, at_once, fills_up=fills_up):
            nats[[i for each in round_.micro_batches for i in each]] = score_round(model, plan, windows, round_)
        sums.add(windows, nats.tolist())
        first, last = windows[0].first_scored, windows[-1].first_scored + windows[-1].scored
        sums.add_bytes(opened.bytes_between(first, last))
        if model.evaluation.drop_tokens:
            sums.add_loads(model.take_loads())
        end = windows[-1]
        done(sums, (end.unit + 1, 0) if end.ends_unit else (end.unit, end.index + 1))


def _batches(plan: WindowPlan, place: tuple[int, int], size: int) -> Iterator[list[Window]]:
    windows = plan.windows(*place)
    while batch := list(islice(windows, size)):
        yield batch


def cut_rounds(
    windows: Sequence[Window], micro_batch_size: int, most_micro_batches: int, *, fills_up: bool
) -> list[Round]:
    """All windows, each once, in rounds of up to `most_micro_batches` micro-batches of one shape.

    fills_up: windows of different lengths may share a micro-batch. Where experts have a capacity they may not: what
    fills up would take places from tokens.
    """

    def kind(number: int) -> tuple[int, ...]:
        window = windows[number]
        whole = window.scored == window.length
        return (whole,) if fills_up else (whole, window.length, window.scored)

    def length(number: int) -> tuple[int, int]:
        return windows[number].length, windows[number].scored

    order = sorted(range(len(windows)), key=lambda number: (kind(number), length(number)))
    rounds = []
    for _, numbers in groupby(order, kind):
        alike = list(numbers)
        cuts = [tuple(alike[i : i + micro_batch_size]) for i in range(0, len(alike), micro_batch_size)]
        for _, same_count in groupby(cuts, len):  # the last one may be smaller
            each = list(same_count)
            for first in range(0, len(each), most_micro_batches):
                rounds.append(_round(windows, each[first : first + most_micro_batches]))
    return rounds


def _round(windows: Sequence[Window], micro_batches: Sequence[tuple[int, ...]]) -> Round:
    chosen = [windows[i] for each in micro_batches for i in each]
    whole = all(window.scored == window.length for window in chosen)
    kept = None if whole else max(window.scored for window in chosen)
    return Round(tuple(micro_batches), max(window.length for window in chosen), kept)


def score_round(
    model: ForwardModel, plan: WindowPlan, windows: Sequence[Window], round_: Round
) -> np.ndarray:
    """Nats of each window of the round, in the order of its micro-batches: fp64. Collective over all ranks."""
    losses = round_losses(model, plan, windows, round_)
    num_kept = round_.length if round_.kept is None else round_.kept
    counts = np.array([[windows[i].scored for i in each] for each in round_.micro_batches])
    values = np.where(np.arange(num_kept) < counts[..., None], losses, 0.0)
    return values.sum(axis=-1, dtype=np.float64).ravel()


def round_losses(
    model: ForwardModel, plan: WindowPlan, windows: Sequence[Window], round_: Round
) -> np.ndarray:
    """fp32 [micro-batches, b, n]: of each window its scored tokens' nats, and behind them what means nothing."""
    rows, blank = [], None
    for number, each in enumerate(round_.micro_batches):
        if model.computes(number):
            rows.append(_rows(plan, [windows[i] for i in each], round_))
        else:
            if blank is None:
                blank = _blank(len(each), round_)
            rows.append(blank)
    return torch.stack(model.losses(rows)).numpy()


def _rows(plan: WindowPlan, windows: Sequence[Window], round_: Round) -> TokenRows:
    tokens = np.zeros((len(windows), round_.length), dtype=np.int64)
    labels = np.zeros((len(windows), round_.kept or round_.length), dtype=np.int64)
    kept = None if round_.kept is None else np.zeros_like(labels)
    for row, window in enumerate(windows):
        ids = plan.tokens(window)
        tokens[row, : window.length] = ids[:-1]
        labels[row, : window.scored] = ids[-window.scored :]
        if kept is not None:
            kept[row, : window.scored] = np.arange(window.length - window.scored, window.length)
    places = None if kept is None else torch.from_numpy(kept)
    return TokenRows(torch.from_numpy(tokens), torch.from_numpy(labels), places)


def _blank(num_windows: int, round_: Round) -> TokenRows:
    """Of the same shape, for what other ranks compute; takes no memory."""
    zero = torch.zeros((1, 1), dtype=torch.int64)
    labels = zero.expand(num_windows, round_.kept or round_.length)
    tokens = zero.expand(num_windows, round_.length)
    return TokenRows(tokens, labels, None if round_.kept is None else labels)

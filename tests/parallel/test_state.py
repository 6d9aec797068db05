"""What ranks own covers the global state exactly once under every layout, and holds the values that are there."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from megamoe.checkpoint.slices import STORAGE
from megamoe.topology.parameters import param_table
from megamoe.training.state import DTYPE_NAMES, needed, owned
from tests.harness import run_ranks
from tests.parallel.checkpoint_cases import CASES, MODELS, Case, State, by_world, comparable, whole_state
from tests.parallel.worlds import LAUNCH_TIMEOUT_SECONDS, samples, steps, trainer_of

NUMPY_NAMES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
PRECISIONS = {"fp32": (), "bf16": ("run.precision=bf16",)}


def runs(world: int) -> list[tuple[str, Case, str]]:
    """Every layout in fp32, those with ZeRO in bf16, too (one model for each)."""
    found = []
    for case in by_world()[world]:
        found += [(model, case, "fp32") for model in MODELS]
        if "zero0" not in case.name:
            found.append(("paper_all", case, "bf16"))
    return found


def pieces_of_all(world: int) -> list[dict[str, Any]]:
    found = []
    for model, case, precision in runs(world):
        settings = case.config(model, *PRECISIONS[precision])
        with trainer_of(settings) as trainer:
            steps(trainer, samples(settings, 1))
            mine = [(piece.slice, piece.values.float().numpy().copy()) for piece in owned(trainer)]
            wanted = [(piece.slice, piece.values.float().numpy().copy()) for piece in needed(trainer)]
            found.append({"owned": mine, "needed": wanted, "whole": whole_state(trainer)})
    return found


@cache
def launch(world: int) -> list[list[dict[str, Any]]]:
    return run_ranks(pieces_of_all, world, world, init=False, timeout_seconds=LAUNCH_TIMEOUT_SECONDS)


def check_slices(pieces: list, expected: State, counts: dict | None) -> None:
    for piece, values in pieces:
        piece.check()
        assert STORAGE[piece.dtype].itemsize == torch.empty((), dtype=NUMPY_NAMES[piece.dtype]).element_size()
        if piece.kind == "random":
            continue
        whole = expected[piece.kind, piece.name]
        assert piece.shape == whole.shape
        box = tuple(slice(start, stop) for start, stop in piece.box)
        np.testing.assert_array_equal(values, whole[box].reshape(-1)[piece.first : piece.last], err_msg=piece.label)
        if counts is not None:
            numbers = np.arange(whole.size).reshape(whole.shape)[box].reshape(-1)[piece.first : piece.last]
            counts.setdefault((piece.kind, piece.name), np.zeros(whole.size, dtype=int))[numbers] += 1


@pytest.mark.parametrize("world", sorted(by_world()))
def test_owned_slices_cover_everything_once_and_hold_what_is_there(world):
    by_rank = launch(world)
    for number, (model, case, precision) in enumerate(runs(world)):
        outcomes = [rank[number] for rank in by_rank]
        expected = comparable(outcomes[0]["whole"], precision=precision)
        counts: dict = {}
        for outcome in outcomes:
            check_slices(outcome["owned"], expected, counts)
        settings = case.config(model)
        names = {parameter.name for parameter in param_table(settings.model, settings.moe)}
        kinds = {"weight", "exp_avg", "exp_avg_sq"} | ({"master"} if precision == "bf16" else set())
        assert {(k, n) for k, n in counts if k != "balance_bias"} == {(k, n) for k in kinds for n in names}
        assert counts.keys() == expected.keys(), case.name
        for key, count in counts.items():
            assert (count == 1).all(), (case.name, key, "owned by more or fewer than one rank")
        assert any(expected["exp_avg", name].any() for name in names), "moments had begun to move"


@pytest.mark.parametrize("world", sorted(by_world()))
def test_a_rank_owns_its_share_and_reads_its_weights_whole(world):
    by_rank = launch(world)
    for number, (_, case, precision) in enumerate(runs(world)):
        expected = comparable(by_rank[0][number]["whole"], precision=precision)
        for rank in by_rank:
            check_slices(rank[number]["needed"], expected, None)
        # The data ranks share the work: nobody writes more than twice the mean.
        written = [sum(s.num_bytes for s, _ in rank[number]["owned"] if s.kind != "random") for rank in by_rank]
        assert max(written) <= 2 * np.mean(written), (case.name, written)


def test_the_layouts_meet_what_is_hard():
    names = " ".join(case.name for case in CASES)
    for word in ("zero0", "zero1", "zero2", "vp2", "etp2", "ep4", "pp4", "spTrue"):
        assert word in names

"""Many lines in few pieces: against numpy over all lines at once."""

import numpy as np
import pytest

from megamoe.pictures.ticks import linear_ticks, log_ticks, make_scale
from megamoe.report.loads import read_loads
from megamoe.report.table import Table, growing_runs, to_columns, trailing_mean


def filled(values: np.ndarray, chunk: int, max_pieces: int = 16) -> Table:
    table, steps = Table(max_pieces), np.arange(1.0, len(values) + 1)
    for at in range(0, len(values), chunk):
        table.add(steps[at : at + chunk], {"loss": values[at : at + chunk]})
    return table


@pytest.mark.parametrize("num_lines", [1, 15, 16, 17, 100, 1000])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_pieces_hold_the_mean_and_the_range_of_their_lines(num_lines, chunk):
    values = np.random.default_rng(num_lines).normal(size=num_lines)
    values[::5] = np.nan
    table = filled(values, chunk)
    length = table.lines_per_piece
    assert table.num_pieces == -(-num_lines // length) <= 16
    assert num_lines <= 16 or table.num_pieces > 8, "no coarser than it must be"
    pieces = [values[at : at + length] for at in range(0, num_lines, length)]
    known = [piece[~np.isnan(piece)] for piece in pieces]
    expected = [each.mean() if len(each) else np.nan for each in known]
    np.testing.assert_allclose(table.mean("loss"), expected)
    low, high = table.range("loss")
    np.testing.assert_array_equal(low, [each.min() if len(each) else np.nan for each in known])
    np.testing.assert_array_equal(high, [each.max() if len(each) else np.nan for each in known])
    assert table.last_steps.tolist() == [min(at + length, num_lines) for at in range(0, num_lines, length)]


def test_a_step_that_comes_again_replaces_what_was():
    table = filled(np.full(12, 5.0), 12)
    table.add(np.array([9.0, 10.0]), {"loss": np.array([1.0, 2.0])})
    assert table.last_steps.tolist() == list(range(1, 11))
    assert table.mean("loss").tolist() == [5.0] * 8 + [1.0, 2.0]


def test_a_key_that_comes_later_has_nothing_before():
    table = filled(np.ones(40), 8)
    table.add(np.arange(41.0, 49.0), {"loss": np.ones(8), "new": np.arange(8.0)})
    assert table.lines_per_piece == 4
    assert np.isnan(table.mean("new")[:-2]).all() and table.mean("new")[-2:].tolist() == [1.5, 5.5]


def test_only_numbers_are_numbers():
    lines = [{"loss": value} for value in (1, 2.5, None, True, "x", [4], {}, 10**400, float("inf"), 1e305)]
    column = to_columns([*lines, {}])["loss"]
    assert column[:2].tolist() == [1.0, 2.5] and np.isnan(column[2:]).all()
    assert to_columns([{"loss": 10**400}, {"loss": 1}])["loss"][1] == 1.0
    assert np.isnan(to_columns([{"loss": [1]}, {"loss": [2]}])["loss"]).all()


def test_lines_of_other_keys_stand_between():
    columns = to_columns([{"a": 1, "b": 2}, {"b": 3}, {"b": 4, "a": 5}, {}, {"a": 6, "b": None}])
    np.testing.assert_array_equal(columns["a"], [1, np.nan, 5, np.nan, 6])
    np.testing.assert_array_equal(columns["b"], [2, 3, 4, np.nan, np.nan])


def test_trailing_means_go_on_from_chunk_to_chunk():
    values = np.random.default_rng(0).normal(size=50)
    values[[3, 20, 21]] = np.nan
    found, before = [], np.empty(0)
    for at in range(0, 50, 7):
        means, before = trailing_mean(values[at : at + 7], before, 10)
        found += means.tolist()
    expected = [np.nanmean(values[max(0, i - 9) : i + 1]) if np.isfinite(values[i]) else np.nan for i in range(50)]
    np.testing.assert_allclose(found, expected)


def test_growing_runs_are_cut_where_training_went_back():
    parts = growing_runs(np.array([1.0, 2, 3, 2, 3, 3, 4]))
    assert [(part.start, part.stop) for part in parts] == [(0, 3), (3, 5), (5, 7)]


def test_loads_are_joined_in_time_and_dead_experts_stay_dead():
    lines = [{"step": step, "layers": {"3": [step, 1, 0], "1": [2, 2]}} for step in range(1, 401)]
    loads = read_loads(lines)
    assert loads.layers == [1, 3] and loads.num_experts == [2, 3]
    length = -(-400 // loads.num_pieces)
    assert loads.num_pieces <= 96 and loads.steps == [*range(length, 400, length), 400][: loads.num_pieces]
    sums = [sum(range(at + 1, at + length + 1)) for at in range(0, 400, length)]
    expected = [3 * total / (total + length) for total in sums]
    np.testing.assert_allclose(loads.over_mean(1)[:, 0], expected)
    assert (loads.over_mean(1)[:, 2] == 0).all() and (loads.over_mean(0) == 1).all()
    np.testing.assert_allclose(loads.latest_over_mean(1), [3 * 400 / 401, 3 / 401, 0])


def test_loads_of_another_shape_or_kind_are_left_out():
    good = {"step": 1, "layers": {"1": [1, 3]}}
    bad = [
        {"step": 2, "layers": {"1": [1, 3, 5]}}, {"step": 2, "layers": {"2": [1, 3]}}, {"step": 2, "layers": []},
        {"step": 2, "layers": {"1": [1, None]}}, {"step": 2, "layers": {"1": [1, -3]}}, {"layers": {"1": [1, 3]}},
        {"step": 2, "layers": {"1": ["a", 3]}}, {"step": 2, "layers": {"x": [1, 3]}},
        {"step": -2, "layers": {"1": [1, 3]}}, {"step": 2, "layers": {"1": [1, float("inf")]}},
        {"step": 2, "layers": {"1": [[1], [3]]}}, {"step": 2, "layers": {"1": [1, True]}},
    ]  # fmt: skip
    loads = read_loads([*bad[2:3], *bad[7:8], good, *bad])
    assert loads.steps == [1] and loads.latest_over_mean(0).tolist() == [0.5, 1.5]
    assert read_loads([{"step": 1, "layers": {"1": [1] * 300_000}}]).too_large


def test_loads_go_back_with_training():
    lines = [{"step": step, "layers": {"1": [1, 0]}} for step in (1, 2, 3, 4)]
    loads = read_loads([*lines, {"step": 3, "layers": {"1": [0, 1]}}])
    assert loads.steps == [1, 2, 3] and loads.over_mean(0)[-1].tolist() == [0.0, 2.0]


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 6000), (-3, 17), (1e-9, 3e-9), (0, 1.5e9), (2.1, 2.1001), (0, 9.99e20)]
)
def test_linear_ticks_are_round_and_inside(low, high):
    ticks = linear_ticks(low, high, 7)
    assert 2 <= len(ticks) <= 8 and low <= ticks[0] + 1e-9 * high and ticks[-1] <= high * (1 + 1e-9)
    step = ticks[1] - ticks[0]
    np.testing.assert_allclose(np.diff(ticks), step)
    assert float(f"{step:.1g}") == pytest.approx(step)


@pytest.mark.parametrize(("low", "high"), [(0.4, 11), (1, 1e5), (2.2, 2.9), (1e-12, 1e12), (100, 1000), (9.1, 9.2)])
def test_log_ticks_are_inside_and_some(low, high):
    ticks = log_ticks(low, high, 6)
    assert 2 <= len(ticks) <= 7 and all(low * (1 - 1e-9) <= tick <= high * (1 + 1e-9) for tick in ticks)


@pytest.mark.parametrize("values", [(0, 0), (5, 5), (-2, 3), (0.1, 1e6), (1e-300, 1e300)])
@pytest.mark.parametrize("is_log", [False, True])
@pytest.mark.parametrize("from_zero", [False, True])
def test_scales_hold_their_values(values, is_log, from_zero):
    scale = make_scale(*map(float, values), is_log=is_log, from_zero=from_zero)
    assert scale.high > scale.low and all(0.0 <= scale(float(value)) <= 1.0 for value in values)

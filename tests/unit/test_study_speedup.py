"""The factor of ladders whose answer is known: two families on one power law, whose compute differs by a constant."""

import math
from dataclasses import replace

import numpy as np
import pytest

from megamoe.study.pictures import fits_of
from megamoe.study.points import read_points, write_points
from megamoe.study.schema import AnalysisSettings
from megamoe.study.speedup import analyse, candidates_of, factor, noise_of
from tests.unit.study_cases import ladder

FACTOR = 4.0
REPETITIONS = 400
SEEDS = {"dense-0": 3, "moe-0": 3, "dense-1": 2, "moe-1": 2}


def factor_of(points, method="trained", cost="paper_flops", domain="in_domain", **settings):
    return factor(points, AnalysisSettings(**{"num_replicates": 0, **settings}), domain, cost, method)


@pytest.mark.parametrize(("method", "error"), [("trained", 0.02), ("fit", 0.002)])
@pytest.mark.parametrize("worth", [1.0, 2.0, 4.0])
def test_a_constant_factor_is_found_at_every_target(method, error, worth):
    """Straight lines between points of a power law that is nearly straight there: within 2 %."""
    found = factor_of(ladder({"dense": 1.0, "moe": worth}, sizes=tuple(np.geomspace(1e15, 3e16, 12))), method)
    assert len(found.targets) == 25 and np.isfinite(found.factors).all()
    assert found.factors == pytest.approx(np.full(25, worth), rel=error)


def test_all_costs_are_told_apart():
    points = ladder({"dense": 1.0, "moe": FACTOR}, sizes=tuple(np.geomspace(1e15, 3e16, 12)))
    assert factor_of(points, cost="model_flops").factors == pytest.approx(FACTOR, rel=0.02)
    assert factor_of(points, cost="train_seconds").factors == pytest.approx(FACTOR / 1.5, rel=0.02)
    memory = factor_of(points, cost="peak_memory_bytes")
    assert memory.compared_costs[0] == pytest.approx(3e9), "moe-0, which is where both begin"
    dense = {point.peak_memory_bytes: point.sets["docs"].nats_per_token for point in points
             if point.family == "dense" and point.is_final}  # fmt: skip
    below = max(size for size, loss in dense.items() if loss >= memory.targets[0])
    assert below <= memory.baseline_costs[0] <= below + 1e9


def test_domains_are_told_apart():
    points = ladder({"dense": 1.0, "moe": 4.0}, out_of_domain={"dense": 1.0, "moe": 2.0})
    for domain, worth in (("in_domain", 4.0), ("out_of_domain", 2.0)):
        assert factor_of(points, "fit", domain=domain).factors == pytest.approx(worth, rel=0.01)
    of_all = {(each.domain, each.cost, each.method): each for each in analyse(points, SETTINGS)}
    alone = factor(points, SETTINGS, "out_of_domain", "model_flops", "envelope")
    assert alone.low.tobytes() == of_all["out_of_domain", "model_flops", "envelope"].low.tobytes()


def test_nothing_is_told_beyond_what_both_reach():
    points = ladder({"dense": 1.0, "moe": FACTOR})
    finals = {family: [p.sets["docs"].nats_per_token for p in points if p.family == family and p.is_final]
              for family in ("dense", "moe")}  # fmt: skip
    found = factor_of(points)
    assert found.targets.max() == pytest.approx(min(max(losses) for losses in finals.values()))
    assert found.targets.min() == pytest.approx(max(min(losses) for losses in finals.values()))
    apart = factor_of(ladder({"dense": 1.0, "moe": 1000.0}))
    assert not len(apart.targets) and apart.reason.startswith("no loss is reached by both: dense goes from 3.5000 to")


def test_an_envelope_goes_by_the_best_checkpoints():
    """Where checkpoints on the way are as good as trained models of their compute, all methods agree."""
    points = ladder({"dense": 1.0, "moe": FACTOR}, sizes=tuple(np.geomspace(1e15, 3e16, 12)))
    envelope = factor_of(points, "envelope")
    assert envelope.targets.max() > factor_of(points).targets.max(), "it begins before the smallest trained model"
    trained = envelope.targets < factor_of(points).targets.max()
    assert np.median(envelope.factors[trained]) == pytest.approx(FACTOR, rel=0.05)


def test_numbers_are_the_same_to_the_bit_and_after_writing(tmp_path):
    points = ladder({"dense": 1.0, "moe": FACTOR}, seeds=SEEDS, deviation=0.01, text_se=0.01)
    write_points(tmp_path / "study.jsonl", points)
    again = read_points(tmp_path / "study.jsonl")
    assert again == points
    for one, other in zip(analyse(points, SETTINGS), analyse(again, SETTINGS), strict=True):
        for name in ("targets", "baseline_costs", "compared_costs", "low", "high", "shares"):
            assert getattr(one, name).tobytes() == getattr(other, name).tobytes()


SETTINGS = AnalysisSettings(num_replicates=50)


def test_noise_is_pooled_over_models():
    """By hand: two models of two seeds each, 0.02 and 0.04 apart: variances 0.0002 and 0.0008, mean 0.0005."""
    points = ladder({"dense": 1.0, "moe": FACTOR})
    changed = []
    for point in points:
        for seed, shift in {"dense-0": ((1, 0.0), (2, 0.02)), "moe-0": ((1, 0.0), (2, 0.04))}.get(
            point.model, ((1, 0.0),)
        ):
            score = point.sets["docs"]
            moved = type(score)(score.domain, score.tokens, score.nats_per_token + shift, 0.0)
            changed.append(type(point)(**(vars(point) | {"seed": seed, "sets": {"docs": moved}})))
    noise = noise_of(candidates_of(changed, "in_domain"))
    assert noise.degrees == 2
    assert noise.deviations[4_000_000] == pytest.approx(math.sqrt(0.0005))


def test_a_study_that_is_half_done_has_noise_too():
    """Second seeds that lack their end: the deviation is that of the last tokens at which a model has several."""
    points = ladder({"dense": 1.0, "moe": FACTOR}, seeds={"dense-0": 2, "moe-0": 2}, deviation=0.02)
    half = [point for point in points if point.seed == 1 or point.tokens <= 2_000_000]
    noise = noise_of(candidates_of(half, "in_domain"))
    assert (noise.degrees, noise.last_tokens) == (2, 2_000_000)
    assert noise.at(4_000_000) == noise.at(2_000_000) > 0.0
    found = factor_of(half, num_replicates=50)
    assert found.high[12] > found.low[12]


@pytest.mark.parametrize("text_noise", ["shared", "independent"])
def test_intervals_cover_as_often_as_they_say(text_noise):
    """Ladders drawn again and again, with luck of seeds and of texts, which is that of all models or each one's own: at
    every target, the first and the last too. Binomial bounds of 99.9 %; an interval that is open holds more."""
    generator = np.random.default_rng(11)
    confidence, num_targets, sizes = 0.9, 21, tuple(np.geomspace(1e15, 1.5e16, 4))
    told, covered = np.zeros(num_targets), np.zeros(num_targets)
    for repetition in range(REPETITIONS):
        is_shared = text_noise == "shared"
        points = ladder(
            {"dense": 1.0, "moe": FACTOR}, seeds=SEEDS, deviation=0.02, generator=generator, sizes=sizes,
            text_se=0.01, text_error=0.01 * generator.standard_normal() if is_shared else 0.0,
            own_text_error=0.0 if is_shared else 0.01,
        )  # fmt: skip
        found = factor_of(
            [point for point in points if point.is_final], num_replicates=150, num_targets=num_targets,
            confidence=confidence, seed=repetition, text_noise=text_noise,
        )  # fmt: skip
        told += ~np.isnan(found.low)
        covered += (found.low <= FACTOR) & (found.high >= FACTOR)
    spread = 3.3 * np.sqrt(confidence * (1 - confidence) / told)
    assert (told == REPETITIONS).all()
    assert (covered / told >= confidence - spread).all(), (covered / told).round(3)
    assert (covered / told <= (1 + confidence) / 2 + spread).all(), (covered / told).round(3)
    assert covered[10] / told[10] <= confidence + spread[10], "in the middle no interval is open"


def test_power_laws_take_what_they_miss_their_points_by_for_noise():
    """Every model lies 0.04 off its law, and seeds would move it by 0.01: 40 ladders."""
    generator, sizes = np.random.default_rng(5), tuple(np.geomspace(1e15, 3e16, 6))
    covered = 0
    for repetition in range(40):
        points = ladder(
            {"dense": 1.0, "moe": FACTOR}, seeds=SEEDS, deviation=0.01, generator=generator, sizes=sizes,
            own_text_error=0.04,
        )  # fmt: skip
        found = factor_of(
            [point for point in points if point.is_final], "fit", num_replicates=40, num_targets=3, seed=repetition
        )
        covered += bool(found.low[1] <= FACTOR <= found.high[1])
    assert covered >= 29, "binomial, 99.9 %"


def test_a_power_law_takes_trained_models_of_four_costs():
    """A second model at a cost that is there already is no fourth one: three parameters would meet three costs."""
    points = ladder({"dense": 1.0, "moe": FACTOR}, sizes=tuple(np.geomspace(1e15, 1.5e16, 4)))
    fits = dict(fits_of(points, "in_domain"))
    found = factor_of(points, "fit")
    assert [law.num_points for law in fits.values()] == [4, 4]
    np.testing.assert_allclose(found.baseline_costs, fits["dense"].cost_at(found.targets))
    cheap = points[0].paper_flops
    twice = [
        replace(point, paper_flops=point.paper_flops / 1.5e16 * cheap) if point.model == "moe-3" else point
        for point in points
    ]
    assert [family for family, _ in fits_of(twice, "in_domain")] == ["dense"]
    assert factor_of(twice, "fit").reason.startswith("moe has no power law: it takes trained models of 4 costs")


def test_a_family_of_one_model_says_so():
    points = [point for point in ladder({"dense": 1.0, "moe": FACTOR}) if point.model != "moe-0" or point.is_final]
    alone = [point for point in points if point.family == "dense" or point.model == "moe-0"]
    assert factor_of(alone).reason == (
        "moe is one point: a curve takes two trained models at least, the dearer one the better"
    )
    assert factor_of(alone, "envelope").reason.startswith("moe is one point: a curve takes two checkpoints")


def test_one_seed_and_no_standard_error_have_intervals_of_no_width():
    found = factor_of(ladder({"dense": 1.0, "moe": FACTOR}), num_replicates=20)
    assert found.low == pytest.approx(found.factors) and found.high == pytest.approx(found.factors)


def test_an_interval_is_open_where_replicates_are_beyond_a_family():
    """The first target is where the mixtures begin: half of the replicates begin below it, so that their factor is no
    less than what they say at their first model. The last is where the dense end: the same from the other side."""
    points = ladder({"dense": 1.0, "moe": FACTOR}, seeds=SEEDS, deviation=0.02)
    found = factor_of(points, num_replicates=200)
    assert np.isinf(found.high[[0, -1]]).all() and (found.shares[[0, -1]] < 0.9).all()
    assert (found.low[[0, -1]] < FACTOR).all() and (found.low[[0, -1]] > 1.0).all()
    assert np.isfinite(found.high[8:16]).all() and found.shares[12] == 1.0
    assert found.interval_text(0) == f"{found.low[0]:.2f} or more"
    assert found.interval_text(12) == f"{found.low[12]:.2f} to {found.high[12]:.2f}"
    settings = AnalysisSettings(num_replicates=200, baseline="moe", compared="dense")
    turned = factor(points, settings, "in_domain", "paper_flops", "trained")
    assert turned.low[0] == turned.low[-1] == 0.0 and np.isfinite(turned.high[[0, -1]]).all()
    assert turned.interval_text(0) == f"{turned.high[0]:.2f} or less"


def test_no_interval_where_replicates_bound_the_factor_on_no_side():
    """Both families end at the same loss, so that luck decides which of them reaches it."""
    ends_alike = ladder({"dense": 1.0, "moe": 1.0}, text_se=0.01)
    found = factor_of(ends_alike, num_replicates=200, text_noise="independent")
    assert np.isfinite(found.high[12])
    assert np.isnan(found.low[-1]) and np.isnan(found.high[-1]) and found.interval_text(24) == ""

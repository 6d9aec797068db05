"""The factor of ladders whose answer is known: two families on one power law, whose compute differs by a constant."""

import math

import numpy as np
import pytest

from megamoe.study.pictures import fits_of
from megamoe.study.points import read_points, write_points
from megamoe.study.schema import AnalysisSettings
from megamoe.study.speedup import analyse, candidates_of, factor, noise_of
from tests.unit.study_cases import SIZES, ladder

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


@pytest.mark.parametrize("text_noise", ["shared", "independent"])
def test_intervals_cover_as_often_as_they_say(text_noise):
    """Ladders drawn again and again, with luck of seeds and of texts, which is that of all models or each one's own.
    Binomial bounds of 99.9 %."""
    generator = np.random.default_rng(11)
    covered, confidence, sizes = 0, 0.9, tuple(np.geomspace(1e15, 1.5e16, 4))
    truth = factor_of(ladder({"dense": 1.0, "moe": FACTOR}, sizes=sizes))
    for repetition in range(REPETITIONS):
        is_shared = text_noise == "shared"
        points = ladder(
            {"dense": 1.0, "moe": FACTOR}, seeds=SEEDS, deviation=0.02, generator=generator, sizes=sizes,
            text_se=0.01, text_error=0.01 * generator.standard_normal() if is_shared else 0.0,
            own_text_error=0.0 if is_shared else 0.01,
        )  # fmt: skip
        found = factor_of(
            points, num_replicates=150, num_targets=5, confidence=confidence, seed=repetition, text_noise=text_noise
        )
        middle = 2
        expected = np.interp(-found.targets[middle], -truth.targets, truth.factors)
        covered += bool(found.low[middle] <= expected <= found.high[middle])
    spread = 3.3 * math.sqrt(confidence * (1 - confidence) / REPETITIONS)
    assert confidence - spread <= covered / REPETITIONS <= min(1.0, confidence + spread)


def test_power_laws_of_both_families_go_by_points_of_one_kind():
    """Where one family has too few trained models for a law, the other's does not go by its trained ones either."""
    points = ladder({"dense": 1.0, "moe": FACTOR}, sizes=tuple(np.geomspace(1e15, 1.5e16, 4)))
    fewer = [point for point in points if point.model != "moe-3"]
    settings = AnalysisSettings(num_replicates=0)
    for given, is_of_trained in ((points, True), (fewer, False)):
        fits = dict(fits_of(given, settings, "in_domain"))
        assert all((law.num_points == 4) == is_of_trained for law in fits.values()), fits
        found = factor(given, settings, "in_domain", "paper_flops", "fit")
        np.testing.assert_allclose(found.baseline_costs, fits["dense"].cost_at(found.targets))
        np.testing.assert_allclose(found.compared_costs, fits["moe"].cost_at(found.targets))


def test_one_seed_and_no_standard_error_have_intervals_of_no_width():
    found = factor_of(ladder({"dense": 1.0, "moe": FACTOR}), num_replicates=20)
    inside = np.isfinite(found.low)
    assert inside.any() and found.low[inside] == pytest.approx(found.factors[inside])
    assert found.high[inside] == pytest.approx(found.factors[inside])


def test_an_interval_needs_replicates_with_a_number():
    found = factor_of(ladder({"dense": 1.0, "moe": FACTOR}, seeds=SEEDS, deviation=0.05), num_replicates=200)
    assert np.isnan(found.low[0]) and np.isnan(found.high[-1]) and (found.shares[[0, -1]] < 0.9).all()
    assert found.shares.max() > 0.9 and len(SIZES) == 4

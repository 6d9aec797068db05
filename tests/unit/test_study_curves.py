"""What a family spends to reach a loss: interpolation held against a slow search, the law against numbers by hand."""

import itertools
import math

import numpy as np
import pytest

from megamoe.config.loading import load_config
from megamoe.config.presets import PRESETS
from megamoe.study.compute import paper_flops_per_token
from megamoe.study.curves import fit_power_law, lower_envelope

TRAINING_TOKENS = 300e9
# ZFLOPs of the paper's ten models, and where the authors' run lists say more digits, TFLOPs.
PAPER = {
    "dense-125m": (0.36, 363_560_141), "dense-355m": (1.06, None), "dense-1.3b": (3.57, None),
    "dense-2.7b": (7.08, None), "dense-6.7b": (17.12, 17_119_012_454), "dense-13b": (32.67, 32_673_054_720),
    "moe-15b": (0.43, 431_507_866), "moe-52b": (1.30, 1_300_118_212), "moe-207b": (4.53, 4_532_969_714),
    "moe-1.1t": (22.27, None),
}  # fmt: skip


@pytest.mark.parametrize("name", PAPER)
def test_compute_of_the_papers_models(name):
    zflops, tflops = PAPER[name]
    flops = TRAINING_TOKENS * paper_flops_per_token(load_config(name))
    assert round(flops / 1e21, 2) == zflops
    if tflops is not None:
        assert flops / 1e12 == pytest.approx(tflops, rel=2e-6)


def test_every_preset_of_the_paper_is_in_that_table():
    assert sorted(PAPER) == sorted(name for name, preset in PRESETS.items() if preset.family == "paper")


@pytest.mark.parametrize(
    ("layers", "hidden", "experts", "length"), [(4, 128, 0, 256), (6, 96, 8, 128), (12, 768, 512, 2048)]
)
def test_compute_is_the_closed_form(layers, hidden, experts, length):
    """96 L h^2 (1 + s / 6h + V / 16Lh) + 32 L h^2 with experts, as the paper writes it."""
    config = load_config(
        "laptop-moe",
        [f"model.num_layers={layers}", f"model.hidden_size={hidden}", f"moe.num_experts={experts}",
         f"model.seq_length={length}", "model.vocab_size=2000"],
    )  # fmt: skip
    for given, vocab in ((50_000, 50_000), (None, 2_000)):
        dense = 96 * layers * hidden**2 * (1 + length / (6 * hidden) + vocab / (16 * layers * hidden))
        expected = dense + (32 * layers * hidden**2 if experts else 0)
        assert paper_flops_per_token(config, vocab_size=given) == pytest.approx(expected, rel=1e-12)


def slow_cost(costs, losses, target: float) -> float:
    """The least cost on the way from each point that is better than all cheaper ones to the next, found by walking."""
    points = sorted(zip(costs, losses, strict=True))
    kept = [point for point in points if all(other[1] > point[1] for other in points if other < point)]
    if not kept[-1][1] <= target <= kept[0][1]:
        return math.nan
    for (cheap, worse), (dear, better) in itertools.pairwise(kept):
        steps = 200_000
        share = np.arange(steps + 1) / steps
        reached = worse + share * (better - worse) <= target
        if reached.any():
            return math.exp(math.log(cheap) + share[reached.argmax()] * (math.log(dear) - math.log(cheap)))
    return kept[0][0]


@pytest.mark.parametrize("seed", range(8))
def test_interpolation_is_that_of_a_slow_search(seed):
    generator = np.random.default_rng(seed)
    costs = np.exp(generator.uniform(0, 8, 9))
    losses = 5 - 0.3 * np.log(costs) + generator.normal(0, 0.3, 9)
    curve = lower_envelope(costs, losses)
    assert (np.diff(curve.costs) > 0).all() and (np.diff(curve.losses) < 0).all()
    targets = np.linspace(losses.min() - 0.3, losses.max() + 0.3, 21)
    found = curve.cost_at(targets)
    expected = [slow_cost(costs, losses, target) for target in targets]
    assert found == pytest.approx(expected, rel=1e-4, nan_ok=True)
    assert np.isnan(found[0]) and np.isnan(found[-1]), "beyond what was seen there is no number"


def test_a_point_that_a_cheaper_one_equals_is_left_out():
    curve = lower_envelope([4.0, 1.0, 2.0, 1.0, 8.0], [2.0, 3.0, 3.0, 3.5, 2.5])
    assert curve.costs.tolist() == [1.0, 4.0] and curve.losses.tolist() == [3.0, 2.0]
    assert curve.cost_at(np.array([3.0, 2.5, 2.0])).tolist() == pytest.approx([1.0, 2.0, 4.0])


@pytest.mark.parametrize(("offset", "scale", "exponent"), [(2.0, 1.5, 0.3), (0.0, 3.0, 0.05), (1.2, 0.7, 1.1)])
def test_a_law_is_found_again(offset, scale, exponent):
    costs = np.geomspace(1e15, 1e18, 7)
    unit = float(np.exp(np.log(costs).mean()))
    losses = offset + scale * (costs / unit) ** -exponent
    law = fit_power_law(costs, losses)
    assert law is not None and law.misfit < 2e-5
    assert law.loss_at(np.array([3e16])) == pytest.approx(offset + scale * (3e16 / unit) ** -exponent, abs=1e-5)
    targets = np.array([losses[1], losses[4], losses[0] + 0.01, losses[-1] - 0.01])
    assert law.cost_at(targets)[:2] == pytest.approx([costs[1], costs[4]], rel=1e-3)
    assert np.isnan(law.cost_at(targets)[2:]).all()


def test_a_law_is_the_best_in_squares():
    """No neighbour in any of the three parameters has smaller residuals."""
    generator = np.random.default_rng(3)
    costs = np.geomspace(1.0, 300.0, 9)
    losses = 2.0 + 1.5 * costs**-0.4 + generator.normal(0, 0.02, 9)
    law = fit_power_law(costs, losses)
    assert law is not None
    best = float((law.residuals**2).sum())
    for offset, scale, exponent in 0.01 * np.concatenate([np.eye(3), -np.eye(3)]):
        moved = law.offset + offset + (law.scale + scale) * (costs / law.unit) ** -(law.exponent + exponent)
        assert ((losses - moved) ** 2).sum() > best


def test_too_few_points_and_no_fall_have_no_law():
    assert fit_power_law([1.0, 2.0, 4.0], [3.0, 2.0, 1.5]) is None
    assert fit_power_law([1.0, 2.0, 4.0, 4.0], [3.0, 2.0, 1.5, 1.6]) is None, "three costs, whose law would be exact"
    assert fit_power_law([1.0, 2.0, 4.0, 8.0], [1.0, 2.0, 3.0, 4.0]) is None

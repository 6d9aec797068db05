"""The learning rate at exact steps: every row of the paper, every schedule, before and beyond its ends."""

import math
import subprocess
import sys

import pytest

from megamoe.config import load_config
from megamoe.config.schema import OptimizerConfig
from megamoe.training.lr_schedule import learning_rate

# Peak rate, warm-up updates and updates of each published run (Artetxe et al. 2021, arXiv 2112.10684; batch in 1024**2
# tokens, updates = 300e9 // batch).
PAPER = {
    "dense-125m": (6e-4, 750, 572_204),
    "dense-355m": (3e-4, 715, 572_204),
    "dense-1.3b": (2e-4, 357, 286_102),
    "dense-2.7b": (1.6e-4, 357, 286_102),
    "dense-6.7b": (1.2e-4, 187, 143_051),
    "dense-13b": (1e-4, 187, 143_051),
    "moe-15b": (6e-4, 750, 572_204),
    "moe-52b": (3e-4, 715, 572_204),
    "moe-207b": (1.6e-4, 2000, 286_102),
    "moe-1.1t": (1.2e-4, 187, 143_051),
}


def rates(steps, num_steps=100, **settings) -> dict[int, float]:
    optimizer = OptimizerConfig(lr=1.0, **settings)
    return {step: learning_rate(optimizer, step, num_steps) for step in steps}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_runs_rise_linearly_and_fall_linearly_to_zero(name):
    config = load_config(name)
    peak, warmup, last = PAPER[name]

    def rate(step: int) -> float:
        return learning_rate(config.optimizer, step, config.run.num_steps)

    assert rate(1) == pytest.approx(peak / warmup, rel=1e-12)
    assert rate(warmup - 1) == pytest.approx(peak * (warmup - 1) / warmup, rel=1e-12)
    assert rate(warmup) == pytest.approx(peak, rel=1e-12)
    assert rate(warmup + 1) == pytest.approx(peak * (1 - 1 / (last - warmup)), rel=1e-12)
    quarter = (last - warmup) // 4
    assert rate(warmup + quarter) == pytest.approx(peak * (1 - quarter / (last - warmup)), rel=1e-12)
    assert rate(last - 1) == pytest.approx(peak / (last - warmup), rel=1e-6)
    assert rate(last) == 0.0


def test_points_of_the_largest_run():
    config = load_config("moe-1.1t")
    expected = {1: 6.4171122994652e-7, 100: 6.4171122994652e-5, 187: 1.2e-4, 71_619: 6e-5, 107_335: 3e-5, 143_051: 0.0}
    for step, rate in expected.items():
        assert learning_rate(config.optimizer, step, config.run.num_steps) == pytest.approx(rate, rel=1e-12)


def test_linear_to_a_lowest_rate_and_not_below():
    points = rates([5, 10, 55, 100, 101, 500], schedule="linear", warmup_steps=10, min_lr=0.2)
    assert points == pytest.approx({5: 0.5, 10: 1.0, 55: 0.6, 100: 0.2, 101: 0.2, 500: 0.2}, rel=1e-12)


def test_warm_up_starts_from_zero_even_with_a_lowest_rate():
    assert rates([0, 1, 4], schedule="cosine", warmup_steps=4, min_lr=0.9) == {0: 0.0, 1: 0.25, 4: 1.0}


def test_without_warm_up_the_first_step_has_begun_to_fall():
    assert rates([1, 50, 100], schedule="linear") == {1: 0.99, 50: 0.5, 100: 0.0}


def test_cosine():
    points = rates([10, 20, 40, 60, 100, 140], schedule="cosine", warmup_steps=20, min_lr=0.1)
    quarter = 0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5))
    expected = {10: 0.5, 20: 1.0, 40: quarter, 60: 0.55, 100: 0.1, 140: 0.1}
    assert points == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("schedule", "middle"), [("linear", 0.5), ("cosine", 0.5)])
def test_decay_may_end_before_the_run_or_after(schedule, middle):
    early = rates([20, 35, 50, 51, 100], schedule=schedule, warmup_steps=20, decay_steps=50)
    assert early == pytest.approx({20: 1.0, 35: middle, 50: 0.0, 51: 0.0, 100: 0.0}, abs=1e-12)
    late = rates([20, 100], schedule=schedule, warmup_steps=20, decay_steps=180)
    assert late == pytest.approx({20: 1.0, 100: middle}, rel=1e-12)


def test_warm_up_stable_decay():
    settings = {"schedule": "wsd", "warmup_steps": 10, "wsd_decay_steps": 40, "min_lr": 0.2}
    points = rates([5, 10, 11, 60, 61, 80, 100, 120], **settings)
    expected = {5: 0.5, 10: 1.0, 11: 1.0, 60: 1.0, 61: 0.98, 80: 0.6, 100: 0.2, 120: 0.2}
    assert points == pytest.approx(expected, rel=1e-12)


def test_warm_up_stable_decay_falls_over_a_tenth_by_default():
    assert rates([90, 95, 100], schedule="wsd") == pytest.approx({90: 1.0, 95: 0.5, 100: 0.0})
    assert rates([4, 5], num_steps=5, schedule="wsd") == {4: 1.0, 5: 0.0}, "at least one step"


def test_the_decay_of_wsd_never_reaches_into_the_warm_up():
    points = rates([80, 90, 100], schedule="wsd", warmup_steps=80, wsd_decay_steps=60)
    assert points == pytest.approx({80: 1.0, 90: 0.5, 100: 0.0})


def test_constant():
    assert rates([1, 4, 5, 1000], schedule="constant", warmup_steps=4) == {1: 0.25, 4: 1.0, 5: 1.0, 1000: 1.0}


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_a_warm_up_as_long_as_the_run_ends_at_the_peak(schedule):
    assert rates([100, 101], schedule=schedule, warmup_steps=100) == {100: 1.0, 101: 0.0}


def test_no_torch():
    code = "import sys, megamoe.training.lr_schedule, megamoe.training.batch_size; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0

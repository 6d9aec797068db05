"""Whole runs: against published figures of failures, and against runs that are simulated failure by failure."""

import math
import random

import pytest

from megamoe.config.loading import load_config
from megamoe.plan.cluster import load_cluster
from megamoe.plan.lifetime import best_interval, checkpoint_bytes, lifetime, lost_share

CONFIG = load_config("moe-1.1t")
CLUSTER = load_cluster("a100-80gb")
HOUR = 3600


@pytest.mark.parametrize(
    ("failures", "between_hours", "write", "interval_minutes", "lost"),
    [(6.5e-3, 58, 30, 59, 0.017), (6.5e-3, 58, 300, 186, 0.054), (6.5e-3, 58, 1200, 372, 0.108),
     (1.6e-2, 23, 30, None, 0.027), (1.6e-2, 23, 300, None, 0.085), (1.6e-2, 23, 1200, None, 0.169)],
)  # fmt: skip
def test_64_nodes_lose_what_the_failure_budget_says(failures, between_hours, write, interval_minutes, lost):
    """Young's interval and share, restarts not counted."""
    between = 24 * HOUR / failures / 64
    assert between == pytest.approx(between_hours * HOUR, rel=0.02)
    interval = best_interval(write, between)
    if interval_minutes:
        assert interval == pytest.approx(interval_minutes * 60, rel=0.05)
    assert lost_share(interval, write, between, 0) == pytest.approx(lost, rel=0.06)


def simulated_share(interval: float, write: float, between: float, restart: float) -> float:
    """Of a long run with random failures, the share of time in which no work was done that lasted."""
    rng, clock, done, goal = random.Random(7), 0.0, 0.0, 3000 * interval
    failure = rng.expovariate(1 / between)
    while done < goal:
        end = clock + interval + write
        if failure >= end:
            clock, done = end, done + interval
            continue
        clock = failure + restart
        failure = clock + rng.expovariate(1 / between)
    return 1 - done / clock


@pytest.mark.parametrize(("write", "restart"), [(30, 600), (300, 600), (600, 1200)])
def test_lost_time_is_that_of_simulated_runs(write, restart):
    between = 50 * HOUR
    interval = best_interval(write, between)
    expected = simulated_share(interval, write, between, restart)
    assert lost_share(interval, write, between, restart) == pytest.approx(expected, rel=0.1)


def test_no_other_interval_loses_less_in_simulation():
    write, between = 300, 30 * HOUR
    best = best_interval(write, between)
    shares = [simulated_share(factor * best, write, between, 600) for factor in (0.4, 1.0, 2.5)]
    assert shares[1] < min(shares[0], shares[2])


def test_a_checkpoint_holds_weight_and_two_moments_of_every_parameter():
    assert checkpoint_bytes(CONFIG) == 12 * 1_104_219_021_312  # 13.25 TB
    assert checkpoint_bytes(load_config("moe-1.1t", ["optimizer.name=sgd"])) == 4 * 1_104_219_021_312


def test_days_and_gpu_hours_of_the_papers_budget():
    """300 G tokens at 638k tokens/s are 5.4 days (as published)."""
    step = 2 * 1024**2 / 638_000
    life = lifetime(CONFIG, CLUSTER, 512, step, num_tokens=300 * 10**9)
    assert life.num_steps == math.ceil(300e9 / 2 / 1024**2)
    assert life.days_without_failures == pytest.approx(5.44, rel=0.01)
    assert life.days == pytest.approx(life.days_without_failures / (1 - life.lost_share))
    assert life.gpu_hours == pytest.approx(life.days * 24 * 512)
    assert life.checkpoint_seconds == pytest.approx(13.25e12 / 64e9, rel=0.001)
    assert life.failures_expected == pytest.approx(life.days * 64 * 6.5e-3)
    assert life.save_interval_steps == pytest.approx(life.save_interval_seconds / step, abs=0.5)
    assert lifetime(CONFIG, CLUSTER, 512, step).num_steps == CONFIG.run.num_steps


def test_saving_beside_training_loses_less_and_no_failures_lose_nothing():
    waiting = lifetime(CONFIG, CLUSTER, 512, 3.3)
    beside = lifetime(CONFIG, CLUSTER, 512, 3.3, async_save=True)
    assert beside.lost_share < waiting.lost_share
    assert beside.blocking_seconds == 0
    safe = lifetime(CONFIG, CLUSTER.model_copy(update={"failures_per_node_day": 0.0}), 512, 3.3)
    assert safe.days == safe.days_without_failures
    assert safe.save_interval_steps == 0 and safe.failures_expected == 0

"""The cluster `cpu` is measured: plausible, whole, fast, and of use to a plan."""

import time

import pytest
import torch

from megamoe.config.loading import load_config
from megamoe.dry_run.this_machine import measure_cpu
from megamoe.plan.cluster import figures
from megamoe.plan.timing import step_time
from tests.unit.plan_cases import plain_collectives


@pytest.fixture(scope="module")
def cluster():
    return measure_cpu(8)


def test_it_is_measured_in_seconds_and_leaves_torch_as_it_was(tmp_path):
    threads, start = torch.get_num_threads(), time.perf_counter()
    torch.set_num_threads(2)
    try:
        alone = measure_cpu(1, tmp_path)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert time.perf_counter() - start < 20
    assert list(tmp_path.iterdir()) == []
    assert alone.ranks_per_node == 1


def test_every_figure_has_a_source_and_is_plausible(cluster):
    assert set(cluster.sources) == set(figures(cluster))
    assert 1e8 < cluster.peak("fp32") < 1e12
    assert 1e8 < cluster.memory_bytes_per_second < 1e12
    assert 1e6 < cluster.intra_node.bytes_per_second < 1e11
    assert 1e-7 < cluster.intra_node.latency_seconds < 1e-1
    assert 1e6 < cluster.storage_bytes_per_second_per_node < 1e11
    assert 0 < cluster.efficiency.attention <= 1
    assert cluster.efficiency.layer_overhead_seconds > 1e-6


def test_a_plan_can_be_made_for_it(cluster):
    config = load_config("quickstart")
    step = step_time(config, cluster, 8, lambda rank: plain_collectives(config, 8, rank))
    assert 0.01 < step.seconds < 60
    assert 0 < step.model_flops_utilisation < 1

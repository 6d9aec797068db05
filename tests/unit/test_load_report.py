"""What the report makes of counted loads, on cases whose answers are plain."""

import math

import pytest
import torch

from megamoe.config.schema import MoEConfig
from megamoe.moe.routing import route
from megamoe.moe.statistics import LoadStatistics
from megamoe.training.report import _local_rows, load_loss, load_metrics, summarize


def rows(demand: list[float], dropped: list[float], sums: list[float], count: float) -> torch.Tensor:
    return torch.tensor([[*demand, *dropped, *sums, count]], dtype=torch.float64)


def test_an_even_load() -> None:
    report = summarize(rows([8.0] * 10, [0.0, 0.0], [3.0, 6.0, 48.0], 3), {1: 10}, 2)
    assert (report.balance_loss, report.z_loss, report.router_logit_rms) == (1.0, 2.0, 4.0)
    assert report.entropy == pytest.approx(1.0)
    assert (report.top_fifth_share, report.bottom_fifth_share) == pytest.approx((0.2, 0.2))
    assert (report.max_over_mean, report.unused_experts, report.dropped_by_choice) == (1.0, 0, [0.0, 0.0])


def test_a_crowded_load_and_drops_of_each_choice() -> None:
    report = summarize(rows([70.0, 20.0, 0.0, 10.0, 0.0], [10.0, 25.0], [0.0] * 3, 1), {0: 5}, 2)
    assert report.entropy == pytest.approx(-sum(p * math.log(p) for p in (0.7, 0.2, 0.1)) / math.log(5))
    assert (report.top_fifth_share, report.bottom_fifth_share, report.unused_experts) == pytest.approx((0.7, 0.0, 2))
    assert report.dropped_by_choice == pytest.approx([0.2, 0.5]) and report.dropped_fraction == pytest.approx(0.35)


def test_in_a_pyramid_every_layer_is_measured_by_its_own_experts() -> None:
    """Of 3 experts one is idle, 10 have an even load: the padding of the shorter rows is nobody."""
    demands = [[24.0, 6.0], [15.0, 15.0, 0.0], [4.0] * 10]
    padded = torch.cat([
        rows(demand + [0.0] * (10 - len(demand)), [dropped], [balance, 0.0, 0.0], 1)
        for demand, dropped, balance in zip(demands, [3.0, 0.0, 0.0], [2.0, 1.5, 1.0], strict=True)
    ])  # fmt: skip
    report = summarize(padded, {0: 2, 2: 3, 5: 10}, 1)
    of_first = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2)) / math.log(2)
    assert report.entropy == pytest.approx((of_first + math.log(2) / math.log(3) + 1.0) / 3)
    assert report.unused_experts == 1
    assert report.max_over_mean == pytest.approx(24.0 / 15.0)
    assert report.top_fifth_share == pytest.approx((0.8 + 0.5 + 0.2) / 3)  # a fifth of 2 or 3 is one, of 10 two
    assert report.bottom_fifth_share == pytest.approx((0.2 + 0.0 + 0.2) / 3)
    assert report.by_layer == dict(zip((0, 2, 5), demands, strict=True))
    assert report.dropped_fraction == pytest.approx(3 / 100) and report.balance_loss == 4.5


def test_rows_of_layers_of_different_size_are_padded_to_the_largest() -> None:
    statistics = LoadStatistics()
    for layer, size in {0: 2, 2: 4}.items():
        logits = torch.arange(3 * size, dtype=torch.float32).view(3, size)  # everyone wants the last expert
        routing = route(logits, top_k=1, capacity=2, normalize=False)
        statistics.record(layer, routing, torch.tensor(1.0 + layer), logits=logits)
    found = _local_rows(statistics, {0: 2, 1: 3, 2: 4}, 1)
    assert found[:, :5].tolist() == [[0, 3, 0, 0, 1], [0] * 5, [0, 0, 0, 3, 1]]
    assert found[:, [5, 8]].tolist() == [[1.0, 1.0], [0.0, 0.0], [3.0, 1.0]]


def test_nothing_counted_is_no_division_by_zero() -> None:
    report = summarize(torch.zeros(2, 4 + 1 + 4, dtype=torch.float64), {1: 4, 3: 4}, 1)
    assert (report.entropy, report.unused_experts, report.router_logit_rms) == (0.0, 8, 0.0)


def test_counts_come_from_the_layer_as_they_are() -> None:
    logits = torch.tensor([[3.0, 2.0, 0.0], [3.0, 0.0, 2.0], [3.0, 2.0, 0.0]])
    statistics = LoadStatistics()
    routing = route(logits, top_k=2, capacity=1, normalize=True)
    for _ in range(2):
        statistics.record(5, routing, torch.tensor(1.5), z_loss=torch.tensor(4.0), logits=logits)
    load = statistics.take()[5]
    assert load.dropped_by_choice.tolist() == [4.0, 2.0]
    assert load.sums.tolist() == pytest.approx([3.0, 8.0, 2 * float(logits.square().mean())])


def test_the_keys_of_a_line_and_the_loss() -> None:
    report = summarize(rows([8.0] * 4, [0.0], [3.0, 6.0, 48.0], 3), {1: 4}, 1)
    moe = MoEConfig(num_experts=4, top_k=1, normalize_gates=False, balance_loss_coeff=0.1, z_loss_coeff=0.01)
    assert load_loss(moe, report) == pytest.approx(0.1 * 1.0 + 0.01 * 2.0) and load_loss(moe, None) == 0.0
    metrics = load_metrics(moe, report)
    assert metrics["z_loss"] == 2.0 and "dropped_second_fraction" not in metrics

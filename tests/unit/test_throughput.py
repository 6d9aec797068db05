"""What a run says of its speed and of its experts, from numbers that are known."""

import pytest

from megamoe.config import load_config
from megamoe.config.schema import Corpus
from megamoe.data.datasets import corpus_names
from megamoe.training.held_out import perplexity
from megamoe.training.report import LoadMeter, LoadReport
from megamoe.training.throughput import known_peak, rates


@pytest.mark.parametrize(
    ("device", "precision", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "fp16", 756e12),
        ("NVIDIA H200", "fp32", 67e12),
        ("Tesla V100-SXM2-32GB", "fp16", 125e12),
        ("NVIDIA GeForce RTX 3090", "bf16", None),
    ],
)
def test_peaks_are_those_of_data_sheets_or_unknown(device, precision, peak):
    assert known_peak(device, precision) == peak


def test_peaks_are_those_that_plans_take():
    from megamoe.plan.cluster import load_cluster

    devices = {"a100-80gb": "NVIDIA A100-SXM4-80GB", "h100-80gb": "NVIDIA H100 80GB HBM3", "h800": "NVIDIA H800",
               "h200": "NVIDIA H200", "v100-32gb": "Tesla V100-SXM2-32GB"}  # fmt: skip
    for cluster, device in devices.items():
        for precision, peak in load_cluster(cluster).peak_flops_per_second:
            assert peak is None or known_peak(device, precision) == peak, (cluster, precision)


def test_utilization_counts_no_recompute_and_no_idle_experts():
    base = load_config("laptop-moe")
    plain = rates(base, 4, 1000.0, 1e12)
    more = rates(load_config("laptop-moe", ["moe.num_experts=64", "parallel.recompute=full"]), 4, 1000.0, 1e12)
    gate = 6 * base.model.hidden_size * (64 - base.moe.num_experts) * 1000.0 * base.model.num_layers / 2
    assert more["model_flops_per_second"] == pytest.approx(plain["model_flops_per_second"] + gate)
    assert more["hardware_flops_per_second"] > 1.2 * more["model_flops_per_second"]
    assert "hardware_flops_per_second" not in plain
    assert plain["flops_utilization"] == plain["model_flops_per_second"] / 4e12
    assert plain["tokens_per_second_per_rank"] == 250.0
    assert "flops_utilization" not in rates(base, 4, 1000.0, None)


def load_of(demand: dict[int, list[float]]) -> LoadReport:
    return LoadReport(0, 0, 0, [0.0], 1, 1, 0, 0, 0, 0, by_layer=demand)


def test_loads_are_summed_over_an_interval_and_dead_is_who_got_nothing_in_all_of_it():
    recorded = []
    meter = LoadMeter(10, lambda step, loads: recorded.append((step, loads)))
    meter.begin(7)
    assert meter.add(8, load_of({1: [0, 2, 0], 3: [0, 1, 1]})) == {}
    assert meter.add(12, load_of({1: [1, 1, 0], 3: [0, 2, 0]})) == {"dead_experts": 2}
    assert meter.add(16, load_of({1: [5, 0, 0], 3: [1, 0, 0]})) == {}
    assert meter.add(20, load_of({1: [0, 0, 1], 3: [0, 1, 1]})) == {"dead_experts": 1}
    assert recorded == [(12, {1: [1, 3, 0], 3: [0, 3, 1]}), (20, {1: [5, 0, 1], 3: [1, 1, 1]})]
    silent = LoadMeter(0, lambda step, loads: pytest.fail("nobody asked"))
    assert silent.add(10, load_of({1: [1, 1, 1]})) == {}


def test_names_of_corpora_are_no_two_the_same():
    def names(*corpora: Corpus) -> tuple[str, ...]:
        return corpus_names(corpora)

    assert names(Corpus(path="data/books")) == ()
    assert names(Corpus(path="data/books", name="novels")) == ("novels",)
    several = (Corpus(path="a/text"), Corpus(path="b/text"), Corpus(path="c/web", name="text_2"), Corpus(path="d/web"))
    assert names(*several) == ("text", "text_2", "text_2_2", "web")


def test_perplexity_of_no_number_is_none_and_of_a_large_one_is_bounded():
    assert perplexity(float("inf")) != perplexity(float("inf"))
    assert perplexity(1e4) == pytest.approx(1.0142320547350045e304)

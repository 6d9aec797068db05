"""The router against the literal transcription of the paper's gate, and proof that this comparison has teeth."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megamoe.moe import losses, routing
from megamoe.topology.capacity import expert_capacity
from tests.parity.gate_reference import gate_of_k, paper_capacity, paper_gate

Logits = list[list[float]]
THOROUGH = settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)


@st.composite
def gate_logits(draw: st.DrawFn, min_experts: int = 2) -> Logits:
    """Logits [S][E] without near-ties (0.17 apart at least); often one expert is crowded, often S < E."""
    num_experts = draw(st.integers(min_experts, 8))
    num_tokens = draw(st.integers(1, 24))
    crowded = draw(st.integers(0, num_experts - 1))
    extra = draw(st.sampled_from([0.0, 1.03, 4.07]))
    rows = draw(st.lists(st.permutations(range(num_experts)), min_size=num_tokens, max_size=num_tokens))
    return [[0.4 * rank + (extra if e == crowded else 0.0) for e, rank in enumerate(row)] for row in rows]


def tied_logits(num_experts: int) -> st.SearchStrategy[Logits]:
    """Logits that are only 0 or 1: nearly every choice is among equals."""
    row = st.lists(st.sampled_from([0.0, 1.0]), min_size=num_experts, max_size=num_experts)
    return st.lists(row, min_size=1, max_size=16)


@dataclass(frozen=True)
class Gate:
    """The three decisions under test; the defaults are the product's."""

    capacity: Callable[[int, int], int]
    route: Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]  # logits, capacity -> expert, gate, kept [S, 2]
    balance_loss: Callable[[Tensor, Tensor], Tensor]  # probabilities [S, E], expert [S, 2]


def _route(logits: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    routed = routing.route(logits, top_k=2, capacity=capacity, normalize=True)
    return routed.expert_index, routed.gate, routed.kept


PRODUCT = Gate(
    capacity=lambda num_tokens, num_experts: expert_capacity(num_tokens, num_experts, 2, 1.0),
    route=_route,
    balance_loss=lambda probabilities, expert: losses.balance_loss(probabilities, expert, "first_choice"),
)


def check(gate: Gate, logits: Logits) -> int:
    """Hold `gate` against the paper on one case; how many choices were dropped."""
    num_tokens, num_experts = len(logits), len(logits[0])
    capacity = gate.capacity(num_tokens, num_experts)
    assert capacity == paper_capacity(num_tokens, num_experts)
    expected = paper_gate(logits, capacity)
    tensor = torch.tensor(logits, dtype=torch.float32)
    expert, weight, kept = gate.route(tensor, capacity)
    assert expert.tolist() == [list(row) for row in expected.choices]
    assert kept.tolist() == [list(row) for row in expected.kept]
    torch.testing.assert_close(weight, torch.tensor(expected.gates), atol=2e-6, rtol=0)
    assert (weight[~kept] == 0).all()
    balance_loss = gate.balance_loss(tensor.softmax(-1), expert)
    assert float(balance_loss) == pytest.approx(expected.balance_loss, rel=2e-6)
    return sum(row.count(False) for row in expected.kept)


@THOROUGH
@given(gate_logits())
def test_router_is_the_papers_gate(logits: Logits) -> None:
    check(PRODUCT, logits)


@settings(THOROUGH, max_examples=50)
@given(st.integers(2, 5).flatmap(tied_logits))
def test_of_equal_experts_the_lowest_is_chosen(logits: Logits) -> None:
    check(PRODUCT, logits)


@settings(THOROUGH, max_examples=100)
@given(gate_logits(min_experts=4), st.integers(1, 4), st.one_of(st.none(), st.integers(1, 6)), st.booleans())
def test_router_with_other_choices_capacities_and_raw_gates(
    logits: Logits, top_k: int, capacity: int | None, normalize: bool
) -> None:
    expected = gate_of_k(logits, capacity, top_k, normalize=normalize)
    routed = routing.route(torch.tensor(logits), top_k=top_k, capacity=capacity, normalize=normalize)
    assert routed.expert_index.tolist() == [list(row) for row in expected.choices]
    assert routed.kept.tolist() == [list(row) for row in expected.kept]
    torch.testing.assert_close(routed.gate, torch.tensor(expected.gates), atol=2e-6, rtol=0)


@settings(THOROUGH, max_examples=50)
@given(gate_logits())
def test_balance_loss_of_all_choices(logits: Logits) -> None:
    """Every choice counts, as a share of all k * S of them."""
    probabilities = torch.tensor(logits, dtype=torch.float64).softmax(-1)
    choices = [expert for row in paper_gate(logits, capacity=1).choices for expert in row]
    num_experts = len(logits[0])
    share = [choices.count(e) / len(choices) for e in range(num_experts)]
    expected = num_experts * sum(float(probabilities[:, e].mean()) * share[e] for e in range(num_experts))
    expert = torch.tensor(choices).view(-1, 2)
    assert float(losses.balance_loss(probabilities.float(), expert, "all_choices")) == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25, 2.0])
def test_capacity_is_choices_times_the_rounded_share(factor: float) -> None:
    for num_tokens in range(1, 50):
        for num_experts in range(2, 10):
            for top_k in (1, 2, 3):
                expected = top_k * math.ceil(factor * num_tokens / num_experts)
                assert expert_capacity(num_tokens, num_experts, top_k, factor) == expected


def test_gate_of_k_is_the_papers_gate_for_two() -> None:
    for logits in cases():
        capacity = paper_capacity(len(logits), len(logits[0]))
        general, paper = gate_of_k(logits, capacity, 2, normalize=True), paper_gate(logits, capacity)
        assert general[:3] == paper[:3]
        assert general.balance_loss == pytest.approx(paper.balance_loss, rel=1e-12)


# ---------------------------------------------------------------- does the comparison notice a wrong gate?


def cases() -> list[Logits]:
    """A hundred cases of mixed sizes, some with a crowded expert."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for i in range(100):
        num_tokens, num_experts = 1 + i % 23, 2 + i % 7
        logits = torch.randn(num_tokens, num_experts, generator=generator)
        logits[:, 0] += i % 3
        out.append(logits.tolist())
    return out


def another_gate(wrong: str | None) -> Gate:
    """A gate written a second time, with one rule of the paper broken as `wrong` says."""

    def capacity(num_tokens: int, num_experts: int) -> int:
        if wrong == "capacity rounded after doubling":
            return math.ceil(2 * num_tokens / num_experts)
        return 2 * math.ceil(num_tokens / num_experts)

    def route(logits: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
        probabilities = logits.softmax(-1)
        weight, expert = probabilities.sort(dim=-1, descending=True, stable=True)
        weight, expert = weight[:, :2], expert[:, :2]
        by_position = wrong == "second choices compete with first ones"
        queue = (expert if by_position else expert.T).reshape(-1)
        one_hot = torch.nn.functional.one_hot(queue, logits.shape[1])
        place = ((one_hot.cumsum(0) - 1) * one_hot).sum(-1)
        kept = place < capacity
        kept = kept.view(-1, 2) if by_position else kept.view(2, -1).T
        if wrong == "renormalised before dropping":
            return expert, weight / weight.sum(-1, keepdim=True) * kept, kept
        weight = weight * kept
        return expert, weight / weight.sum(-1, keepdim=True).clamp_min(1e-30), kept

    def balance_loss(probabilities: Tensor, expert: Tensor) -> Tensor:
        counted = expert if wrong == "balance over both choices" else expert[:, :1]
        share = torch.bincount(counted.flatten(), minlength=probabilities.shape[1]) / counted.numel()
        return probabilities.shape[1] * (probabilities.mean(0) * share).sum()

    return Gate(capacity, route, balance_loss)


def num_caught(gate: Gate) -> int:
    caught = 0
    for logits in cases():
        try:
            check(gate, logits)
        except AssertionError:
            caught += 1
    return caught


def test_a_second_right_gate_passes_and_drops_occur() -> None:
    gate = another_gate(None)
    assert sum(check(gate, logits) for logits in cases()) > 100


@pytest.mark.parametrize(
    "wrong",
    [
        "renormalised before dropping",
        "second choices compete with first ones",
        "capacity rounded after doubling",
        "balance over both choices",
    ],
)
def test_a_wrong_rule_is_noticed(wrong: str) -> None:
    assert num_caught(another_gate(wrong)) >= 10

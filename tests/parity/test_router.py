"""Every router, drop policy and the balance bias against the literal references, on drawn cases."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megamoe.config.schema import MoEConfig
from megamoe.moe.balance_bias import BalanceBias
from megamoe.moe.routers import build_router
from megamoe.moe.routing import settle
from tests.parity import router_reference as reference

THOROUGH = settings(
    max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)
ROUTERS = {
    "softmax": (reference.softmax_router, {}),
    "mixtral": (reference.mixtral_router, {"gate_order": "select_then_softmax"}),
    "sigmoid": (reference.sigmoid_router, {"score_function": "sigmoid"}),
}
Logits = list[list[float]]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Logits, int, tuple[int, int] | None]:
    """Logits [S][8] without near-ties, k, and (groups, selected) or None. Offsets by token keep weights apart too."""
    num_experts = 8
    rows = draw(st.lists(st.permutations(range(num_experts)), min_size=1, max_size=16))
    crowded, extra = draw(st.integers(0, num_experts - 1)), draw(st.sampled_from([0.0, 1.03]))
    logits = [
        [0.31 * rank + 0.0137 * token + 0.0011 * token * rank + (extra if e == crowded else 0.0)
         for e, rank in enumerate(row)]
        for token, row in enumerate(rows)
    ]  # fmt: skip
    top_k = draw(st.integers(1, 4))
    groups = draw(st.sampled_from([None, (4, 2), (2, 1), (4, 3), (8, 4), (1, 1)]))
    return logits, top_k, groups


def config_of(top_k: int, groups: tuple[int, int] | None, **keys: object) -> MoEConfig:
    num_groups, num_selected = groups or (None, None)
    return MoEConfig(
        num_experts=8, top_k=top_k, num_expert_groups=num_groups, num_selected_groups=num_selected, **keys
    )


@pytest.mark.parametrize("name", ROUTERS)
@THOROUGH
@given(case=cases())
def test_router_is_its_reference(name: str, case: tuple[Logits, int, tuple[int, int] | None]) -> None:
    logits, top_k, groups = case
    literal, keys = ROUTERS[name]
    expected = literal(logits, top_k, groups)
    choice = build_router(config_of(top_k, groups, **keys))(torch.tensor(logits))
    assert choice.expert_index.tolist() == expected.choices
    torch.testing.assert_close(choice.gate, torch.tensor(expected.weights), atol=2e-6, rtol=0)
    torch.testing.assert_close(choice.probabilities, torch.tensor(expected.probabilities), atol=2e-6, rtol=0)


@THOROUGH
@given(case=cases(), bias=st.permutations(range(8)))
def test_the_bias_moves_the_choice_but_not_the_weight(case, bias: list[int]) -> None:
    logits, top_k, groups = case
    bias = [0.0713 * b - 0.2 for b in bias]
    expected = reference.sigmoid_router(logits, top_k, groups, bias)
    choice = build_router(config_of(top_k, groups, score_function="sigmoid"))(torch.tensor(logits), torch.tensor(bias))
    assert choice.expert_index.tolist() == expected.choices
    torch.testing.assert_close(choice.gate, torch.tensor(expected.weights), atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", ROUTERS)
def test_of_equal_experts_and_groups_the_lowest_is_chosen(name: str) -> None:
    config = config_of(2, (4, 2), **ROUTERS[name][1])
    choice = build_router(config)(torch.zeros(3, 8))
    assert choice.expert_index.tolist() == [[0, 1]] * 3


@pytest.mark.parametrize("name", ROUTERS)
def test_no_tokens_and_groups(name: str) -> None:
    choice = build_router(config_of(2, (4, 2), **ROUTERS[name][1]))(torch.zeros(0, 8))
    assert choice.expert_index.shape == choice.gate.shape == (0, 2)


@THOROUGH
@given(
    case=cases(),
    capacity=st.integers(1, 6),
    policy=st.sampled_from(["position", "probability"]),
    normalization=st.sampled_from(["none", "before_drops", "after_drops"]),
    scale=st.sampled_from([1.0, 2.5]),
)
def test_drops_and_gates_are_the_references(case, capacity: int, policy: str, normalization: str, scale: float) -> None:
    logits, top_k, groups = case
    wanted = reference.softmax_router(logits, top_k, groups)
    if policy == "position":
        kept = reference.kept_by_position(wanted.choices, 8, capacity)
    else:
        kept = reference.kept_by_probability(wanted.choices, wanted.weights, 8, capacity)
    choice = build_router(config_of(top_k, groups))(torch.tensor(logits))
    routing = settle(
        choice.expert_index, choice.gate, num_experts=8, capacity=capacity, normalization=normalization,
        drop_policy=policy, scale=scale,
    )  # fmt: skip
    assert routing.kept.tolist() == kept
    expected = reference.gates(wanted.weights, kept, normalization, scale)
    torch.testing.assert_close(routing.gate, torch.tensor(expected), atol=5e-6, rtol=0)
    check_order(routing.by_expert, routing.tokens_per_expert, wanted.choices, kept)


def check_order(by_expert: Tensor, counts: Tensor, choices: list[list[int]], kept: list[list[bool]]) -> None:
    """Kept assignments by expert, then choice, then token; dropped ones, in the same order, behind them."""
    num_tokens = len(choices)
    every = sorted((e, j, token) for token, row in enumerate(choices) for j, e in enumerate(row))
    wanted = [(e, j, token) for is_kept in (True, False) for e, j, token in every if kept[token][j] is is_kept]
    assert by_expert.tolist() == [j * num_tokens + token for _, j, token in wanted]
    assert counts.tolist() == [sum(e == expert and kept[t][j] for e, j, t in wanted) for expert in range(8)]


def test_softmax_then_select_equals_select_then_softmax_without_drops() -> None:
    logits = torch.randn(40, 8, generator=torch.Generator().manual_seed(3))
    routings = []
    for order in ("softmax_then_select", "select_then_softmax"):
        choice = build_router(MoEConfig(num_experts=8, top_k=3, gate_order=order))(logits)
        routings.append(settle(choice.expert_index, choice.gate, num_experts=8, capacity=None,
                               normalization="after_drops"))  # fmt: skip
    assert torch.equal(routings[0].expert_index, routings[1].expert_index)
    torch.testing.assert_close(routings[0].gate, routings[1].gate)


@THOROUGH
@given(loads=st.lists(st.lists(st.integers(0, 9), min_size=5, max_size=5), min_size=1, max_size=6))
def test_the_bias_goes_the_references_way(loads: list[list[int]]) -> None:
    biases, expected = BalanceBias(0.01, "cpu"), [0.0] * 5
    biases.add_layer(3, 5)
    for load in loads:
        for expert, count in enumerate(load):
            biases.record(3, torch.full((count, 1), expert))
        biases.update((), was_applied=True)
        expected = reference.next_bias(expected, load, 0.01)
    torch.testing.assert_close(biases.of(3), torch.tensor(expected), atol=1e-7, rtol=0)


def test_layers_of_different_size_have_biases_of_their_own() -> None:
    biases, loads = BalanceBias(0.01, "cpu"), {0: [3, 1], 2: [5, 0, 0, 3], 5: [1, 2, 0]}
    for layer, load in loads.items():
        biases.add_layer(layer, len(load))
        biases.record(layer, torch.repeat_interleave(torch.arange(len(load)), torch.tensor(load))[:, None])
    biases.update((), was_applied=True)
    for layer, load in loads.items():
        assert biases.of(layer).tolist() == pytest.approx(reference.next_bias([0.0] * len(load), load, 0.01))


def test_a_skipped_step_leaves_the_bias_and_its_loads_behind() -> None:
    biases = BalanceBias(0.5, "cpu")
    biases.add_layer(0, 2)
    biases.record(0, torch.zeros(4, 1, dtype=torch.int64))
    biases.update((), was_applied=False)
    assert biases.of(0).tolist() == [0.0, 0.0]
    biases.update((), was_applied=True)
    assert biases.of(0).tolist() == [0.0, 0.0], "the loads of the skipped step are gone"


def test_without_a_rate_there_is_no_bias() -> None:
    biases = BalanceBias(0.0, "cpu")
    biases.add_layer(0, 2)
    biases.record(0, torch.zeros(4, 1, dtype=torch.int64))
    biases.update((), was_applied=True)
    assert biases.of(0) is None and biases.by_layer == {}


def test_the_bias_evens_out_a_crowded_router() -> None:
    """Its point: one expert ahead by far, and after a while all are asked alike."""
    logits = torch.randn(256, 4, generator=torch.Generator().manual_seed(0)) * 0.3
    logits[:, 0] += 2.0
    router = build_router(MoEConfig(num_experts=4, top_k=1, normalize_gates=False, score_function="sigmoid"))
    biases = BalanceBias(0.01, "cpu")
    biases.add_layer(0, 4)
    first = router(logits, biases.of(0)).expert_index
    for _ in range(100):
        biases.record(0, router(logits, biases.of(0)).expert_index)
        biases.update((), was_applied=True)
    last = router(logits, biases.of(0)).expert_index
    assert (first == 0).float().mean() > 0.95
    assert max((last == e).float().mean() for e in range(4)) < 0.35

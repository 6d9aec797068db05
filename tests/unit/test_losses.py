"""Balance losses, how their gradients enter the backward pass, and how loads are counted."""

import pytest
import torch

from megamoe.moe.losses import LossScale, attach_loss, balance_loss, choice_share, z_loss
from megamoe.moe.routing import route, top_k_choices
from megamoe.moe.statistics import LoadStatistics
from tests.parity.router_reference import z_loss as literal_z_loss


def draw(num_tokens: int, num_experts: int, top_k: int, seed: int = 0):
    """Probabilities [S, E] and choices [S, k], in double precision."""
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64).softmax(-1)
    return probabilities, top_k_choices(probabilities, top_k)


# ---------------------------------------------------------------- balance loss


@pytest.mark.parametrize("kind", ["first_choice", "all_choices"])
def test_even_load_costs_one(kind):
    num_experts = 5
    expert_index = torch.stack([torch.arange(20) % num_experts, (torch.arange(20) + 1) % num_experts], dim=1)
    even = torch.full((20, num_experts), 1 / num_experts)
    assert balance_loss(even, expert_index, kind).item() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("kind", ["first_choice", "all_choices"])
def test_one_expert_for_all_costs_the_number_of_experts(kind):
    certain = torch.zeros(20, 5).index_fill(1, torch.tensor([3]), 1.0)
    only = torch.full((20, 1), 3)
    assert balance_loss(certain, only, kind).item() == pytest.approx(5.0)


def test_the_loss_is_that_of_a_loop():
    probabilities, choices = draw(37, 6, 3)
    for kind, counted in (("first_choice", 1), ("all_choices", 3)):
        total = 0.0
        for e in range(6):
            mean = sum(probabilities[t, e].item() for t in range(37)) / 37
            share = sum(int(choices[t, j]) == e for t in range(37) for j in range(counted)) / (37 * counted)
            total += mean * share
        assert balance_loss(probabilities, choices, kind).item() == pytest.approx(6 * total, rel=1e-6)


def test_second_choices_count_only_where_asked():
    expert_index = torch.tensor([[0, 1], [0, 2]])
    assert choice_share(expert_index, 4, "first_choice").tolist() == [1.0, 0.0, 0.0, 0.0]
    assert choice_share(expert_index, 4, "all_choices").tolist() == [0.5, 0.25, 0.25, 0.0]


def test_no_tokens_have_no_share():
    assert choice_share(torch.zeros(0, 2, dtype=torch.int64), 4, "all_choices").tolist() == [0.0] * 4


@pytest.mark.parametrize("kind", ["first_choice", "all_choices"])
def test_the_mean_of_slices_with_a_shared_share_is_the_loss_of_the_whole(kind):
    probabilities, choices = draw(40, 6, 2)
    whole = balance_loss(probabilities, choices, kind)
    slices = list(zip(probabilities.chunk(4), choices.chunk(4), strict=True))
    share = sum(choice_share(index, 6, kind).double() for _, index in slices) / 4
    shared = sum(balance_loss(p, index, kind, share=share) for p, index in slices) / 4
    apart = sum(balance_loss(p, index, kind) for p, index in slices) / 4
    assert shared.item() == pytest.approx(whole.item(), rel=1e-6)
    assert apart.item() != pytest.approx(whole.item(), rel=1e-4), "the share matters"


def test_the_gradient_flows_through_the_mean_probability_only():
    logits = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    probabilities = logits.softmax(-1)
    choices = top_k_choices(probabilities.detach(), 2)
    (gradient,) = torch.autograd.grad(balance_loss(probabilities, choices, "first_choice"), probabilities)
    share = choice_share(choices, 4, "first_choice").double()
    torch.testing.assert_close(gradient, (4 * share / 9).expand(9, 4))


@pytest.mark.parametrize("kind", ["first_choice", "all_choices"])
def test_the_loss_of_sequences_is_the_mean_of_each_ones(kind):
    probabilities, choices = draw(42, 5, 2)
    apart = sum(balance_loss(probabilities[i::3], choices[i::3], kind) for i in range(3)) / 3
    together = balance_loss(probabilities, choices, kind, num_sequences=3)
    assert together.item() == pytest.approx(apart.item(), rel=1e-6)
    assert together.item() != pytest.approx(balance_loss(probabilities, choices, kind).item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["first_choice", "all_choices"])
def test_sequences_cut_into_slices_share_their_shares(kind):
    probabilities, choices = draw(48, 5, 2)
    slices = list(zip(probabilities.chunk(4), choices.chunk(4), strict=True))
    share = sum(choice_share(index, 5, kind, num_sequences=3).double() for _, index in slices) / 4
    shared = sum(balance_loss(p, index, kind, share=share, num_sequences=3) for p, index in slices) / 4
    assert shared.item() == pytest.approx(balance_loss(probabilities, choices, kind, num_sequences=3).item(), rel=1e-6)


def test_z_loss_is_the_literal_one():
    logits = torch.randn(11, 6, generator=torch.Generator().manual_seed(2)) * 3
    assert z_loss(logits).item() == pytest.approx(literal_z_loss(logits.tolist()), rel=1e-6)


# ---------------------------------------------------------------- attached losses


def test_an_attached_loss_leaves_the_output_and_adds_its_scaled_gradient():
    w = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    scale = LossScale()
    output = 2.0 * w
    attached = attach_loss(output, w.square().sum(), scale, 0.25)
    assert torch.equal(attached, output)
    scale.value = 8.0  # set after the forward pass: what counts is its value when the gradient is made
    attached.backward(torch.tensor([10.0, 20.0, 30.0]))
    assert w.grad.tolist() == [20 + 2 * 2 * 1.0, 40 + 2 * 2 * -2.0, 60 + 2 * 2 * 3.0]


def test_the_scale_starts_at_one_and_the_output_gradient_is_not_scaled():
    w, v = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    attach_loss(3.0 * w, v.sum(), LossScale(), 0.5).sum().backward()
    assert (w.grad.tolist(), v.grad.tolist()) == ([3.0, 3.0], [0.5, 0.5])


def test_the_gradient_has_the_dtype_of_the_loss():
    w = torch.ones(2, requires_grad=True)
    attach_loss(torch.ones(2, dtype=torch.bfloat16, requires_grad=True) * 1, w.sum(), LossScale(), 0.3).sum().backward()
    torch.testing.assert_close(w.grad, torch.full((2,), 0.3), rtol=1e-6, atol=0.0)


# ---------------------------------------------------------------- loads


def record(statistics: LoadStatistics, layer: int, capacity: int | None, loss: float) -> None:
    logits = torch.tensor([[3.0, 2.0, 0.0], [3.0, 0.0, 2.0], [3.0, 2.0, 0.0]])
    routing = route(logits, top_k=2, capacity=capacity, normalize=True)
    statistics.record(layer, routing, torch.tensor(loss))


def test_loads_add_up_by_layer_and_start_anew_when_taken():
    statistics = LoadStatistics()
    record(statistics, 1, 2, 1.5)
    record(statistics, 1, 1, 2.0)
    record(statistics, 3, 2, 4.0)
    loads = statistics.take()
    assert sorted(loads) == [1, 3]
    assert loads[1].demand.tolist() == [6.0, 4.0, 2.0], "dropped ones too"
    assert (loads[1].dropped.item(), loads[1].balance_loss.item(), loads[1].num_micro_batches) == (4.0, 3.5, 2)
    assert (loads[3].dropped.item(), loads[3].num_micro_batches) == (1.0, 1)
    assert statistics.take() == {}


def test_what_is_counted_in_between_is_forgotten():
    statistics = LoadStatistics()
    record(statistics, 1, None, 1.0)
    kept = statistics.take()
    record(statistics, 1, 1, 50.0)
    statistics.restore(kept)
    record(statistics, 1, None, 1.0)
    load = statistics.take()[1]
    assert (load.balance_loss.item(), load.dropped.item(), load.num_micro_batches) == (2.0, 0.0, 2)
    assert kept[1].demand.tolist() == [3.0, 2.0, 1.0], "what was taken stays as it was"


def test_counting_keeps_no_graph():
    statistics = LoadStatistics()
    routing = route(torch.randn(4, 3), top_k=1, capacity=None, normalize=False)
    statistics.record(0, routing, torch.ones((), requires_grad=True))
    assert not statistics.take()[0].balance_loss.requires_grad

"""The FFN of stacked experts: equal to plain linear maps, on CPU products and on grouped ones, gradients in place."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megamoe.moe.activations import ACTIVATIONS
from megamoe.moe.experts import StackedExperts
from megamoe.moe.grouped_ffn import grouped_ffn
from tests.unit.expert_cases import HIDDEN, apply_expert, make_experts

LOADS = {
    "even": [4, 4, 4, 4],
    "near even": [4, 3, 5, 4],
    "with an empty one": [3, 0, 4, 2],
    "one for all": [0, 0, 9, 0],
    "one row": [0, 1, 0, 0],
    "nothing": [0, 0, 0, 0],
}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("block_elements", [1, 40, 10_000])
@pytest.mark.parametrize("load", LOADS)
def test_stacked_experts_are_the_plain_experts(monkeypatch, load, block_elements, use_bias, gated):
    """In a block for each expert, in a few, in one."""
    monkeypatch.setattr("megamoe.moe.ffn._BLOCK_ELEMENTS", block_elements)
    experts = make_experts(4, gated=gated, use_bias=use_bias)
    buffer, plain, leaves, seed = plain_experts(experts, LOADS[load])
    expected = torch.autograd.grad(plain, leaves, seed)
    y = experts(buffer, LOADS[load])
    torch.testing.assert_close(y, plain, rtol=1e-12, atol=1e-12)
    for gradient, right in zip(torch.autograd.grad(y, leaves, seed), expected, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("load", LOADS)
def test_what_is_kept_for_the_backward_pass_is_a_choice_of_memory(load, gated):
    """The same bits, with what follows the activation [R, f] kept or made again, and with nothing kept at all."""
    results, kept_sizes = [], []
    for recompute in (False, True):
        experts = make_experts(4, gated=gated, recompute_activation=recompute, hidden=6, ffn=11)
        buffer, _, leaves, seed = plain_experts(experts, LOADS[load])
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x) or x, lambda x: x):
            y = experts(buffer, LOADS[load])
        kept_sizes.append(sum(tensor.numel() for tensor in kept))
        results.append([y, *torch.autograd.grad(y, leaves, seed)])
        with torch.no_grad():
            torch.testing.assert_close(experts(buffer, LOADS[load]), y, rtol=0, atol=0)
    assert kept_sizes[0] - kept_sizes[1] == 11 * sum(LOADS[load])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("gated", [False, True])
def test_without_gradients_only_a_block_is_in_memory(monkeypatch, gated):
    """All that is allocated is the result, and a and g of the largest block, once."""
    monkeypatch.setattr("megamoe.moe.ffn._BLOCK_ELEMENTS", 1)
    counts, hidden, ffn = [30, 50, 40, 20], 8, 64
    experts = make_experts(4, gated=gated, hidden=hidden, ffn=ffn)
    buffer = torch.randn(sum(counts), hidden, dtype=experts.fc1.weight.dtype)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        experts(buffer, counts)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    size = buffer.element_size()
    wanted = size * (buffer.numel() + max(counts) * ffn * (3 if gated else 2))
    assert wanted <= allocated < 1.1 * wanted


def plain_experts(experts: StackedExperts, counts: list[int]):
    """Rows for each expert, what plain linear maps make of them, all leaves, and a gradient to start from."""
    generator, dtype = torch.Generator().manual_seed(8), experts.fc1.weight.dtype
    hidden = experts.fc2.weight.shape[1]
    buffer = torch.randn(sum(counts), hidden, generator=generator, dtype=dtype).requires_grad_()
    seed = torch.randn(sum(counts), hidden, generator=generator, dtype=dtype)
    plain = torch.cat([apply_expert(experts, e, rows) for e, rows in enumerate(buffer.split(counts))])
    return buffer, plain, [buffer, *experts.parameters()], seed


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("load", LOADS)
def test_the_grouped_product_of_gpus_is_the_same_function(load, use_bias, gated, recompute):
    """torch's grouped product has a CPU form, in which its use can be checked (not its speed)."""
    counts = LOADS[load]
    experts = make_experts(4, gated=gated, use_bias=use_bias, dtype=torch.float32, hidden=16, ffn=8)
    buffer, plain, leaves, seed = plain_experts(experts, counts)
    y = grouped_ffn(buffer, experts.cut(1)[0], counts, experts.activation, recompute_activation=recompute)
    torch.testing.assert_close(y, plain, rtol=1e-4, atol=1e-4)
    expected = torch.autograd.grad(plain, leaves, seed)
    for gradient, right in zip(torch.autograd.grad(y, leaves, seed), expected, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("widen", [False, True])
def test_16_bit_products_are_the_same_widened_or_not(monkeypatch, dtype, widen):
    """Processors without 16-bit instructions widen an expert's operands; both ways stay within the format."""
    monkeypatch.setattr("megamoe.moe.precision._is_slow_on_cpu", lambda dtype: widen)
    counts = LOADS["near even"]
    whole = make_experts(4, dtype=torch.float32, hidden=16, ffn=8)
    rounded = make_experts(4, dtype=dtype, hidden=16, ffn=8)
    buffer, plain, leaves, seed = plain_experts(whole, counts)
    small = buffer.detach().to(dtype).requires_grad_()
    y = rounded(small, counts)
    assert y.dtype is dtype
    got = torch.autograd.grad(y, [small, *rounded.parameters()], seed.to(dtype))
    for value, right in zip((y, *got), (plain, *torch.autograd.grad(plain, leaves, seed)), strict=True):
        assert (value.float() - right).norm() < 2e-2 * right.norm()


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "swiglu"])
def test_written_gradients_of_activations_are_autograd_s(name):
    activation = ACTIVATIONS[name]
    a = torch.randn(6, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    g = activation.forward(a)
    assert g.shape == (6, 4 if activation.is_gated else 8)
    seed = torch.randn(g.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (expected,) = torch.autograd.grad(g, a, seed)
    into, gradient = torch.empty_like(g), torch.empty_like(a)
    activation.forward_into(a.detach(), into)
    activation.backward_into(seed, a.detach(), gradient)
    torch.testing.assert_close(into, g.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_gradients_are_added_in_place_and_hooks_still_run():
    """To the bit as autograd would add them, but into the memory that is there."""
    experts, counts = make_experts(4, gated=True, dtype=torch.float32), LOADS["with an empty one"]
    buffer, _, leaves, seed = plain_experts(experts, counts)
    expected = torch.autograd.grad(experts(buffer, counts), leaves, seed)
    experts(buffer, counts).backward(seed)
    weights = [experts.fc1.weight, experts.fc2.weight]
    memory, heard = [weight.grad.data_ptr() for weight in weights], []
    for weight in weights:
        weight.register_post_accumulate_grad_hook(lambda parameter: heard.append(parameter.grad.data_ptr()))
    for _ in range(2):
        experts(buffer, counts).backward(seed)
    for leaf, once in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, once + once + once, rtol=0, atol=0)
    assert [weight.grad.data_ptr() for weight in weights] == memory
    assert sorted(heard) == sorted(2 * memory)


def test_gradients_that_are_only_asked_for_leave_the_sum_alone():
    """torch.autograd.grad and backward(inputs=...) accumulate into nothing, or not into the weights."""
    experts, counts = make_experts(4), LOADS["even"]
    buffer, plain, leaves, seed = plain_experts(experts, counts)
    expected = torch.autograd.grad(plain, leaves, seed)
    experts(buffer, counts).backward(seed)
    before = [leaf.grad.clone() for leaf in leaves]
    for gradient, right in zip(torch.autograd.grad(experts(buffer, counts), leaves, seed), expected, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-12, atol=1e-12)
    experts(buffer, counts).backward(seed, inputs=[buffer])
    for leaf, value in zip(leaves[1:], before[1:], strict=True):
        torch.testing.assert_close(leaf.grad, value, rtol=0, atol=0)
    torch.testing.assert_close(buffer.grad, 2 * expected[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_add_up_when_the_experts_are_recomputed(reentrant):
    experts, counts = make_experts(4), LOADS["near even"]
    buffer, plain, leaves, seed = plain_experts(experts, counts)
    expected = torch.autograd.grad(plain, leaves, seed)
    for _ in range(2):
        checkpoint(experts, buffer, counts, use_reentrant=reentrant).backward(seed)
    for leaf, once in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * once, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("counts", [[4, 4, 4, 4], [20, 0, 0, 1]])
def test_one_rank_of_an_expert_tensor_group_adds_the_last_bias(counts):
    """The others leave it out, but give it a gradient to reduce."""
    silent = make_experts(4, adds_fc2_bias=False)
    buffer = torch.ones(sum(counts), HIDDEN, dtype=torch.float64)
    y = silent(buffer, counts)
    plain = torch.cat([apply_expert(silent, e, rows) for e, rows in enumerate(buffer.split(counts))])
    torch.testing.assert_close(y, plain)
    y.sum().backward()
    assert silent.fc2.bias.grad.eq(0).all() and not silent.fc1.bias.grad[0].eq(0).all()


def test_halves_of_an_expert_tensor_group_add_up():
    """What two ranks compute with half the columns each is what one computes with all."""
    whole, counts = make_experts(3, gated=True, ffn=8), [3, 2, 4]
    buffer = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    total = torch.zeros_like(buffer)
    for rank, columns in enumerate((slice(0, 4), slice(4, 8))):
        half = make_experts(3, gated=True, ffn=4, adds_fc2_bias=rank == 0)
        with torch.no_grad():
            half.fc1.weight.copy_(whole.fc1.weight[:, :, columns])
            half.fc1.bias.copy_(whole.fc1.bias[:, :, columns])
            half.fc2.weight.copy_(whole.fc2.weight[:, :, columns])
            half.fc2.bias.copy_(whole.fc2.bias)
        total += half(buffer, counts)
    torch.testing.assert_close(total, whole(buffer, counts), rtol=1e-12, atol=1e-12)

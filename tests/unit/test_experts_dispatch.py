"""Tokens to experts and back on one rank: equal to a loop over tokens, in values, gradients and memory of the order."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megamoe.moe.activations import ACTIVATIONS
from megamoe.moe.dispatch import combine, dispatch
from megamoe.moe.exchange import Exchange
from megamoe.moe.experts import StackedExperts
from megamoe.moe.grouped_ffn import grouped_ffn, has_grouped_product
from megamoe.moe.routing import Routing, route

HIDDEN, FFN = 5, 7


def make_experts(num_experts: int, *, gated: bool = False, use_bias: bool = True, adds_fc2_bias: bool = True, **sizes):
    experts = StackedExperts(
        num_local_experts=num_experts,
        hidden_size=sizes.get("hidden", HIDDEN),
        ffn_hidden_size=sizes.get("ffn", FFN),
        activation="swiglu" if gated else "gelu",
        use_bias=use_bias,
        adds_fc2_bias=adds_fc2_bias,
        recompute_activation=True,
        dtype=sizes.get("dtype", torch.float64),
        device="cpu",
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(generator=generator)
    return experts


def apply_expert(experts: StackedExperts, e: int, x: torch.Tensor) -> torch.Tensor:
    """One expert as plain linear maps."""
    tensors = (experts.fc1.weight, experts.fc1.bias, experts.fc2.weight, experts.fc2.bias)
    weight1, bias1, weight2, bias2 = (None if p is None else p[e] for p in tensors)
    if weight1.dim() == 3:
        gate = F.linear(x, weight1[0], None if bias1 is None else bias1[0])
        hidden = F.silu(gate) * F.linear(x, weight1[1], None if bias1 is None else bias1[1])
    else:
        hidden = F.gelu(F.linear(x, weight1, bias1))
    return F.linear(hidden, weight2, bias2 if experts.adds_fc2_bias else None)


def moe(x: torch.Tensor, routing: Routing, experts: StackedExperts) -> torch.Tensor:
    (buffer,), metadata = dispatch(x, routing, Exchange())
    return combine([experts(buffer, *metadata.rows_per_expert)], routing, metadata)


def moe_by_loop(x: torch.Tensor, routing: Routing, experts: StackedExperts) -> torch.Tensor:
    rows = []
    for token in range(x.shape[0]):
        y = torch.zeros_like(x[token])
        for choice in range(routing.gate.shape[1]):
            if routing.kept[token, choice]:
                expert = int(routing.expert_index[token, choice])
                y = y + routing.gate[token, choice] * apply_expert(experts, expert, x[token])
        rows.append(y)
    return torch.stack(rows)


def draw(num_tokens: int, num_experts: int, hidden: int = HIDDEN, dtype=torch.float64):
    """Tokens [S, h] and logits [S, E] of a random but uneven load."""
    generator = torch.Generator().manual_seed(num_tokens * 31 + num_experts)
    x = torch.randn(num_tokens, hidden, generator=generator, dtype=dtype).requires_grad_()
    logits = torch.randn(num_tokens, num_experts, generator=generator, dtype=dtype)
    return x, (logits + torch.linspace(0, 1.5, num_experts, dtype=dtype)).requires_grad_()


# ---------------------------------------------------------------- dispatch and combine


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("capacity", [None, 1, 3])
@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_values_and_gradients_are_those_of_a_loop_over_tokens(top_k, capacity, gated):
    experts = make_experts(6, gated=gated)
    x, logits = draw(19, 6)
    routing = route(logits, top_k=top_k, capacity=capacity, normalize=top_k % 2 == 0)
    assert bool(routing.kept.all()) == (capacity is None), "the cases with a capacity drop"
    outputs = moe(x, routing, experts), moe_by_loop(x, routing, experts)
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    leaves = [x, logits, *experts.parameters()]
    seed = torch.randn(19, HIDDEN, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    gradients, expected = (torch.autograd.grad(y, leaves, seed, retain_graph=True) for y in outputs)
    for gradient, plain in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, plain, rtol=1e-11, atol=1e-12)


def test_the_gradients_are_numerically_right():
    experts = make_experts(3)
    x, logits = draw(5, 3)

    def whole(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return moe(x, route(logits, top_k=2, capacity=2, normalize=True), experts)

    assert torch.autograd.gradcheck(whole, (x, logits))


def test_the_buffer_is_sorted_by_expert_then_choice_then_token():
    expert_index = torch.tensor([[1, 0], [0, 1], [1, 2]])
    logits = torch.full((3, 3), -9.0).scatter(1, expert_index, torch.tensor([[2.0, 1.0]] * 3))
    x = torch.tensor([[10.0], [20.0], [30.0]])
    (buffer,), metadata = dispatch(x, route(logits, top_k=2, capacity=None, normalize=False), Exchange())
    assert buffer.flatten().tolist() == [20.0, 10.0, 10.0, 30.0, 20.0, 30.0]
    assert metadata.rows_per_expert == [[2, 3, 1]]
    (buffer,), metadata = dispatch(x, route(logits, top_k=2, capacity=1, normalize=False), Exchange())
    assert buffer.flatten().tolist() == [20.0, 10.0, 30.0]
    assert metadata.rows_per_expert == [[1, 1, 1]]


@pytest.mark.parametrize("loss_scale", [1.0, 2.0**20])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
def test_what_is_dropped_altogether_gives_zero_and_no_gradient(top_k, normalize, loss_scale):
    """Also where the gradient is large: 0 / tiny is 0, but its gradient could be infinite, and times 0 not a number."""
    experts = make_experts(4, dtype=torch.float32)
    x, _ = draw(6, 4, dtype=torch.float32)
    logits = torch.tensor([[0.5, 0.0, 5.0, 3.0]] * 6, requires_grad=True)
    y = moe(x, route(logits, top_k=top_k, capacity=2, normalize=normalize), experts)
    (y.sum() * loss_scale).backward()
    assert y[2:].eq(0).all() and not y[:2].eq(0).any()
    assert x.grad[2:].eq(0).all() and not x.grad[:2].eq(0).any()
    assert logits.grad[2:].eq(0).all() and logits.grad.isfinite().all()


@pytest.mark.parametrize("gap", [95.0, 200.0])
def test_a_second_choice_of_no_probability_has_a_finite_gradient(gap):
    """The last token's first choice is full; its second underflows, to a subnormal or to zero."""
    experts = make_experts(3, dtype=torch.float32)
    x, _ = draw(3, 3, dtype=torch.float32)
    logits = torch.tensor([[5.0, 0.0, 4.0], [5.0, 0.0, 4.0], [gap, 0.0, -1.0]], requires_grad=True)
    routing = route(logits, top_k=2, capacity=2, normalize=True)
    assert routing.kept.tolist() == [[True, True], [True, True], [False, True]]
    (moe(x, routing, experts).sum() * 2.0**20).backward()
    assert routing.gate.isfinite().all() and logits.grad.isfinite().all()


@pytest.mark.parametrize(("num_tokens", "capacity"), [(0, None), (0, 4), (5, 0)])
@pytest.mark.parametrize("top_k", [1, 3])
def test_a_rank_without_rows_takes_part_with_zeros(num_tokens, capacity, top_k):
    """No tokens at all, or every one of them dropped: all parameters still get a gradient, which is zero."""
    experts = make_experts(4, gated=True)
    x, logits = draw(num_tokens, 4)
    y = moe(x, route(logits, top_k=top_k, capacity=capacity, normalize=True), experts)
    assert y.shape == (num_tokens, HIDDEN) and y.eq(0).all()
    leaves = [x, logits, *experts.parameters()]
    for leaf, gradient in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
        assert gradient.shape == leaf.shape and gradient.eq(0).all()


# ---------------------------------------------------------------- memory of the order S * k * h


class Elements(TorchDispatchMode):
    """Counts the elements of every tensor that an operation returns, views too."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
                self.total += tensor.numel()
        return result


NUM_TOKENS, TOP_K, WIDE = 512, 2, 16


def count_dispatch(num_experts: int, way=None) -> Elements:
    """Elements made by dispatch and combine, forward and backward, without the experts between them."""
    x, logits = draw(NUM_TOKENS, num_experts, WIDE, torch.float32)
    routing = route(logits, top_k=TOP_K, capacity=None, normalize=True)

    def there_and_back() -> torch.Tensor:
        buffers, metadata = dispatch(x, routing, Exchange())
        return combine(buffers, routing, metadata)

    with Elements() as counted:
        (way(x, routing) if way else there_and_back()).backward(torch.ones(NUM_TOKENS, WIDE), inputs=[x, routing.gate])
    return counted


def one_hot_dispatch(x: torch.Tensor, routing: Routing) -> torch.Tensor:
    """What must not be: a mask of tokens x experts."""
    num_experts = routing.tokens_per_expert.numel()
    mask = (F.one_hot(routing.expert_index, num_experts) * routing.gate.unsqueeze(-1)).sum(1)
    return torch.einsum("se,sh->seh", mask, x).sum(1)


def test_no_tensor_grows_with_tokens_times_experts():
    assert count_dispatch(64).largest <= NUM_TOKENS * TOP_K * WIDE < NUM_TOKENS * 64
    assert count_dispatch(64, one_hot_dispatch).largest >= NUM_TOKENS * 64, "a mask would be noticed"


def test_the_sum_of_all_tensors_does_not_grow_with_the_experts():
    few, many = count_dispatch(8).total, count_dispatch(512).total
    assert many - few <= 12 * (512 - 8), "counts of each expert, and nothing else"
    assert few <= 20 * NUM_TOKENS * TOP_K * WIDE


@pytest.mark.parametrize("load", ["even", "random", "all on one"])
def test_the_experts_work_on_a_few_times_the_rows(load):
    num_experts, num_rows = 64, 1024
    experts = make_experts(num_experts, hidden=WIDE, ffn=2 * WIDE, dtype=torch.float32)
    counts = {
        "even": torch.full((num_experts,), num_rows // num_experts),
        "random": torch.bincount(
            torch.randint(num_experts, (num_rows,), generator=torch.Generator().manual_seed(1)), minlength=num_experts
        ),
        "all on one": torch.zeros(num_experts, dtype=torch.int64).index_fill(0, torch.tensor([5]), num_rows),
    }[load]
    buffer = torch.randn(num_rows, WIDE, requires_grad=True)
    with Elements() as counted:
        experts(buffer, counts.tolist()).sum().backward()
    weights = experts.fc1.weight.numel()  # their gradients are that large, whatever the rows
    assert counted.largest <= max(weights, (2 * num_rows + num_experts) * 2 * WIDE)
    assert num_experts * num_rows * WIDE > 4 * max(weights, (2 * num_rows + num_experts) * 2 * WIDE), "padded to one"


# ---------------------------------------------------------------- stacked experts

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


@pytest.mark.parametrize(
    ("is_cuda", "dtype", "capability", "expected"),
    [
        (True, torch.bfloat16, (9, 0), True),
        (True, torch.bfloat16, (8, 0), True),
        (True, torch.bfloat16, (7, 5), False),
        (True, torch.float32, (9, 0), False),
        (False, torch.bfloat16, (9, 0), False),
    ],
)
def test_grouped_products_are_used_where_torch_documents_them(monkeypatch, is_cuda, dtype, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_grouped_product(SimpleNamespace(is_cuda=is_cuda, dtype=dtype, device=0)) is expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("widen", [False, True])
def test_16_bit_products_are_the_same_widened_or_not(monkeypatch, dtype, widen):
    """Processors without 16-bit instructions widen an expert's operands; both ways stay within the format."""
    monkeypatch.setattr("megamoe.moe.ffn._is_slow_on_cpu", lambda dtype: widen)
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

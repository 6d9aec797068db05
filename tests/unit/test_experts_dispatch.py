"""Tokens to experts and back on one rank: equal to a loop over tokens, in values, gradients and memory of the order."""


import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megamoe.moe.dispatch import combine, dispatch
from megamoe.moe.exchange import Exchange
from megamoe.moe.experts import StackedExperts
from megamoe.moe.routing import Routing, route
from tests.unit.expert_cases import HIDDEN, apply_expert, make_experts


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

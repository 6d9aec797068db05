"""The way of the rows on one rank: orders, chunks, when what is called, and how often the host asks the device."""

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import megamoe.moe.experts as experts_module
from megamoe.config.schema import MoEConfig
from megamoe.errors import TopologyError
from megamoe.model import cpu_bridge
from megamoe.moe.dispatch import combine, dispatch
from megamoe.moe.exchange import Exchange
from megamoe.moe.losses import LossScale
from megamoe.moe.routing import settle
from megamoe.moe.rows import Permute, blocks_swapped
from megamoe.moe.statistics import LoadStatistics
from megamoe.topology.nodes import exchange_levels

cpu_bridge.apply_before_import()

from megamoe.moe.layer import EvaluationMode, ExpertParallel, MoEContext, MoELayer  # noqa: E402

NUM_EXPERTS, HIDDEN, FFN, NUM_TOKENS = 8, 16, 8, 24

# ---------------------------------------------------------------- orders


@pytest.mark.parametrize("counts", [[[2, 0, 3], [1, 4, 0]], [[0, 0], [0, 0], [0, 0]], [[5, 1]], [[2], [3]]])
def test_swapped_blocks_are_a_stable_sort_by_the_second_number(counts):
    table = torch.tensor(counts)
    num_rows = int(table.sum())
    second = torch.tensor([b for row in counts for b, count in enumerate(row) for _ in range(count)], dtype=torch.int64)
    order = blocks_swapped(table, num_rows)
    if order is None:
        assert 1 in table.shape and second.tolist() == sorted(second.tolist())
        return
    rows = torch.arange(num_rows, dtype=torch.float64).unsqueeze(1).requires_grad_()
    permuted = Permute.apply(rows, order)
    assert permuted.flatten().tolist() == second.argsort(stable=True).tolist()
    assert Permute.apply(permuted, order.inverse).tolist() == rows.tolist()
    seed = torch.arange(num_rows, dtype=torch.float64).unsqueeze(1) + 100
    expected = torch.zeros(num_rows, 1, dtype=torch.float64)
    for new, old in enumerate(permuted.flatten().long().tolist()):
        expected[old] = seed[new]
    assert torch.autograd.grad(permuted, rows, seed)[0].tolist() == expected.tolist()


@pytest.mark.parametrize("nodes", [1, 2, 3])
@pytest.mark.parametrize("local", [1, 2])
@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_experts_are_sent_by_chunk_then_local_number_then_node(chunks, local, nodes):
    per_rank = 4
    num_experts = nodes * local * per_rank
    exchange = Exchange(num_local=local, num_nodes=nodes, num_chunks=chunks)

    def key(expert: int) -> tuple[int, ...]:
        rank, inside = divmod(expert, per_rank)
        chunk, number = divmod(inside, per_rank // chunks)
        return chunk, rank % local, rank // local, number

    place = exchange.place_of_expert(num_experts, torch.device("cpu"))
    order = sorted(range(num_experts), key=key)
    if place is None:
        assert order == list(range(num_experts))
    else:
        assert [order.index(expert) for expert in range(num_experts)] == place.tolist()


@pytest.mark.parametrize("policy", ["position", "probability"])
@pytest.mark.parametrize("capacity", [None, 0, 3])
def test_the_place_of_an_expert_moves_its_rows_and_nothing_else(capacity, policy):
    generator = torch.Generator().manual_seed(5)
    expert_index = torch.rand(NUM_TOKENS, NUM_EXPERTS, generator=generator).argsort(dim=1)[:, :2]
    gate = torch.rand(NUM_TOKENS, 2, generator=generator)
    place = torch.randperm(NUM_EXPERTS, generator=generator)
    options: dict[str, Any] = {"num_experts": NUM_EXPERTS, "capacity": capacity, "normalization": "none"}
    plain = settle(expert_index, gate, drop_policy=policy, **options)
    placed = settle(expert_index, gate, drop_policy=policy, place_of_expert=place, **options)
    for name in ("gate", "kept", "tokens_per_expert"):
        assert torch.equal(getattr(plain, name), getattr(placed, name)), name
    flat, num_kept = expert_index.t().reshape(-1), int(plain.kept.sum())
    assert sorted(placed.by_expert.tolist()) == list(range(2 * NUM_TOKENS))
    assert plain.kept.t().reshape(-1)[placed.by_expert].tolist() == [i < num_kept for i in range(2 * NUM_TOKENS)]
    wanted = sorted(plain.by_expert[:num_kept].tolist(), key=lambda a: (int(place[flat[a]]), a))
    assert placed.by_expert[:num_kept].tolist() == wanted


def test_orders_are_made_and_used_without_asking_the_device():
    """On one rank there is nothing to reorder, so the layer's own test of this does not see it."""
    counts, x = torch.tensor([[2, 0, 3], [1, 4, 0]]), torch.zeros(10, 2, requires_grad=True)
    assert reads(lambda: Permute.apply(x, blocks_swapped(counts, 10)).sum().backward()) == {}


# ---------------------------------------------------------------- nodes


def test_levels_of_two_groups_over_two_nodes():
    levels = exchange_levels([[0, 2, 4, 6], [1, 3, 5, 7]], 4)
    assert levels.local == [[0, 2], [4, 6], [1, 3], [5, 7]]
    assert levels.across == [[0, 4], [2, 6], [1, 5], [3, 7]]


@pytest.mark.parametrize(("groups", "ranks_per_node"), [([[0, 1], [2, 3]], 2), ([[0, 2], [1, 3]], 2), ([[0], [1]], 1)])
def test_groups_inside_a_node_or_with_one_rank_a_node_need_one_hop(groups, ranks_per_node):
    assert exchange_levels(groups, ranks_per_node) is None


def test_unequal_numbers_on_the_nodes_are_refused():
    with pytest.raises(TopologyError, match=r"with 3 ranks a node the ranks 0, 1, 2, 3 lie \[3, 1\] to a node"):
        exchange_levels([[0, 1, 2, 3]], 3)


# ---------------------------------------------------------------- the layer: chunks, events, reads


def make_layer(exchange: Exchange, *, capacity: bool = False, **settings: Any) -> MoELayer:
    """A layer of all experts with fixed weights."""
    config = MoEConfig(
        num_experts=NUM_EXPERTS, dropless=not capacity, capacity_factor=0.5, balance_loss_coeff=0.1, **settings
    )
    context = MoEContext(
        config=config, hidden_size=HIDDEN, expert_ffn_hidden_size=FFN, activation="gelu", use_bias=True,
        dtype=torch.float32, device="cpu", parallel=ExpertParallel(exchange, 1, None, 1, 1, 0, False),
        loss_scale=LossScale(), statistics=LoadStatistics(NUM_EXPERTS), evaluation=EvaluationMode(),
    )  # fmt: skip
    layer, generator = MoELayer(None, context=context, layer=0), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=generator)
        layer.router.weight[6:] = layer.router.weight[0]  # of equal experts the first wins: two are idle
    return layer


def tokens() -> torch.Tensor:
    return torch.randn(NUM_TOKENS, 1, HIDDEN, generator=torch.Generator().manual_seed(4)).requires_grad_()


def values_and_gradients(layer: MoELayer) -> list[torch.Tensor]:
    x = tokens()
    y, _ = layer(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(6)))
    return [y, x.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("capacity", [False, True])
@pytest.mark.parametrize("chunks", [2, 4, 8])
def test_chunks_change_no_bit(chunks, capacity):
    whole = values_and_gradients(make_layer(Exchange(), capacity=capacity))
    cut = values_and_gradients(make_layer(Exchange(num_chunks=chunks), capacity=capacity))
    assert len(whole) == 2 + 5
    for one, other in zip(whole, cut, strict=True):
        assert torch.equal(one, other) and one.abs().sum() > 0


class LateDelivery:
    """Stands in for a group of one rank over a real network: what is sent arrives when it is waited for, not before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        monkeypatch.setattr(dist, "all_to_all_single", self.all_to_all_single)

    def all_to_all_single(self, output, rows, output_sizes=None, input_sizes=None, group=None, async_op=False):
        if output.dtype is torch.int64:
            assert not async_op
            output.copy_(rows)
            return None
        assert async_op and output_sizes == input_sizes == [rows.shape[0]]
        number = sum(event.startswith("start") for event in self.events)
        self.events.append(f"start {number}")
        delivery = self

        class Work:
            def wait(self) -> None:
                delivery.events.append(f"wait {number}")
                output.copy_(rows)

        output.fill_(float("nan"))
        return Work()

    def note(self, name: str) -> Any:
        """A function of autograd that notes when it is passed, forward and backward."""
        events = self.events

        class Note(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
                events.append(name)
                return x * 1.0

            @staticmethod
            def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
                events.append(f"{name} back")
                return grad

        return Note.apply


def run_with_late_delivery(monkeypatch, chunks: int) -> tuple[list[str], list[str], list[torch.Tensor]]:
    delivery = LateDelivery(monkeypatch)
    exchange = Exchange(local_group="a group of one", num_chunks=chunks)
    layer, x = make_layer(exchange), tokens()
    compute = layer.experts.forward

    def noted(buffer: torch.Tensor, rows: list[int], weights: Any) -> torch.Tensor:
        return delivery.note("experts")(compute(buffer, rows, weights))

    layer.experts.forward = noted
    flat = x.reshape(-1, HIDDEN)
    y, shared = layer._route_and_apply(flat, num_sequences=1, beside=lambda: delivery.note("beside")(flat))
    forward = delivery.events.copy()
    delivery.events.clear()
    seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(6))
    (y + 0.0 * shared).backward(seed)
    return forward, delivery.events, [y, x.grad, *(parameter.grad for parameter in layer.parameters())]


def test_one_chunk_travels_beside_the_shared_expert(monkeypatch):
    forward, backward, found = run_with_late_delivery(monkeypatch, 1)
    assert forward == ["start 0", "beside", "wait 0", "experts", "start 1", "wait 1"]
    assert backward == ["start 0", "wait 0", "experts back", "start 1", "beside back", "wait 1"]
    for one, other in zip(found, values_and_gradients(make_layer(Exchange())), strict=True):
        assert torch.equal(one.flatten(), other.flatten())


def test_each_chunk_travels_while_another_is_computed(monkeypatch):
    forward, backward, found = run_with_late_delivery(monkeypatch, 2)
    there = ["start 0", "beside", "start 1", "wait 0", "experts", "start 2", "wait 1", "experts", "start 3"]
    assert forward == [*there, "wait 2", "wait 3"]
    # Backward, the way of chunk 1 comes first: it was the last one forward.
    home = ["start 0", "start 1", "wait 0", "experts back", "start 2", "wait 1", "experts back", "start 3"]
    assert backward == [*home, "wait 2", "beside back", "wait 3"]
    for one, other in zip(found, values_and_gradients(make_layer(Exchange())), strict=True):
        assert torch.equal(one.flatten(), other.flatten())


class DispatchReads(TorchDispatchMode):
    """Counts operators whose result the host must wait for on a GPU, or whose shape depends on values."""

    PRONE = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if any(name.startswith(prone) for prone in self.PRONE):
            self.found[name] += 1
        if name in ("index", "index_put", "index_put_"):
            self.found["bool mask"] += any(index is not None and index.dtype is torch.bool for index in args[1])
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.found[name] += 1
        return func(*args, **kwargs)


class ListReads(TorchFunctionMode):
    """Counts `.tolist()`, which on a CPU calls no operator."""

    def __init__(self) -> None:
        super().__init__()
        self.num_lists = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.num_lists += func in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu)
        return func(*args, **(kwargs or {}))


def reads(action) -> Counter[str]:
    with DispatchReads() as operators, ListReads() as lists:
        action()
    return operators.found + Counter({"tolist": lists.num_lists})


def test_reads_are_noticed():
    x = torch.tensor([1.0, 0.0, 2.0])
    index = torch.tensor([1, 0, 2])
    for action, name in [
        (lambda: x.tolist(), "tolist"), (lambda: x[0].item(), "_local_scalar_dense"),
        (lambda: bool(x[0]), "_local_scalar_dense"), (lambda: x[x > 0], "bool mask"),
        (lambda: x.nonzero(), "nonzero"), (lambda: x.repeat_interleave(index), "repeat_interleave"),
        (lambda: x.__setitem__(x > 0, torch.ones(2)), "bool mask"), (lambda: index.bincount(), "bincount"),
    ]:  # fmt: skip
        assert name in reads(action), name


ROUTERS = {
    "softmax": {"top_k": 2},
    "top1": {"top_k": 1, "normalize_gates": False},
    "probability": {"drop_policy": "probability", "normalize_when": "before_drops"},
    "selected": {"gate_order": "select_then_softmax", "balance_loss": "all_choices"},
    "sequence": {"balance_loss_scope": "sequence", "z_loss_coeff": 0.1},
    "grouped": {"score_function": "sigmoid", "num_expert_groups": 4, "num_selected_groups": 2},
}


@pytest.mark.parametrize("hops", ["alone", "chunks", "hierarchy"])
@pytest.mark.parametrize("capacity", [False, True])
@pytest.mark.parametrize("router", ROUTERS)
def test_the_host_asks_the_device_once_a_layer(monkeypatch, router, capacity, hops):
    """With the grouped product, which is what runs on GPUs."""
    LateDelivery(monkeypatch)
    grouped = partial(experts_module.grouped_ffn, recompute_activation=False)
    monkeypatch.setattr(experts_module, "expert_by_expert_ffn", grouped)
    exchange = {
        "alone": Exchange(),
        "chunks": Exchange(num_chunks=2),
        "hierarchy": Exchange(local_group="one", across_group="one", num_chunks=2),
    }[hops]
    settings = dict(ROUTERS[router])
    if not capacity:
        settings = {key: value for key, value in settings.items() if key not in ("drop_policy", "normalize_when")}
    layer, x = make_layer(exchange, capacity=capacity, **settings), tokens()
    outputs = []
    assert reads(lambda: outputs.append(layer(x)[0])) == {"tolist": 1}
    assert reads(lambda: outputs[0].sum().backward()) == {}
    assert x.grad.abs().sum() > 0


def test_there_must_be_a_result_for_every_chunk():
    x = torch.randn(4, HIDDEN)
    routing = settle(
        torch.tensor([[0], [1], [1], [0]]), torch.ones(4, 1), num_experts=2, capacity=None, normalization="none"
    )
    buffers, metadata = dispatch(x, routing, Exchange(num_chunks=2))
    results = list(buffers)
    assert [result.shape[0] for result in results] == [2, 2]
    with pytest.raises(ValueError, match="argument 2 is longer"):
        combine(results[:1], routing, metadata)
    assert torch.equal(combine(results, routing, metadata), x)

"""Every way to the experts gives the same bits, and sends the rows that must travel and not one more."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import megamoe.moe.layer as layer_module
from megamoe.config.schema import MoEConfig
from megamoe.errors import TopologyError
from megamoe.model.parallel import ParallelGroups
from megamoe.moe.exchange import Exchange
from megamoe.moe.layer import EvaluationMode, ExpertParallel, MoEContext, MoELayer
from megamoe.moe.losses import LossScale
from megamoe.moe.statistics import LoadStatistics
from megamoe.training.groups import create_groups, destroy_groups
from tests.harness import run_ranks
from tests.parallel.worlds import (
    LAUNCH_TIMEOUT_SECONDS,
    assert_same_arrays,
    column,
    config,
    parallel,
    samples,
    step,
    trainer_of,
    weights,
    world,
)

NUM_RANKS, PER_NODE = 4, 2
NUM_EXPERTS, TOP_K, HIDDEN, FFN = 16, 2, 16, 24
PER_RANK = NUM_EXPERTS // NUM_RANKS
HIERARCHY = ("parallel.all_to_all=hierarchical", f"parallel.ranks_per_node={PER_NODE}")
WAYS = [(levels, chunks) for levels in ("flat", "hierarchy") for chunks in (1, 2, 4)]
# uneven: some experts get far more than others. idle: all tokens choose two experts of rank 0. empty: rank 2 has no
# tokens. frozen: as uneven, and nobody asks for the gradient of the layer's input.
LOADS = ("uneven", "idle", "empty", "frozen")
CASES = list(product(LOADS, (False, True)))
TRAININGS = {
    "flat": ("paper_all", ()),
    "chunks": ("paper_all", ("parallel.all_to_all_chunks=2",)),
    "hierarchy": ("paper_all", HIERARCHY),
    "both": ("paper_all", (*HIERARCHY, "parallel.all_to_all_chunks=2")),
    "capacity flat": ("paper_all_capacity", ()),
    "capacity both": ("paper_all_capacity", (*HIERARCHY, "parallel.all_to_all_chunks=2")),
}
WITH_TENSOR = {"dropless": ("modern_second", True), "capacity": ("paper_capacity", False)}  # model, sequence parallel


# ---------------------------------------------------------------- what both sides know


def tokens_of(load: str, rank: int) -> torch.Tensor:
    num_tokens = 0 if (load, rank) == ("empty", 2) else 10 + 3 * rank
    return torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(20 + rank))


def router_of(load: str) -> torch.Tensor:
    weight = torch.randn(NUM_EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(11))
    weight[3] = 0.0  # of 15 other scores two are always above 0: expert 3 is idle
    weight[8:12] *= 0.2
    return weight * 0.0 if load == "idle" else weight


def kept_experts(load: str, rank: int, *, capacity: bool) -> list[int]:
    """The expert of every kept assignment of a rank, by a loop over tokens."""
    x, weight = tokens_of(load, rank).double().numpy(), router_of(load).double().numpy()
    choices = np.argsort(-(x @ weight.T), axis=1, kind="stable")[:, :TOP_K]
    room = [TOP_K * -(-len(x) // NUM_EXPERTS)] * NUM_EXPERTS
    kept = []
    for expert in choices.T.flatten().tolist():
        if not capacity or room[expert] > 0:
            kept.append(expert)
            room[expert] -= 1
    return kept


# ---------------------------------------------------------------- on a rank


@contextmanager
def traffic() -> Iterator[list[tuple[str, str, int]]]:
    """Notes of each all-to-all: between whom, "counts" or "rows", and the bytes that leave for other ranks."""
    original, log = dist.all_to_all_single, []

    def noted(output, rows, output_sizes=None, input_sizes=None, group=None, async_op=False):
        ranks = dist.get_process_group_ranks(group)
        level = "flat" if len(ranks) == NUM_RANKS else "local" if ranks[1] - ranks[0] == 1 else "across"
        sizes = input_sizes or [rows.shape[0] // len(ranks)] * len(ranks)
        row_bytes = rows.element_size() * int(np.prod(rows.shape[1:]))
        others = sum(size for peer, size in zip(ranks, sizes, strict=True) if peer != dist.get_rank())
        log.append((level, "counts" if rows.dtype is torch.int64 else "rows", others * row_bytes))
        return original(output, rows, output_sizes, input_sizes, group=group, async_op=async_op)

    dist.all_to_all_single = noted
    try:
        yield log
    finally:
        dist.all_to_all_single = original


def make_layer(exchange: Exchange, load: str, *, capacity: bool) -> MoELayer:
    settings = MoEConfig(num_experts=NUM_EXPERTS, top_k=TOP_K, dropless=not capacity, balance_loss_coeff=0.0)
    context = MoEContext(
        config=settings, hidden_size=HIDDEN, expert_ffn_hidden_size=FFN, activation="gelu", use_bias=True,
        dtype=torch.float32, device="cpu",
        parallel=ExpertParallel(exchange, NUM_RANKS, None, 1, 1, 0, False),
        loss_scale=LossScale(), statistics=LoadStatistics(), evaluation=EvaluationMode(),
    )  # fmt: skip
    layer = MoELayer(None, context=context, layer=0, num_experts=NUM_EXPERTS)
    generator = torch.Generator().manual_seed(30 + dist.get_rank())
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.normal_(generator=generator)
        layer.router.weight.copy_(router_of(load))
    return layer


def run_layer(exchange: Exchange, load: str, *, capacity: bool) -> dict[str, Any]:
    layer, rank = make_layer(exchange, load, capacity=capacity), dist.get_rank()
    x = tokens_of(load, rank).requires_grad_(load != "frozen")
    with traffic() as forward:
        y, beside = layer._route_and_apply(x, num_sequences=1, beside=lambda: x.sin())
    with traffic() as backward:
        torch.manual_seed(40 + rank)
        (y + beside).backward(torch.randn_like(y))
    with torch.no_grad(), traffic() as alone:
        again, _ = layer._route_and_apply(x, num_sequences=1)
    arrays = {"y": y.detach(), "again": again, **{name: p.grad for name, p in layer.named_parameters()}}
    if x.grad is not None:
        arrays["x"] = x.grad
    return {
        "arrays": {name: array.numpy().copy() for name, array in arrays.items()},
        "forward": forward, "backward": backward, "alone": alone,
    }  # fmt: skip


def run_layers(groups: ParallelGroups) -> dict[Any, Any]:
    found = {}
    for levels, chunks in WAYS:
        if levels == "flat":
            exchange = Exchange.flat(groups.expert, num_chunks=chunks)
        else:
            exchange = Exchange.hierarchical(groups.expert_local, groups.expert_across, num_chunks=chunks)
        for load, capacity in CASES:
            found[levels, chunks, load, capacity] = run_layer(exchange, load, capacity=capacity)
    return found


def train(model: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Two steps of two micro-batches: what sums gradients up takes part."""
    fixed = (*parallel(ep=4, zero=1, recompute="full"), "run.global_batch_size=16")
    settings = config(model, (*fixed, *overrides), optimizer="sgd")
    with trainer_of(settings) as trainer:
        rows = [step(trainer, batch) for batch in samples(settings, 2)]
        return {"rows": rows, "weights": weights(trainer)}


def train_with_tensor(model: str, sp: bool) -> dict[str, Any]:
    """The all-to-alls of a step, and the experts of the kept assignments of every routing in it."""
    settings, original, kept = config(model, parallel(tp=2, ep=2, sp=sp, zero=1)), layer_module.settle, []

    def noted(*args: Any, **kwargs: Any) -> Any:
        routing = original(*args, **kwargs)
        kept.append(routing.expert_index[routing.kept].tolist())
        return routing

    with trainer_of(settings) as trainer:
        layer_module.settle = noted
        with traffic() as log:
            step(trainer, samples(settings, 1)[0])
        layer_module.settle = original
    return {"log": log, "kept": kept}


def sentences() -> dict[str, str]:
    """What hierarchical all-to-all says when it does not know its nodes. As if ranks were started 2, 2, 1, 1 a node."""
    hierarchy = config("paper_all", (*parallel(ep=4), "parallel.all_to_all=hierarchical")).parallel
    uneven = hierarchy.model_copy(update={"ranks_per_node": 3})
    told = PER_NODE if dist.get_rank() < 2 else 1
    actions: dict[str, Callable[[], object]] = {
        "unknown": lambda: create_groups(hierarchy),
        "differs": lambda: create_groups(hierarchy, launched_ranks_per_node=told),
        "uneven": lambda: create_groups(uneven),
    }
    found = {}
    for name, action in actions.items():
        with pytest.raises(TopologyError) as caught:
            action()
        found[name] = str(caught.value)
    made = create_groups(hierarchy, launched_ranks_per_node=NUM_RANKS)  # one node
    found["one node"] = str((made.expert_local, made.expert_across))
    destroy_groups()
    return found


def on_rank() -> dict[str, Any]:
    settings = config("paper_all", (*parallel(ep=4), "parallel.all_to_all=hierarchical"))
    with world(settings):
        said = sentences()
        groups = create_groups(settings.parallel, launched_ranks_per_node=PER_NODE)
        members = [dist.get_process_group_ranks(group) for group in (groups.expert_local, groups.expert_across)]
        layers = run_layers(groups)
        destroy_groups()
        dist.barrier()
    return {
        "said": said,
        "members": members,
        "layers": layers,
        "trained": {name: train(*case) for name, case in TRAININGS.items()},
        "tensor": {name: train_with_tensor(*case) for name, case in WITH_TENSOR.items()},
    }


@cache
def launch() -> list[dict[str, Any]]:
    return run_ranks(on_rank, NUM_RANKS, init=False, timeout_seconds=2 * LAUNCH_TIMEOUT_SECONDS)


# ---------------------------------------------------------------- the same bits


@pytest.mark.timeout(2 * LAUNCH_TIMEOUT_SECONDS + 30)
def test_launch() -> None:
    """Pays for the launch, so that the tests below are charged with comparing only."""
    assert [rank["members"][0] for rank in launch()] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [rank["members"][1] for rank in launch()] == [[0, 2], [1, 3], [0, 2], [1, 3]]


@pytest.mark.parametrize(("load", "capacity"), CASES)
@pytest.mark.parametrize(("levels", "chunks"), WAYS[1:])
def test_every_way_gives_the_same_bits(levels: str, chunks: int, load: str, capacity: bool) -> None:
    for rank in launch():
        plain, other = (rank["layers"][(*way, load, capacity)]["arrays"] for way in (WAYS[0], (levels, chunks)))
        assert_same_arrays(other, plain)
        assert_same_arrays({"y": plain["again"]}, {"y": plain["y"]})
        assert ("x" in plain) == (load != "frozen")


def test_the_cases_are_what_they_say() -> None:
    found = [rank["layers"] for rank in launch()]
    for load, capacity in CASES:
        arrays = [layers["flat", 1, load, capacity]["arrays"] for layers in found]
        used = np.concatenate([np.abs(rank["experts.fc1.weight"]).sum(axis=(1, 2)) > 0 for rank in arrays])
        expected = {e for rank in range(NUM_RANKS) for e in kept_experts(load, rank, capacity=capacity)}
        assert set(np.flatnonzero(used).tolist()) == expected
        assert 3 not in expected and (load != "idle" or expected == {0, 1})
    for rank in range(NUM_RANKS):
        every, fewer = (len(kept_experts("uneven", rank, capacity=capacity)) for capacity in (False, True))
        assert fewer < every == TOP_K * (10 + 3 * rank)


@pytest.mark.parametrize("name", TRAININGS)
def test_recomputed_training_is_the_same_to_the_bit(name: str) -> None:
    plain = "capacity flat" if name.startswith("capacity") else "flat"
    for rank in launch():
        assert rank["trained"][name]["rows"] == rank["trained"][plain]["rows"]
        assert_same_arrays(rank["trained"][name]["weights"], rank["trained"][plain]["weights"])
    losses = column(launch()[0]["trained"][plain]["rows"], "lm_loss")
    assert losses[0] != losses[1]


# ---------------------------------------------------------------- the bytes

Row = tuple[int, int, int]  # sending rank, owning rank, chunk


def rows_of(load: str, capacity: bool, chunks: int) -> list[Row]:
    return [
        (rank, expert // PER_RANK, expert % PER_RANK // (PER_RANK // chunks))
        for rank in range(NUM_RANKS)
        for expert in kept_experts(load, rank, capacity=capacity)
    ]


def leaving(rows: list[Row], rank: int, hop: str) -> int:
    """Rows that must leave `rank` on a hop of the way there, or on its way back. `midway` is where the first hop ends:
    on the sender's node, the rank with the local number of the owner."""
    count = 0
    for sender, owner, _ in rows:
        midway = sender // PER_NODE * PER_NODE + owner % PER_NODE
        start, end = {
            "flat there": (sender, owner), "flat back": (owner, sender),
            "local there": (sender, midway), "across there": (midway, owner),
            "across back": (owner, midway), "local back": (midway, sender),
        }[hop]  # fmt: skip
        count += start == rank != end
    return count


def expected_traffic(load: str, capacity: bool, chunks: int, rank: int, level: str) -> tuple[list[int], list[int]]:
    """Bytes of every call of one level in the order of the calls, forward and backward."""
    rows = rows_of(load, capacity, chunks)
    by_chunk = [[row for row in rows if row[2] == chunk] for chunk in range(chunks)]
    there, back = (
        [leaving(of_chunk, rank, f"{level} {way}") * HIDDEN * 4 for of_chunk in by_chunk] for way in ("there", "back")
    )
    if level == "local":
        forward = there + back
    else:  # the next chunk sets out before the results of one go back
        forward = [there[0]]
        for chunk in range(chunks):
            forward += [*there[chunk + 1 : chunk + 2], back[chunk]]
    # The gradient of the way back goes there again, and needs the same rows.
    return forward, there[::-1] + ([] if load == "frozen" else back[::-1])


@pytest.mark.parametrize(("load", "capacity"), CASES)
@pytest.mark.parametrize(("levels", "chunks"), WAYS)
def test_what_must_travel_travels_and_nothing_else(levels: str, chunks: int, load: str, capacity: bool) -> None:
    own_levels = ("flat",) if levels == "flat" else ("local", "across")
    for number, rank in enumerate(launch()):
        found = rank["layers"][levels, chunks, load, capacity]
        assert {level for level, _, _ in found["forward"] + found["backward"]} == set(own_levels)
        for level in own_levels:
            sent = {
                phase: [size for at, kind, size in found[phase] if (at, kind) == (level, "rows")]
                for phase in ("forward", "backward", "alone")
            }
            forward, backward = expected_traffic(load, capacity, chunks, number, level)
            assert sent["forward"] == sent["alone"] == forward
            assert sent["backward"] == backward
            share_of_others = 1 - 1 / (NUM_RANKS if level == "flat" else 2)
            counts = [size for at, kind, size in found["forward"] if (at, kind) == (level, "counts")]
            assert counts == [NUM_EXPERTS * 8 * share_of_others]
        assert all(kind == "rows" for _, kind, _ in found["backward"])


@pytest.mark.parametrize("load", LOADS)
def test_dropless_sends_tokens_times_choices_times_what_is_not_local(load: str) -> None:
    """The formula itself."""
    for number, rank in enumerate(launch()):
        experts = kept_experts(load, number, capacity=False)
        num_tokens = len(tokens_of(load, number))
        num_local = sum(expert // PER_RANK == number for expert in experts)
        for chunks in (1, 2, 4):
            found = rank["layers"]["flat", chunks, load, False]
            there = expected_traffic(load, False, chunks, number, "flat")[1][:chunks]
            assert [size for _, _, size in found["backward"]][:chunks] == there
            assert sum(there) * max(1, num_tokens * TOP_K) == num_tokens * TOP_K * HIDDEN * 4 * (
                max(1, num_tokens * TOP_K) - num_local
            )


def test_ranks_call_in_the_same_order() -> None:
    for way, case in product(WAYS, CASES):
        for phase in ("forward", "backward", "alone"):
            calls = [
                [(level, kind) for level, kind, _ in rank["layers"][way + case][phase]] for rank in launch()
            ]
            assert calls[0] and all(others == calls[0] for others in calls), (way, case, phase)


@pytest.mark.parametrize("name", WITH_TENSOR)
def test_beside_tensor_parallelism_each_slice_travels_once(name: str) -> None:
    """Ranks 0 and 1 are an expert group and a tensor group at once; so are 2 and 3."""
    model, _ = WITH_TENSOR[name]
    settings, ranks = config(model), [rank["tensor"][name] for rank in launch()]
    model_config, num_experts = settings.model, settings.moe.num_experts
    num_calls = len(ranks[0]["kept"])
    micro_batches = settings.run.global_batch_size // settings.run.micro_batch_size // 2
    assert num_calls == 2 * micro_batches, "MoE layers times micro-batches"
    slice_size = settings.run.micro_batch_size * model_config.seq_length // 2
    for number, rank in enumerate(ranks):
        peer = ranks[number ^ 1]
        sent = received = 0
        for mine, theirs in zip(rank["kept"], peer["kept"], strict=True):
            assert len(mine) == slice_size * TOP_K or (name == "capacity" and len(mine) < slice_size * TOP_K)
            sent += sum(expert // (num_experts // 2) != number % 2 for expert in mine)
            received += sum(expert // (num_experts // 2) == number % 2 for expert in theirs)
        rows = [size for _, kind, size in rank["log"] if kind == "rows"]
        assert len(rows) == 4 * num_calls
        assert sum(rows) == 2 * (sent + received) * model_config.hidden_size * 4
        assert [size for _, kind, size in rank["log"] if kind == "counts"] == [num_experts // 2 * 8] * num_calls


def test_what_is_said_where_the_nodes_are_not_known() -> None:
    for rank in launch():
        said = rank["said"]
        assert "the launcher does not say, or does not number ranks node by node" in said["unknown"]
        assert "the launcher started 1 ranks on one node and 2 on another" in said["differs"]
        assert "with 3 ranks a node the ranks 0, 1, 2, 3 lie [3, 1] to a node" in said["uneven"]
        assert said["one node"] == "(None, None)"

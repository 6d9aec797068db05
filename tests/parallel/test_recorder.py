"""What the recorder writes down, against what the test itself calls: on real ranks, by every way a call can be made."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed import comm as deepspeed_comm
from deepspeed.accelerator import get_accelerator
from megatron.core.tensor_parallel.random import CheckpointFunction, initialize_rng_tracker
from torch import Tensor

from megamoe.dry_run.recorder import Call, Recorder
from megamoe.model import cpu_bridge
from megamoe.moe.collectives import Transfer, finish_all_to_all, start_all_to_all
from tests.harness import run_ranks

FLOAT = 4


class _SumOfRanks(torch.autograd.Function):
    """A collective in either direction."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, x = group, x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def on_rank() -> dict[str, tuple[list[Call], list[Call]]]:
    """Recorded and expected calls of each case, on this rank of four."""
    rank, world = dist.get_rank(), (0, 1, 2, 3)
    pairs = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    group, pair, other = pairs[rank % 2], (rank % 2, rank % 2 + 2), (rank + 2) % 4
    cases = {}
    with Recorder() as recorder:

        def seen(name: str, *expected: Call) -> None:
            cases[name] = list(recorder.take()), list(expected)

        x = torch.ones(8)
        dist.all_reduce(x, group=group, async_op=True).wait()
        seen("all-reduce", Call("all_reduce", pair, 8 * FLOAT, "forward"))
        dist.all_gather_into_tensor(torch.empty(32, dtype=torch.bfloat16), x.bfloat16())
        seen("all-gather into a tensor", Call("all_gather", world, 8 * 2, "forward"))
        dist.all_gather([torch.empty(8) for _ in range(2)], x, group=group)
        seen("all-gather into a list", Call("all_gather", pair, 8 * FLOAT, "forward"))
        dist.reduce_scatter_tensor(torch.empty(4), x, group=group)
        seen("reduce-scatter", Call("reduce_scatter", pair, 8 * FLOAT, "forward"))
        dist.reduce_scatter(torch.empty(3), [torch.ones(3)] * 4)
        seen("reduce-scatter of a list", Call("reduce_scatter", world, 12 * FLOAT, "forward"))
        # Rank r sends q + 1 rows to rank q; so r + 1 rows come from each.
        rows, arrived = torch.ones(10, 5), torch.empty(4 * (rank + 1), 5)
        dist.all_to_all_single(arrived, rows, [rank + 1] * 4, [1, 2, 3, 4], async_op=True).wait()
        seen("all-to-all with splits", Call("all_to_all", world, 50 * FLOAT, "forward"))
        dist.all_to_all_single(torch.empty(4, dtype=torch.int64), torch.ones(4, dtype=torch.int64), group=group)
        seen("all-to-all without", Call("all_to_all", pair, 4 * 8, "forward"))
        dist.broadcast(x[:3], src=pair[1], group=group)
        seen("broadcast of a view", Call("broadcast", pair, 3 * FLOAT, "forward"))
        messages = [dist.P2POp(dist.isend, x, other), dist.P2POp(dist.irecv, torch.empty(8), other)]
        for work in dist.batch_isend_irecv(messages):
            work.wait()
        sent = Call("send", world, 8 * FLOAT, "forward", peer=other)
        received = Call("receive", world, 8 * FLOAT, "forward", peer=other)
        seen("batched messages", sent, received)
        here = dist.isend(x[:2], other, group=group)
        dist.recv(torch.empty(2), other, group=group)
        here.wait()
        seen("messages in a group", Call("send", pair, 8, "forward", other), Call("receive", pair, 8, "forward", other))
        dist.all_reduce_coalesced([torch.ones(3), torch.ones(5)], group=group)
        seen("coalesced all-reduce", Call("all_reduce", pair, 8 * FLOAT, "forward"))
        with recorder.during("update"):
            dist.reduce(x, 0)
            dist.gather(x, [torch.empty(8) for _ in range(4)] if rank == 0 else None)
            dist.scatter(torch.empty(8), [x] * 4 if rank == 0 else None)
        seen(
            "to and from one rank",
            Call("reduce", world, 8 * FLOAT, "update"),
            Call("gather", world, 8 * FLOAT, "update"),
            Call("scatter", world, 32 * FLOAT if rank == 0 else 0, "update"),
        )
        dist.barrier(group=group)
        seen("barrier", Call("barrier", pair, 0, "forward"))
        with recorder.during("update"):
            from_autograd(group)
        forward, backward = (Call("all_reduce", pair, 6 * FLOAT, phase) for phase in ("update", "backward"))
        seen("autograd", forward, backward)
        through_checkpoint(group)
        again = Call("all_reduce", pair, 6 * FLOAT, "recompute")
        seen("recompute", Call("all_reduce", pair, 6 * FLOAT, "forward"), again, backward)
        in_halves(group)
        half = [Call("all_to_all", pair, 4 * 3 * FLOAT, phase) for phase in ("forward", "backward")]
        seen("all-to-all in halves", *half)
        through_deepspeed(group)
        seen(
            "DeepSpeed",
            Call("all_reduce", pair, 8 * FLOAT, "forward"),
            Call("all_gather", pair, 8 * FLOAT, "forward"),
            Call("reduce_scatter", pair, 8 * FLOAT, "forward"),
            Call("broadcast", pair, 8 * FLOAT, "forward"),
            Call("all_to_all", pair, 8 * FLOAT, "forward"),
        )
    dist.all_reduce(x)
    seen("outside")
    return cases


def from_autograd(group: dist.ProcessGroup) -> None:
    _SumOfRanks.apply(torch.ones(6, requires_grad=True), group).sum().backward()


def through_checkpoint(group: dist.ProcessGroup) -> None:
    """Megatron-core's checkpoint, which recompute uses: the collective runs three times."""
    initialize_rng_tracker(force_reset=True)
    x = torch.ones(6, requires_grad=True)
    CheckpointFunction.apply(lambda x: _SumOfRanks.apply(x, group), False, x).sum().backward()


def in_halves(group: dist.ProcessGroup) -> None:
    """The MoE layer's exchange of 4 rows, 2 to each rank."""
    transfer = Transfer(group, [2, 2], [2, 2])
    rows = torch.ones(4, 3, requires_grad=True)
    finish_all_to_all(start_all_to_all(rows, transfer), transfer).sum().backward()


def through_deepspeed(group: dist.ProcessGroup) -> None:
    deepspeed_comm.init_distributed(get_accelerator().communication_backend_name(), dist_init_required=False)
    x = torch.ones(8)
    deepspeed_comm.all_reduce(x, group=group)
    deepspeed_comm.all_gather_into_tensor(torch.empty(16), x, group=group)
    deepspeed_comm.reduce_scatter_fn(torch.empty(4), x, group=group)
    deepspeed_comm.broadcast(x, dist.get_process_group_ranks(group)[0], group=group)
    deepspeed_comm.all_to_all_single(torch.empty(8), x, group=group)


@pytest.fixture(scope="module")
def recorded() -> list[dict[str, tuple[list[Call], list[Call]]]]:
    return run_ranks(on_bridged_rank, 4)


def on_bridged_rank() -> dict[str, tuple[list[Call], list[Call]]]:
    cpu_bridge.apply()
    return on_rank()


def test_every_way_to_call_a_collective_is_seen_as_it_was_called(recorded):
    for cases in recorded:
        assert len(cases) == 18
        for name, (calls, expected) in cases.items():
            assert calls == expected, name


def test_callers_are_named_where_they_are_ours(recorded):
    calls, _ = recorded[0]["all-to-all in halves"]
    assert {call.caller.partition(":")[0] for call in calls} == {"megamoe.moe.collectives"}
    assert recorded[0]["all-reduce"][0][0].caller == ""


def test_a_functional_collective_is_refused_and_not_lost():
    assert run_ranks(functional_collective, 2) == ["_c10d_functional.all_reduce.default"] * 2


def functional_collective() -> str:
    from torch.distributed._functional_collectives import all_reduce

    with Recorder():
        try:
            all_reduce(torch.ones(2), "sum", dist.group.WORLD)
        except NotImplementedError as error:
            return str(error).split()[0]
    return "not refused"

"""Every collective that this rank calls, in order, whoever calls it: our code, Megatron-core, DeepSpeed, autograd.

torch 2.13 sends each call of torch.distributed through its dispatcher, as an operator of the namespace c10d, on the
thread that made it and in backward passes too; a dispatch mode sees them all, synchronous or not, on real tensors, fake
ones and those of the meta device. Nothing is patched. What happens between ranks outside of that is not a collective:
making a group talks through the store.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megamoe.plan.quantities import Kind, Phase

# What no plan speaks of, so that nothing a rank calls can go unseen.
OtherKind = Literal["barrier", "reduce", "gather", "scatter"]


@dataclass(frozen=True)
class Call:
    """One collective of this rank, or one of its messages to or from `peer`.

    `num_bytes` is what this rank puts in, as in `megamoe.plan.quantities.Collective`; a coalesced call is one call of
    all its tensors. `ranks` are global, in the order of the group. `phase` is backward or recompute where autograd
    made the call, else the phase that `Recorder.during` has set. `caller` is the innermost function of megamoe,
    Megatron-core or DeepSpeed on the stack: for the reader, not for comparisons.
    """

    kind: Kind | OtherKind
    ranks: tuple[int, ...]
    num_bytes: int
    phase: Phase
    peer: int | None = None  # global rank
    caller: str = field(default="", compare=False)


class _Operator(NamedTuple):
    kind: Kind | OtherKind
    input: int | None  # position of the tensors that this rank puts in; of a receive, those that come in
    peer: int | None = None  # position of the peer's number in the group


_OPERATORS = {
    "allreduce_": _Operator("all_reduce", 0),
    "allreduce_coalesced_": _Operator("all_reduce", 0),
    "allgather_": _Operator("all_gather", 1),
    "allgather_coalesced_": _Operator("all_gather", 1),
    "_allgather_base_": _Operator("all_gather", 1),
    "allgather_into_tensor_coalesced_": _Operator("all_gather", 1),
    "reduce_scatter_": _Operator("reduce_scatter", 1),
    "_reduce_scatter_base_": _Operator("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": _Operator("reduce_scatter", 1),
    "alltoall_": _Operator("all_to_all", 1),
    "alltoall_base_": _Operator("all_to_all", 1),
    "broadcast_": _Operator("broadcast", 0),
    "send": _Operator("send", 0, peer=2),
    "recv_": _Operator("receive", 0, peer=2),
    "recv_any_source_": _Operator("receive", 0),
    "reduce_": _Operator("reduce", 0),
    "gather_": _Operator("gather", 1),
    "scatter_": _Operator("scatter", 1),
    "barrier": _Operator("barrier", None),
    "monitored_barrier_": _Operator("barrier", None),
}
_NOT_COLLECTIVE = {"check_for_nan", "wait_tensor"}


class Recorder(TorchDispatchMode):
    """Use as a context manager; afterwards, or meanwhile, read `calls`.

    Raises NotImplementedError from a call that it does not know, such as torch's functional collectives.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._phase: Phase = "forward"

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Calls that autograd does not make belong to `phase` inside; to "forward" where nobody says."""
        before, self._phase = self._phase, phase
        try:
            yield
        finally:
            self._phase = before

    def take(self) -> tuple[Call, ...]:
        """The calls since the last `take`, which are then forgotten."""
        calls, self.calls = tuple(self.calls), []
        return calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            self._record(func, args)
        return func(*args, **(kwargs or {}))

    def _record(self, func: Any, args: tuple[Any, ...]) -> None:
        name = func._schema.name.partition("::")[2]
        if name in _NOT_COLLECTIVE:
            return
        if func.namespace != "c10d" or name not in _OPERATORS:
            raise NotImplementedError(f"{func} is a collective that the recorder does not know")
        operator = _OPERATORS[name]
        group = dist.ProcessGroup.unbox(args[_position_of_group(func)])
        ranks = tuple(dist.get_process_group_ranks(group))
        num_bytes = 0 if operator.input is None else _num_bytes(args[operator.input])
        peer = None if operator.peer is None else ranks[args[operator.peer]]
        phase = _autograd_phase() or self._phase
        self.calls.append(Call(operator.kind, ranks, num_bytes, phase, peer, _caller()))


def recorded_kinds() -> tuple[str, ...]:
    """Every kind that a Call may be of."""
    return (*get_args(Kind), *get_args(OtherKind))


@cache
def _position_of_group(func: Any) -> int:
    """Of the process group among an operator's arguments."""
    types = [str(argument.type) for argument in func._schema.arguments]
    return next(place for place, each in enumerate(types) if each.endswith("ProcessGroup"))


def _num_bytes(tensors: Any) -> int:
    """Of a tensor, or of lists of tensors in any depth."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_num_bytes, tensors))


def _autograd_phase() -> Phase | None:
    """None outside of a backward pass. Inside, a checkpoint's node runs its piece of the forward pass again; the
    backward pass of that piece is made by nodes of its own."""
    if torch._C._current_graph_task_id() == -1:
        return None
    node = torch._C._current_autograd_node()
    return "recompute" if node is not None and "Checkpoint" in node.name() else "backward"


_OURS = ("megamoe.", "megatron.", "deepspeed.")
_NOT_CALLERS = ("megamoe.dry_run.recorder", "megamoe.launch", "deepspeed.comm", "deepspeed.utils")


def _caller() -> str:
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(_OURS) and not module.startswith(_NOT_CALLERS):
            return f"{module}:{frame.f_code.co_name}"
        frame = frame.f_back
    return ""

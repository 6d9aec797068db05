"""The training state of a rank as slices of global tensors: what it owns, and writes; what it needs, and reads.

Every element of the global state is owned by exactly one rank, whatever the layout:

- of copies on tensor ranks (norms, routers, …) and of a tied embedding's two copies the first is the owner's;
- ZeRO stages 1 and 2 cut masters and moments into partitions (`optimizer_state`); a rank owns its own, and the same
  elements of the weights;
- at stage 0, and where a parameter is frozen, the data-parallel (for experts: expert-data-parallel) copies share each
  local part out evenly.

In fp32 the weight is the master. Kinds and names are those of the checkpoint format.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from megamoe.checkpoint.slices import Slice
from megamoe.config.schema import Config
from megamoe.model.naming import LocalParameter
from megamoe.model.parallel import ParallelGroups
from megamoe.model.random import random_state
from megamoe.moe.balance_bias import BalanceBias
from megamoe.topology.reductions import is_whole_on_each_tensor_rank
from megamoe.training.optimizer_state import OptimizerPart, optimizer_parts

if TYPE_CHECKING:
    from megamoe.training.build import Trainer

WEIGHT, MASTER, BALANCE_BIAS, RANDOM = "weight", "master", "balance_bias", "random"
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}


@dataclass(frozen=True)
class Piece:
    """A slice of a global tensor and where its values are on this rank: a 1-D view of the live state."""

    slice: Slice
    values: Tensor


class WeightHolder(Protocol):
    """What has a rank's part of a model: a trainer, or what only computes with it."""

    config: Config
    groups: ParallelGroups
    parameters: list[LocalParameter]
    balance_bias: BalanceBias

    @property
    def device(self) -> torch.device: ...


def owned(trainer: "Trainer") -> list[Piece]:
    """What this rank writes. Over all ranks every element of every tensor of the state is there once."""
    pieces = []
    for part in optimizer_parts(trainer):
        if not _is_first_copy(trainer, part.local):
            continue
        first, last = _share(trainer, part)
        if first < last:
            pieces += _pieces_of(trainer, part, first, last)
    pieces += _frozen(trainer)
    at = trainer.groups.coordinates
    if at.tensor == 0 and at.data == 0:
        pieces += _balance_biases(trainer)
    return pieces + random_pieces(at.rank)


def needed(trainer: "Trainer") -> list[Piece]:
    """What this rank must read to go on, but for random states: all its weights, its part of masters and moments.

    In fp32 under ZeRO the masters are not among them: they follow from the weights (`masters_from_weights`).
    """
    pieces = model_pieces(trainer)
    for part in optimizer_parts(trainer):
        pieces += [p for p in _pieces_of(trainer, part, part.first, part.last) if p.slice.kind != WEIGHT]
    return pieces


def model_pieces(holder: WeightHolder) -> list[Piece]:
    """What a forward pass needs of this rank's part of the model: weights and balance biases."""
    pieces = []
    for local in holder.parameters:
        values = local.tensor.detach().view(-1)
        pieces.append(Piece(_slice(WEIGHT, local, values.dtype, 0, values.numel()), values))
    return pieces + _balance_biases(holder)


@torch.no_grad()
def masters_from_weights(trainer: "Trainer") -> None:
    """Make ZeRO's masters equal to the weights that were read: in fp32 they are the same numbers."""
    for part in optimizer_parts(trainer):
        part.master.copy_(part.local.tensor.detach().view(-1)[part.first : part.last])


def random_pieces(rank: int) -> list[Piece]:
    """Copies of this rank's random states; each is a tensor of its own, named after the rank."""
    states = {name: state.cpu().view(-1) for name, state in random_state().items()}
    return [
        Piece(random_slice(rank, name, state.numel()), state) for name, state in sorted(states.items()) if state.numel()
    ]


def random_slice(rank: int, name: str, num_bytes: int) -> Slice:
    return Slice(RANDOM, f"{random_prefix(rank)}{name}", "U8", (num_bytes,), ((0, num_bytes),), 0, num_bytes)


def random_prefix(rank: int) -> str:
    return f"rank_{rank:05d}/"


def _pieces_of(trainer: "Trainer", part: OptimizerPart, first: int, last: int) -> Iterator[Piece]:
    """Weight, master (16-bit runs) and moments of elements [first, last) of a local part, which lie in `part`."""
    weights = part.local.tensor.detach().view(-1)
    yield Piece(_slice(WEIGHT, part.local, weights.dtype, first, last), weights[first:last])
    here = slice(first - part.first, last - part.first)
    if weights.dtype != torch.float32:
        yield Piece(_slice(MASTER, part.local, part.master.dtype, first, last), part.master[here])
    for name, values in part.moments.items():
        yield Piece(_slice(name, part.local, values.dtype, first, last), values[here])


def _slice(kind: str, local: LocalParameter, dtype: torch.dtype, first: int, last: int) -> Slice:
    box = tuple((cut.start, cut.stop) for cut in local.slices)
    return Slice(kind, local.parameter.name, DTYPE_NAMES[dtype], local.parameter.shape, box, first, last)


def _is_first_copy(trainer: "Trainer", local: LocalParameter) -> bool:
    if local.tied_copy:
        return False
    at = trainer.groups.coordinates
    copy = at.expert_tensor if local.parameter.kind == "expert" else at.tensor
    return copy == 0 or not is_whole_on_each_tensor_rank(local.parameter, trainer.config.parallel)


def _share(trainer: "Trainer", part: OptimizerPart) -> tuple[int, int]:
    """The elements of `part` that this rank writes: under ZeRO all, else its equal share among the copies."""
    return (part.first, part.last) if trainer.engine.zero_stage > 0 else _equal_share(trainer, part.local)


def _equal_share(trainer: "Trainer", local: LocalParameter) -> tuple[int, int]:
    """The elements of a local part, which its data-parallel copies share out evenly, that are this rank's."""
    at, grid, size = trainer.groups.coordinates, trainer.groups.grid, local.tensor.numel()
    is_expert = local.parameter.kind == "expert"
    number, copies = (at.expert_data, grid.expert_data) if is_expert else (at.data, grid.data)
    return size * number // copies, size * (number + 1) // copies


def _frozen(trainer: "Trainer") -> Iterator[Piece]:
    """The weights that no optimizer holds; they have neither masters nor moments."""
    for local in trainer.parameters:
        if local.tensor.requires_grad or not _is_first_copy(trainer, local):
            continue
        first, last = _equal_share(trainer, local)
        if first < last:
            weights = local.tensor.detach().view(-1)
            yield Piece(_slice(WEIGHT, local, weights.dtype, first, last), weights[first:last])


def _balance_biases(holder: WeightHolder) -> list[Piece]:
    pieces = []
    for layer, bias in sorted(holder.balance_bias.by_layer.items()):
        size = bias.numel()
        where = Slice(BALANCE_BIAS, f"layers.{layer}.router", "F32", (size,), ((0, size),), 0, size)
        pieces.append(Piece(where, bias))
    return pieces

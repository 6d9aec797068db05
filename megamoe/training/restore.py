"""Loading a checkpoint of any layout and precision: each rank reads the slices it needs and no others.

Ranks agree on every verdict: where one finds damage, all leave that checkpoint.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.checkpoint.layouts import same_streams
from megamoe.checkpoint.reader import Checkpoint
from megamoe.checkpoint.slices import STORAGE, Slice
from megamoe.errors import CheckpointError
from megamoe.model.random import random_state, reseed_generators, restore_random_state
from megamoe.topology.parameters import HEAD, Parameter, param_table
from megamoe.training.agreement import first_message, first_ranks_numbers
from megamoe.training.checkpoint_state import changed_settings, check_same_model
from megamoe.training.host_copy import as_bytes
from megamoe.training.optimizer_state import set_num_optimizer_steps
from megamoe.training.saving import layout_here
from megamoe.training.state import (
    BALANCE_BIAS,
    DTYPE_NAMES,
    MASTER,
    WEIGHT,
    Piece,
    WeightHolder,
    masters_from_weights,
    model_pieces,
    needed,
    random_prefix,
    random_slice,
)

if TYPE_CHECKING:
    from megamoe.training.build import Trainer

WINDOW_BYTES = 64 << 20  # host memory of a load, where values are cast or go to a GPU
SAMPLED_SHARE = 0.1
_TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class DamagedCheckpoint(CheckpointError):
    """Files are missing, altered or unreadable: another checkpoint may be whole."""


@dataclass(frozen=True)
class Loaded:
    """What a load did: from where, the whole state or the weights alone, and what the user should hear of."""

    folder: Path
    notes: tuple[str, ...]
    is_whole: bool = True


def load_newest(trainer: "Trainer", folders: Sequence[Path], *, on_damage: str) -> Loaded:
    """Restore the trainer from the first of `folders` that is whole; they are the same on all ranks, newest first.

    Collective over all ranks. Raises CheckpointError for another model, and for damage where `on_damage` is "stop" or
    no older checkpoint is left.
    """
    passed_over: list[str] = []
    for folder in folders:
        try:
            loaded = load_checkpoint(trainer, folder)
        except DamagedCheckpoint as error:
            if on_damage == "stop":
                raise DamagedCheckpoint(
                    f"{error}; remove {folder} to go on from the checkpoint before it (checkpoint.on_damage is stop)"
                ) from None
            passed_over.append(f"damaged and passed over: {error}")
            continue
        return replace(loaded, notes=(*passed_over, *loaded.notes))
    raise DamagedCheckpoint(
        f"no checkpoint is whole: {'; '.join(passed_over)}; remove the folder to start anew, or set "
        "checkpoint.resume false"
    )


def load_checkpoint(trainer: "Trainer", folder: Path) -> Loaded:
    """Restore the trainer, in place, from a checkpoint of any layout. Collective over all ranks.

    Raises CheckpointError for another model or optimizer, DamagedCheckpoint naming file and tensor for damage; the
    trainer is then in no state to train from.
    """
    with _open(trainer, folder) as checkpoint:
        return _restore(trainer, checkpoint)


def _restore(trainer: "Trainer", checkpoint: Checkpoint) -> Loaded:
    manifest, folder = checkpoint.manifest, checkpoint.folder
    check_same_model(manifest.config, trainer.config, folder, with_optimizer=True)
    pieces, notes = _present(checkpoint, needed(trainer), folder)
    _together(trainer, lambda: _read_all(trainer, checkpoint, pieces))
    if trainer.config.run.precision == "fp32" and trainer.engine.zero_stage > 0:
        masters_from_weights(trainer)
    state = manifest.state
    trainer.step, trainer.samples, trainer.skipped_steps = state["step"], state["samples"], state["skipped_steps"]
    trainer.monitoring_run_id = state.get("monitoring_run_id")
    if trainer.best is not None:
        trainer.best.restore(state.get("best_validation"))
    if trainer.judge is not None:
        trainer.judge.restore(state.get("guard"))
    set_num_optimizer_steps(trainer.engine.basic_optimizer, state["optimizer_steps"])
    notes += changed_settings(manifest.config, trainer.config)
    notes += _restore_scaler(trainer, state["loss_scaler"])
    notes += _restore_random(trainer, checkpoint)
    return Loaded(folder, tuple(notes))


def load_weights(trainer: "Trainer", folder: Path) -> Loaded:
    """Fine-tuning: weights (exact ones where the checkpoint has masters) and router biases; all else stays fresh.

    A classifier may begin from a language model: its head stays as it was drawn, the output matrix is left behind.

    Collective over all ranks. Raises as `load_checkpoint`.
    """
    with _open(trainer, folder) as checkpoint:
        return load_weights_of(trainer, checkpoint)


def load_weights_of(trainer: "Trainer", checkpoint: Checkpoint) -> Loaded:
    """`load_weights` from a checkpoint that is open."""
    kinds = (WEIGHT, MASTER, BALANCE_BIAS)
    loaded = _load_pieces(trainer, checkpoint, [piece for piece in needed(trainer) if piece.slice.kind in kinds])
    if trainer.config.run.precision == "fp32" and trainer.engine.zero_stage > 0:
        masters_from_weights(trainer)
    return loaded


def load_model(holder: WeightHolder, folder: Path) -> Loaded:
    """`load_weights` where there is no optimizer: what a forward pass needs."""
    with _open(holder, folder) as checkpoint:
        return _load_pieces(holder, checkpoint, model_pieces(holder))


def _load_pieces(holder: WeightHolder, checkpoint: Checkpoint, pieces: Sequence[Piece]) -> Loaded:
    folder, saved, config = checkpoint.folder, checkpoint.manifest.config, holder.config
    gets_head = check_same_model(saved, config, folder, with_optimizer=False)
    if gets_head:
        pieces = [piece for piece in pieces if piece.slice.name != HEAD]
    present, notes = _present(checkpoint, pieces, folder)
    if gets_head:
        notes.append(f"the head of {config.model.num_labels} labels is new: {folder} is a language model")
    _together(holder, lambda: _read_all(holder, checkpoint, present, gets_head=gets_head))
    changed = changed_settings(saved, config)
    if config.finetune.objective is not None:  # another training: what the model does is all that matters
        changed = [each for each in changed if each.startswith(("model.", "moe."))]
    return Loaded(folder, (*notes, *changed), is_whole=False)


def _present(checkpoint: Checkpoint, pieces: Sequence[Piece], folder: Path) -> tuple[list[Piece], list[str]]:
    """The pieces without balance biases that the saved run did not have, which begin at zero; and a note of them.

    Raises CheckpointError where the optimizer keeps a moment that the saved one did not.
    """
    kinds = {kind for kind, _ in checkpoint.manifest.tensors}
    missing = sorted({piece.slice.kind for piece in pieces} - kinds - {WEIGHT, MASTER, BALANCE_BIAS})
    if missing:
        raise CheckpointError(
            f"{folder} holds no {missing[0]}, which this optimizer keeps: resume with the optimizer's settings that it "
            "was saved under, or start a run from its weights alone (checkpoint.load_from and another run.dir)"
        )
    if BALANCE_BIAS in kinds or not any(piece.slice.kind == BALANCE_BIAS for piece in pieces):
        return list(pieces), []
    for piece in pieces:
        if piece.slice.kind == BALANCE_BIAS:
            piece.values.zero_()
    return [p for p in pieces if p.slice.kind != BALANCE_BIAS], ["balance biases begin at zero: none were saved"]


def _open(holder: WeightHolder, folder: Path) -> Checkpoint:
    """The same checkpoint on all ranks. Raises CheckpointError where one of them was given another one."""
    found: list[Checkpoint] = []
    _together(holder, lambda: found.append(Checkpoint.open(folder)))
    manifest, message = found[0].manifest, None
    if [manifest.fingerprint] != first_ranks_numbers([manifest.fingerprint], device=holder.device):
        message = f"{folder}, step {manifest.step}, is another checkpoint on rank {dist.get_rank()} than on the first"
    told = first_message(message, groups=holder.groups, device=holder.device)
    if told is not None:
        found[0].close()
        raise CheckpointError(f"{told[1]}: name a checkpoint's own folder, not a run that is still training")
    return found[0]


def _together(holder: WeightHolder, work: Any) -> None:
    """Do `work` on every rank; if it finds damage on any of them, raise the same error on all."""
    message = None
    try:
        work()
    except CheckpointError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename or 'a file'} cannot be read ({error.strerror})"
    found = first_message(message, groups=holder.groups, device=holder.device)
    if found is not None:
        raise DamagedCheckpoint(found[1])


@torch.no_grad()
def _read_all(
    holder: WeightHolder, checkpoint: Checkpoint, pieces: Iterable[Piece], *, gets_head: bool = False
) -> None:
    config = holder.config
    # What a language model is made of, where that is what is read.
    model = config.model.model_copy(update={"num_labels": 0}) if gets_head else config.model
    _check_parameters(checkpoint, param_table(model, config.moe))
    is_sampled = config.checkpoint.verify == "sampled"
    draw = random.Random(dist.get_rank())
    window = np.empty(WINDOW_BYTES, dtype=np.uint8)  # untouched pages cost nothing
    for piece in pieces:
        verify = not is_sampled or draw.random() < SAMPLED_SHARE
        _read_piece(checkpoint, piece, window, verify=verify)


def _check_parameters(checkpoint: Checkpoint, table: Sequence[Parameter]) -> None:
    """Every parameter of the model is there in its shape, and none besides."""
    tensors = checkpoint.manifest.tensors
    shapes = {name: tuple(entry.shape) for (kind, name), entry in tensors.items() if kind == WEIGHT}
    expected = {parameter.name: parameter.shape for parameter in table}
    strangers = sorted(shapes.keys() ^ expected.keys())
    if strangers:
        raise CheckpointError(f"the checkpoint does not match the model: {strangers[0]} is only in one of them")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise CheckpointError(f"{name} has shape {shapes[name]} in the checkpoint, the model's is {shape}")


def _read_piece(checkpoint: Checkpoint, piece: Piece, window: np.ndarray, *, verify: bool) -> None:
    stored = _source(checkpoint, piece.slice)
    if not piece.values.is_cuda and stored.dtype == piece.slice.dtype:
        checkpoint.read(stored, as_bytes(piece.values).view(STORAGE[stored.dtype]), verify=verify)
        return
    item_bytes = STORAGE[stored.dtype].itemsize
    step = WINDOW_BYTES // item_bytes
    for first in range(0, stored.num_elements, step):
        last = min(first + step, stored.num_elements)
        target = window[: (last - first) * item_bytes]
        checkpoint.read(stored.part(first, last), target.view(STORAGE[stored.dtype]), verify=verify)
        piece.values[first:last].copy_(torch.from_numpy(target).view(_TORCH_DTYPES[stored.dtype]))


def _source(checkpoint: Checkpoint, wanted: Slice) -> Slice:
    """The stored tensor that holds what `wanted` asks for, in its own precision, at the same place.

    Weights of another precision come from the masters, which are exact; the masters of a 16-bit run come from the
    weights of an fp32 one, which has no others. Raises CheckpointError where nothing does.
    """
    tensors = checkpoint.manifest.tensors
    entry = tensors.get((wanted.kind, wanted.name))
    kind = wanted.kind
    if kind == WEIGHT and entry is not None and entry.dtype != wanted.dtype and (MASTER, wanted.name) in tensors:
        kind = MASTER
    if kind == MASTER and entry is None:
        kind = WEIGHT
    entry = tensors.get((kind, wanted.name))
    if entry is None:
        raise CheckpointError(f"the checkpoint holds no {wanted.kind} of {wanted.name}")
    if tuple(entry.shape) != wanted.shape:
        raise CheckpointError(f"{kind} {wanted.name} has shape {tuple(entry.shape)}, the model's is {wanted.shape}")
    if entry.dtype not in _TORCH_DTYPES:
        raise CheckpointError(f"{kind} {wanted.name} is of dtype {entry.dtype}, which no run writes")
    return replace(wanted, kind=kind, dtype=entry.dtype)


def _restore_scaler(trainer: "Trainer", stored: dict[str, Any] | None) -> list[str]:
    """What the scaler has reached; how it moves on is the configuration's."""
    if trainer.config.run.precision != "fp16":
        return []
    if not stored or trainer.engine.zero_stage == 0 or "cur_scale" not in stored:
        return ["the loss scale starts anew"]
    scaler = trainer.engine.optimizer.loss_scaler
    vars(scaler).update({name: value for name, value in stored.items() if name in vars(scaler)})
    return []


def _restore_random(trainer: "Trainer", checkpoint: Checkpoint) -> list[str]:
    """This rank's random states, where the ranks are folded as they were; else streams by seed and step."""
    is_same = same_streams(layout_here(trainer), checkpoint.manifest.layout)
    states: dict[str, Tensor] = {}
    if is_same:
        _together(trainer, lambda: states.update(_read_random(checkpoint, dist.get_rank())))
        is_same = states.keys() == random_state().keys()
    missing = first_message(None if is_same else "", groups=trainer.groups, device=trainer.schedule.device)
    if missing is None:
        restore_random_state(states)
        return []
    reseed_generators(trainer.config.run.seed, trainer.groups, step=trainer.step)
    return [f"another layout: random streams begin anew from the seed and step {trainer.step}"]


def _read_random(checkpoint: Checkpoint, rank: int) -> Iterator[tuple[str, Tensor]]:
    prefix = random_prefix(rank)
    for (kind, name), entry in checkpoint.manifest.tensors.items():
        if kind == "random" and name.startswith(prefix):
            values = np.empty(entry.shape[0], dtype=np.uint8)
            checkpoint.read(random_slice(rank, name.removeprefix(prefix), values.size), values)
            yield name.removeprefix(prefix), torch.from_numpy(values)


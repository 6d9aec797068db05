"""Resumable checkpoints of one layout: a folder per step, a safetensors file per rank, one JSON state.

    step_00000100/rank_00000.safetensors   parameters by global name, optimizer state, balance biases, random states
    step_00000100/state.json               step, samples, layout, loss scale

A save is written under another name and renamed whole, then `latest` is replaced: a crash at any moment leaves the
previous checkpoint in force. Nothing is pickled. The ranks that load must be folded as those that saved.
"""

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megamoe.errors import CheckpointError
from megamoe.model.random import random_state, restore_random_state
from megamoe.training.checkpoint_state import (
    FORMAT,
    STATE_FILE,
    changed_settings,
    check_same_layout,
    check_same_model,
    read_state,
)
from megamoe.training.run_folder import LATEST, checkpoint_name, checkpoints_path, step_of, write_atomically

if TYPE_CHECKING:
    from megamoe.training.build import Trainer

_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_PARAMETER, _TIED, _OPTIMIZER, _RANDOM = "parameter/", "tied_copy/", "optimizer/", "random/"
_BALANCE_BIAS = "balance_bias/"


def save_checkpoint(trainer: "Trainer", run_dir: str | os.PathLike[str]) -> Path:
    """Write the trainer's state as the newest checkpoint of the run. Collective over all ranks."""
    root = checkpoints_path(run_dir)
    final = root / checkpoint_name(trainer.step)
    partial = root / f".{final.name}.partial"
    is_first = dist.get_rank() == 0
    if is_first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    _save_synced(_tensors(trainer), partial / _rank_file(dist.get_rank()))
    dist.barrier()
    if is_first:
        write_atomically(partial / STATE_FILE, json.dumps(_state(trainer), indent=2) + "\n")
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        _sync_folder(root)
        write_atomically(root / LATEST, final.name + "\n")
        _remove_old(root, trainer.config.checkpoint.keep_last, trainer.step)
    dist.barrier()
    return final


def load_checkpoint(trainer: "Trainer", folder: Path) -> list[str]:
    """Restore the trainer, in place, from a checkpoint of the same layout. Collective over all ranks.

    Returns the settings that differ from the checkpoint's and may, in words.
    Raises CheckpointError for another model or layout, a missing or damaged file, or tensors of other shapes.
    """
    state = read_state(folder)
    check_same_model(state, trainer.config, folder)
    check_same_layout(state, trainer.config, dist.get_world_size(), folder)
    path = folder / _rank_file(dist.get_rank())
    try:
        stored = load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {folder} is incomplete, remove it to go on without it") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): the checkpoint is damaged") from None
    current = _tensors(trainer)
    strangers = sorted(current.keys() ^ stored.keys())
    if strangers:
        raise CheckpointError(f"{path} does not match the model: {strangers[0]} is only in one of them")
    with torch.no_grad():
        for name, tensor in current.items():
            if name.startswith(_RANDOM):
                continue
            if tensor.shape != stored[name].shape:
                raise CheckpointError(
                    f"{path}: {name} has shape {tuple(stored[name].shape)}, the model's is {tuple(tensor.shape)}"
                )
            tensor.copy_(stored[name])
    restore_random_state({n.removeprefix(_RANDOM): t for n, t in stored.items() if n.startswith(_RANDOM)})
    trainer.step, trainer.samples, trainer.skipped_steps = state["step"], state["samples"], state["skipped_steps"]
    if state["loss_scaler"] is not None:
        # What the scaler has reached; how it moves on is the configuration's.
        vars(trainer.engine.optimizer.loss_scaler).update(state["loss_scaler"])
    for group, num_steps in zip(trainer.engine.basic_optimizer.param_groups, state["group_steps"], strict=True):
        if num_steps is not None:
            group["step"] = num_steps
    return changed_settings(state, trainer.config)


def _rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def _state(trainer: "Trainer") -> dict[str, Any]:
    scaler = getattr(trainer.engine.optimizer, "loss_scaler", None)
    return {
        "format": FORMAT,
        "step": trainer.step,
        "samples": trainer.samples,
        "skipped_steps": trainer.skipped_steps,
        "num_ranks": dist.get_world_size(),
        "config": trainer.config.model_dump(mode="json"),
        # NVIDIA apex counts steps by group, torch by parameter among its state tensors.
        "group_steps": [group.get("step") for group in trainer.engine.basic_optimizer.param_groups],
        "loss_scaler": scaler and {name: vars(scaler)[name] for name in _SCALER_STATE if name in vars(scaler)},
    }


def _tensors(trainer: "Trainer") -> dict[str, Tensor]:
    """Everything a rank's file holds, by name."""
    tensors = {}
    for local in trainer.parameters:
        prefix = _TIED if local.tied_copy else _PARAMETER
        tensors[prefix + local.parameter.name] = local.view
    tensors |= {_OPTIMIZER + name: t for name, t in optimizer_tensors(trainer).items()}
    tensors |= {f"{_BALANCE_BIAS}layers.{layer}": bias for layer, bias in trainer.balance_bias.by_layer.items()}
    tensors |= {_RANDOM + name: t for name, t in random_state().items()}
    return tensors


def optimizer_tensors(trainer: "Trainer") -> dict[str, Tensor]:
    """fp32 master partitions (ZeRO 1, 2) and every tensor of the optimizer's state, by group and position.

    State that the first step would make is made here: a run saved or loaded before that step has the same names.
    """
    engine = trainer.engine
    basic = engine.basic_optimizer
    tensors = {}
    for index, group in enumerate(basic.param_groups):
        for position, parameter in enumerate(group["params"]):
            if engine.zero_stage > 0:
                tensors[f"{index}.{position}.master"] = parameter.detach()
            _create_state(basic, group, parameter)
            for name, value in basic.state[parameter].items():
                if torch.is_tensor(value):
                    tensors[f"{index}.{position}.{name}"] = value
    return tensors


def _create_state(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor) -> None:
    """Give a fresh optimizer the state tensors that its first step would make."""
    state = optimizer.state[parameter]
    if state:
        return
    if isinstance(optimizer, torch.optim.SGD):
        if group["momentum"] > 0.0:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return
    if isinstance(optimizer, torch.optim.AdamW):
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if group.get("fused") else "cpu")
    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)


def _save_synced(tensors: dict[str, Tensor], path: Path) -> None:
    # Views of one flat buffer share storage, which safetensors refuses; what comes from a GPU is a copy already.
    save_file({name: _on_host(tensor) for name, tensor in tensors.items()}, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _on_host(tensor: Tensor) -> Tensor:
    detached = tensor.detach()
    return detached.contiguous().cpu() if detached.is_cuda else detached.clone(memory_format=torch.contiguous_format)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_old(root: Path, keep_last: int, newest_step: int) -> None:
    """Keep the last checkpoints up to the one in force. Later ones are of a run that was taken back: not counted."""
    steps = sorted(step for p in root.iterdir() if (step := step_of(p.name)) is not None and step <= newest_step)
    for old in steps[:-keep_last]:
        shutil.rmtree(root / checkpoint_name(old))
    for half_written in root.glob(".*.partial"):
        shutil.rmtree(half_written, ignore_errors=True)

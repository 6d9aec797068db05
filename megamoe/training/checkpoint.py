"""Resumable checkpoints of one layout: a folder per step, a safetensors file per rank, one JSON state.

    step_00000100/rank_00000.safetensors   the rank's parameters by global name, optimizer state, random states
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

from megamoe.config.schema import Config
from megamoe.errors import CheckpointError
from megamoe.model.random import random_state, restore_random_state
from megamoe.training.run_folder import LATEST, checkpoint_name, checkpoints_path, step_of, write_atomically

if TYPE_CHECKING:
    from megamoe.training.build import Trainer

FORMAT = "megamoe-rank-files-1"
STATE_FILE = "state.json"
_STATE_KEYS = ("layout", "step", "samples", "skipped_steps", "loss_scaler", "group_steps")
_PARAMETER, _TIED, _OPTIMIZER, _RANDOM = "parameter/", "tied_copy/", "optimizer/", "random/"


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


def load_checkpoint(trainer: "Trainer", folder: Path) -> None:
    """Restore the trainer, in place, from a checkpoint of the same layout. Collective over all ranks.

    Raises CheckpointError for another layout, a missing or damaged file, or tensors that do not match the model.
    """
    state = read_state(folder)
    _check_layout(state, trainer.config, folder)
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
        vars(trainer.engine.optimizer.loss_scaler).update(state["loss_scaler"])
    for group, num_steps in zip(trainer.engine.basic_optimizer.param_groups, state["group_steps"], strict=True):
        if num_steps is not None:
            group["step"] = num_steps


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint. Raises CheckpointError when it is missing or no state of ours."""
    path = folder / STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {folder} is no complete checkpoint") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f'{path} is not of format "{FORMAT}"')
    for key in _STATE_KEYS:
        if key not in state:
            raise CheckpointError(f'{path} is damaged: it has no "{key}"')
    return state


def _rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def _layout(config: Config) -> dict[str, Any]:
    names = (
        "tensor_parallel_size", "pipeline_parallel_size", "virtual_pipeline_parallel_size", "expert_parallel_size",
        "expert_tensor_parallel_size", "zero_stage",
    )  # fmt: skip
    layout = {f"parallel.{name}": getattr(config.parallel, name) for name in names}
    return layout | {"ranks": dist.get_world_size(), "run.precision": config.run.precision,
                     "optimizer.name": config.optimizer.name}  # fmt: skip


def _check_layout(state: dict[str, Any], config: Config, folder: Path) -> None:
    here = _layout(config)
    there = state["layout"]
    changed = [f"{key} {there.get(key)} there, {here[key]} here" for key in here if there.get(key) != here[key]]
    if changed:
        raise CheckpointError(
            f"{folder} was written by another layout ({'; '.join(changed)}): resume with that layout, "
            "or choose another run.dir"
        )


def _state(trainer: "Trainer") -> dict[str, Any]:
    scaler = getattr(trainer.engine.optimizer, "loss_scaler", None)
    return {
        "format": FORMAT,
        "step": trainer.step,
        "samples": trainer.samples,
        "skipped_steps": trainer.skipped_steps,
        "layout": _layout(trainer.config),
        # NVIDIA apex counts steps by group, torch by parameter among its state tensors.
        "group_steps": [group.get("step") for group in trainer.engine.basic_optimizer.param_groups],
        "loss_scaler": scaler and {k: v for k, v in vars(scaler).items() if isinstance(v, int | float)},
    }


def _tensors(trainer: "Trainer") -> dict[str, Tensor]:
    """Everything a rank's file holds, by name."""
    tensors = {}
    for local in trainer.parameters:
        prefix = _TIED if local.tied_copy else _PARAMETER
        tensors[prefix + local.parameter.name] = local.view
    tensors |= {_OPTIMIZER + name: t for name, t in optimizer_tensors(trainer).items()}
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
    save_file({name: tensor.detach().contiguous().cpu().clone() for name, tensor in tensors.items()}, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


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

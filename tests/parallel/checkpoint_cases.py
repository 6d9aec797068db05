"""Layouts that checkpoints move between, and the whole state of a trainer put together by other means than ours.

The reference for masters and moments under ZeRO is DeepSpeed's own mapping of its partitions (`tensor_fragment`).
"""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist
from deepspeed.utils.tensor_fragment import safe_get_full_fp32_param, safe_get_full_optimizer_state

from megamoe.config.schema import Config
from megamoe.training.build import Trainer
from megamoe.training.optimizer_state import create_state
from tests.parallel.worlds import config, parallel

THOROUGH = os.environ.get("MEGAMOE_THOROUGH", "") not in ("", "0")  # every pair, longer chains, more kill points

State = dict[tuple[str, str], np.ndarray]  # (kind, global name) -> the whole tensor


@dataclass(frozen=True)
class Case:
    """A layout: how many ranks, and what is set."""

    name: str
    world: int
    settings: tuple[str, ...]

    def config(self, model: str, *more: str) -> Config:
        return config(model, ("run.global_batch_size=16", *self.settings, *more))


def _case(world: int, **sizes: Any) -> Case:
    return Case(f"w{world}-" + "-".join(f"{k}{v}" for k, v in sizes.items()), world, parallel(**sizes))


# Every factor at both ends: dense and expert foldings, interleaving, tied copies, replicas of experts, ZeRO stages.
CASES = (
    _case(1, zero=0),
    _case(1, zero=1),
    _case(2, tp=2, etp=2, zero=1),
    _case(2, ep=2, zero=2),
    _case(2, pp=2, zero=0),
    _case(4, tp=2, ep=2, sp=True, zero=1),
    _case(4, pp=2, vp=2, ep=2, zero=1),
    _case(4, ep=2, zero=0),
    _case(4, tp=2, pp=2, etp=2, zero=0),
    _case(4, ep=4, zero=2),
    _case(8, tp=2, pp=2, ep=2, sp=True, zero=1),
    _case(8, tp=2, etp=2, ep=2, zero=2),
    _case(8, pp=4, zero=1),
    _case(8, ep=4, zero=1),
)
MODELS = ("paper_all", "bias")  # tied embeddings, norms with biases; untied, gated, balance biases


def by_world(cases: tuple[Case, ...] = CASES) -> dict[int, list[Case]]:
    return {world: [case for case in cases if case.world == world] for world in sorted({c.world for c in cases})}


def local_state(trainer: Trainer) -> list[tuple[str, str, tuple[slice, ...], np.ndarray]]:
    """(kind, name, slices, values) of this rank's parts, whole. Collective under ZeRO."""
    create_state(trainer.engine.basic_optimizer)
    zero, found = trainer.engine.zero_stage > 0, []
    if zero:
        trainer.engine.optimizer._hp_optimizer_states_linked = False  # linked when there was no state yet
        trainer.engine.optimizer._lazy_init_hp_params_optimizer_state()
    for local in trainer.parameters:
        values = {"weight": local.view}
        if zero:
            values["master"] = safe_get_full_fp32_param(local.tensor)
            for key in ("exp_avg", "exp_avg_sq"):
                values[key] = safe_get_full_optimizer_state(local.tensor, key)
        else:
            state = trainer.engine.basic_optimizer.state[local.tensor]
            values |= {key: state[key] for key in ("exp_avg", "exp_avg_sq")}
        for kind, value in values.items():
            whole = value.detach().float().reshape(local.shape).numpy().copy()
            found.append((kind, local.parameter.name, local.slices, whole))
    for layer, bias in trainer.balance_bias.by_layer.items():
        found.append(("balance_bias", f"layers.{layer}.router", (slice(0, bias.numel()),), bias.numpy().copy()))
    return found


def whole_state(trainer: Trainer) -> State | None:
    """Everything put together on rank 0, None elsewhere; copies on several ranks must be equal. Collective."""
    everyone = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(local_state(trainer), everyone)
    if everyone is None:
        return None
    stop: dict[tuple[str, str], tuple[int, ...]] = {}
    for kind, name, slices, _ in (part for parts in everyone for part in parts):
        ends = tuple(cut.stop for cut in slices)
        stop[kind, name] = tuple(map(max, ends, stop.get((kind, name), ends)))
    state = {key: np.full(shape, np.nan, dtype=np.float32) for key, shape in stop.items()}
    for kind, name, slices, values in (part for parts in everyone for part in parts):
        there = state[kind, name][slices]
        seen = ~np.isnan(there)
        assert np.array_equal(there[seen], values[seen]), f"copies of {kind} {name} differ"
        state[kind, name][slices] = values
    for (kind, name), values in state.items():
        assert not np.isnan(values).any(), f"no rank holds all of {kind} {name}"
    return state


def comparable(state: State, *, precision: str = "fp32") -> State:
    """What every layout of a precision has: in fp32 ZeRO's masters are the weights, and stage 0 has none."""
    if precision != "fp32":
        return state
    for (kind, name), values in state.items():
        if kind == "master":
            assert np.array_equal(values, state["weight", name]), name
    return {key: values for key, values in state.items() if key[0] != "master"}


def store(state: State, path: str) -> None:
    np.savez(path, **{f"{kind}|{name}": values for (kind, name), values in state.items()})


def stored(path: str) -> State:
    with np.load(path) as file:
        return {tuple(key.split("|")): file[key] for key in file.files}


def differences(actual: State, expected: State) -> list[str]:
    """Names of tensors that are not equal to the bit (experts one by one), or are only in one of the two."""
    found = [f"{key} only on one side" for key in sorted(actual.keys() ^ expected.keys())]
    for key in sorted(actual.keys() & expected.keys()):
        mine, other = (each[key].view(np.int32) for each in (actual, expected))
        if mine.shape != other.shape:
            found.append(f"{key} has shapes {mine.shape} and {other.shape}")
        elif ".experts." in key[1]:
            experts = [e for e in range(len(mine)) if not np.array_equal(mine[e], other[e])]
            found += [f"{key} expert {e}" for e in experts]
        elif not np.array_equal(mine, other):
            found.append(str(key))
    return found


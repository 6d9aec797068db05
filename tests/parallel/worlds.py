"""What the tests of this folder share: configurations, trainers in worlds of their own, and what is read off them.

The rank side of a test file is one function that goes through several scenarios; each builds a trainer in a fresh
world, since the threads of process groups that nobody destroys pile up until nothing moves.
"""

import gc
import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megamoe.config.schema import Config
from megamoe.launch.environment import rank_environment
from megamoe.training.build import Trainer, build_trainer
from megamoe.training.distributed import initialize_distributed
from megamoe.training.optimizer_state import create_state
from megamoe.training.report import LossMeter
from tests.parity.layouts import ParityLayout
from tests.parity.ranks import share

LAUNCH_TIMEOUT_SECONDS = 150

_world_number = itertools.count()

def config(model: str, layout: Sequence[str] = (), *, optimizer: str = "adamw") -> Config:
    """A configuration of the parity grid's `model` under further "section.key=value" settings."""
    return ParityLayout("", 0, model, tuple(layout)).config(optimizer)


def parallel(**sizes: Any) -> tuple[str, ...]:
    """Short names to settings: parallel(tp=2, pp=2, vp=2, ep=2, sp=True, zero=1)."""
    names = {
        "tp": "tensor_parallel_size",
        "pp": "pipeline_parallel_size",
        "vp": "virtual_pipeline_parallel_size",
        "ep": "expert_parallel_size",
        "etp": "expert_tensor_parallel_size",
        "sp": "sequence_parallel",
        "zero": "zero_stage",
        "recompute": "recompute",
    }
    return tuple(f"parallel.{names[key]}={str(value).lower()}" for key, value in sizes.items())


def let_threads_finish(most_seconds: float = 5.0) -> None:
    """Wait until every other thread of this process sleeps: on a busy machine one may long be ready to run, and gloo's
    hold the tensors of their last collective."""
    give_up = time.monotonic() + most_seconds
    while time.monotonic() < give_up:
        time.sleep(0.005)
        states = []
        for task in Path("/proc/self/task").iterdir():
            if int(task.name) != threading.get_native_id():
                with suppress(OSError):  # it has ended
                    states.append((task / "stat").read_text().rpartition(")")[2].split()[0])
        if "R" not in states:
            return


@contextmanager
def world(settings: Config) -> Iterator[torch.device]:
    """Join a new world of all ranks of this launch (started with init=False); leave it at the end."""
    environment = rank_environment()
    rendezvous = f"{environment.init_method}.{next(_world_number)}"
    yield initialize_distributed(replace(environment, init_method=rendezvous), settings.parallel.timeout_seconds)
    gc.collect()  # engines are full of cycles, and hold the groups
    dist.destroy_process_group()


@contextmanager
def trainer_of(settings: Config) -> Iterator[Trainer]:
    """A trainer in a world of its own. An error leaves all standing: peers shall not break before it is heard."""
    with world(settings) as device:
        trainer = build_trainer(settings, device)
        yield trainer
        dist.barrier()  # a rank that leaves early would break the connections of the others
        trainer.close()
        del trainer


def samples(settings: Config, num_steps: int, *, seed: int = 7) -> np.ndarray:
    """Token ids int64 [num_steps, global batch, seq_length + 1]."""
    shape = (num_steps, settings.run.global_batch_size, settings.model.seq_length + 1)
    return np.random.default_rng(seed).integers(0, settings.model.vocab_size, shape)


def step(trainer: Trainer, batch: np.ndarray) -> dict[str, Any]:
    """One training step: its loss over all ranks, its norm, whether it was applied. The same on every rank."""
    result = trainer.train_step(share(trainer, batch), len(batch))
    return {
        "lm_loss": mean_loss(trainer, result.lm_losses),
        "grad_norm": result.grad_norm,
        "was_applied": result.was_applied,
    }


def mean_loss(trainer: Trainer, lm_losses: torch.Tensor | None) -> float:
    meter = LossMeter()
    meter.add(lm_losses)
    return meter.mean(trainer.groups)


def steps(trainer: Trainer, batches: np.ndarray) -> list[dict[str, Any]]:
    return [step(trainer, batch) for batch in batches]


def column(rows: Sequence[dict[str, Any]], key: str) -> list[Any]:
    return [row[key] for row in rows]


def weights(trainer: Trainer) -> dict[str, np.ndarray]:
    """This rank's slices by global name, bit for bit (bf16 and fp16 widen exactly)."""
    return {
        local.parameter.name + ("/tied" if local.tied_copy else ""): local.view.float().numpy().copy()
        for local in trainer.parameters
    }


def optimizer_state(trainer: Trainer) -> dict[str, np.ndarray]:
    """This rank's optimizer tensors as the optimizer holds them: moments, steps, fp32 masters, padding too."""
    basic, found = trainer.engine.basic_optimizer, {}
    create_state(basic)
    for index, group in enumerate(basic.param_groups):
        for position, parameter in enumerate(group["params"]):
            if trainer.engine.zero_stage > 0:
                found[f"{index}.{position}.master"] = parameter.detach()
            state = basic.state[parameter]
            found |= {f"{index}.{position}.{name}": value for name, value in state.items() if torch.is_tensor(value)}
    return {name: value.cpu().numpy().copy() for name, value in found.items()}


def assert_same_arrays(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Equal names, dtypes and bits."""
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        assert actual[name].dtype == values.dtype, name
        np.testing.assert_array_equal(actual[name], values, err_msg=name)

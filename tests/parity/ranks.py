"""One rank's side of the parity tests: train layouts one after another, hand back all that can be compared."""

import gc
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist

from megamoe.config.schema import Config
from megamoe.data.batches import MicroBatch
from megamoe.launch.environment import rank_environment
from megamoe.training.build import Trainer, build_trainer
from megamoe.training.distributed import initialize_distributed
from megamoe.training.report import LossMeter, load_report
from megamoe.training.step import Batch


@dataclass(frozen=True)
class Piece:
    """A slice of a global tensor as one rank holds it."""

    name: str
    slices: tuple[slice, ...]
    values: np.ndarray


@dataclass(frozen=True)
class RankOutcome:
    """What one rank saw of one layout; losses and norms are the same on all ranks."""

    lm_losses: list[float]
    balance_losses: list[float]
    grad_norms: list[float]
    dropped_fractions: list[float]
    applied: list[bool]
    biases: list[dict[int, list[float]]]  # by step: layer -> bias of each expert, of this rank's layers
    initial: list[Piece]
    final: list[Piece]


def train_layouts(configs: list[Config], samples: list[np.ndarray]) -> list[RankOutcome]:
    """Train each configuration on its samples [steps, global batch, seq_length + 1], in one set of processes.

    Call it with `init=False`: every layout gets a world of its own, since the threads of process groups that nobody
    destroys pile up until nothing moves.
    """
    outcomes, environment = [], rank_environment()
    for number, (config, batches) in enumerate(zip(configs, samples, strict=True)):
        rendezvous = f"{environment.init_method}.{number}"
        initialize_distributed(replace(environment, init_method=rendezvous), config.parallel.timeout_seconds)
        outcomes.append(train_layout(config, batches))
        gc.collect()  # engines are full of cycles, and hold the groups
        dist.destroy_process_group()
    return outcomes


def train_layout(config: Config, batches: np.ndarray) -> RankOutcome:
    trainer = build_trainer(config, torch.device("cpu"))
    initial, steps = pieces(trainer), []
    for batch in batches:
        result = trainer.train_step(share(trainer, batch), len(batch))
        meter = LossMeter()
        meter.add(result.lm_losses)
        load = load_report(trainer)
        steps.append(
            (
                meter.mean(trainer.groups),
                load.balance_loss if load else 0.0,
                result.grad_norm,
                load.dropped_fraction if load else 0.0,
                result.was_applied,
                {layer: bias.tolist() for layer, bias in trainer.balance_bias.by_layer.items()},
            )
        )
    final = pieces(trainer)
    dist.barrier()  # a rank that leaves early would break the connections of the others
    trainer.close()
    lm, balance, norms, dropped, applied, biases = (list(column) for column in zip(*steps, strict=True))
    return RankOutcome(lm, balance, norms, dropped, applied, biases, initial, final)


def share(trainer: Trainer, batch: np.ndarray) -> Batch:
    """This rank's micro-batches of a global batch [G, s + 1], dealt as Megatron's sampler does."""
    size, grid = trainer.config.run.micro_batch_size, trainer.groups.grid
    mine = batch.reshape(-1, grid.data, size, batch.shape[1])[:, trainer.groups.coordinates.data]
    return Batch((MicroBatch(rows[:, :-1], rows[:, 1:]) for rows in mine), len(mine))


def pieces(trainer: Trainer) -> list[Piece]:
    return [
        Piece(local.parameter.name, local.slices, local.view.float().numpy().copy()) for local in trainer.parameters
    ]

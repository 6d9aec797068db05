"""One training step and one evaluation pass: micro-batches through Megatron-core's schedule, then the update."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any

import numpy as np
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func, schedules
from torch import Tensor

from megamoe.data.batches import MicroBatch
from megamoe.model.gpt import GPT
from megamoe.model.parallel import ParallelGroups
from megamoe.moe.losses import LossScale
from megamoe.phases import phase
from megamoe.training.engine import ScheduleEngine


@dataclass(frozen=True)
class Batch:
    """This rank's share of a global batch: `micro_batches` is walked once, in order."""

    micro_batches: Iterator[MicroBatch]
    num_micro_batches: int


_OnDevice = tuple[Tensor, Tensor, Tensor | None]  # tokens, labels, weights of the losses: [b, s]


@dataclass
class Schedule:
    """Runs micro-batches through the pipeline. Losses appear on the last stage, None elsewhere."""

    chunks: Sequence[GPT]
    groups: ParallelGroups
    seq_length: int
    micro_batch_size: int
    device: torch.device

    def __post_init__(self) -> None:
        grid = self.groups.grid
        self._run = get_forward_backward_func(grid.pipeline, len(self.chunks) if len(self.chunks) > 1 else None)

    def losses(self, batch: Batch, *, engine: ScheduleEngine | None) -> Tensor | None:
        """Language losses (mean nats a token, or weighted sums): with `engine` [num_micro_batches], and gradients
        accumulate; without it [num_micro_batches, b], of each sequence, and the pass is forward only."""
        results = self._call(batch, partial(_loss_step, engine=engine), forward_only=engine is None)
        return torch.stack(results) if results else None

    def logits(self, batch: Batch) -> list[Tensor] | None:
        """This tensor rank's vocabulary slice of the logits, [b, s, V/t] a micro-batch, forward only."""
        return self._call(batch, _logits_step, forward_only=True) or None

    def _call(self, batch: Batch, step_function: Any, *, forward_only: bool) -> list[Tensor]:
        with phase("pipeline"), _backward_timed():
            return self._run(
                forward_step_func=step_function,
                data_iterator=self._iterators(batch),
                model=list(self.chunks),
                num_microbatches=batch.num_micro_batches,
                seq_length=self.seq_length,
                micro_batch_size=self.micro_batch_size,
                forward_only=forward_only,
            )

    def _iterators(self, batch: Batch) -> list[Iterator[Any]]:
        """One per chunk. Only the first and the last chunk of the model look at tokens: the others read no data."""
        ends = {id(chunk): batch.micro_batches for chunk in self.chunks if chunk.pre_process or chunk.post_process}
        return [self._to_device(ends.get(id(chunk), repeat(None))) for chunk in self.chunks]

    def _to_device(self, micro_batches: Iterator[MicroBatch | None]) -> Iterator[_OnDevice | None]:
        for each in micro_batches:
            if each is None:
                yield None
                continue
            arrays = (each.tokens, each.labels, each.weights)
            tokens, labels, weights = (None if a is None else self._tensor_of(a) for a in arrays)
            yield tokens, labels, weights

    def _tensor_of(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)


@contextmanager
def _backward_timed() -> Iterator[None]:
    """All of Megatron-core's schedules call a micro-batch's backward pass by its name in their module."""
    usual = schedules.backward_step
    schedules.backward_step = phase("backward")(usual)
    try:
        yield
    finally:
        schedules.backward_step = usual


def _forward(data: Iterator[Any], model: GPT, *, with_labels: bool) -> tuple[Tensor, Tensor | None]:
    """The chunk's output, and the weights of losses [b, s], where they have some."""
    with phase("data"):
        arrays = next(data)
    tokens, labels, weights = arrays if arrays is not None else (None, None, None)
    with phase("forward"):
        return model(tokens, None, None, labels=labels if with_labels and model.post_process else None), weights


def _loss_step(data: Iterator[Any], model: GPT, *, engine: ScheduleEngine | None) -> tuple[Tensor, Any]:
    output, weights = _forward(data, model, with_labels=True)
    if engine is not None:
        engine.announce_backward(output)
    return output, partial(_mean_loss if engine is not None else _sequence_losses, weights=weights)


@phase("forward")
def _mean_loss(losses: Tensor, *, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """losses [b, s] -> (what is differentiated, what is reported)."""
    mean = losses.float().mean() if weights is None else _weighted(losses, weights).sum()
    return mean, mean.detach().clone()


@phase("forward")
def _sequence_losses(losses: Tensor, *, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """losses [b, s] -> (what nobody differentiates, what is reported)."""
    by_sequence = losses.float().mean(dim=1) if weights is None else _weighted(losses, weights).sum(dim=1)
    return by_sequence.mean(), by_sequence


def _weighted(losses: Tensor, weights: Tensor) -> Tensor:
    """What does not count is left out whatever it is: on padding it may be no number in 16 bits."""
    return losses.float().masked_fill(weights == 0, 0.0) * weights


def _logits_step(data: Iterator[Any], model: GPT) -> tuple[Tensor, Any]:
    return _forward(data, model, with_labels=False)[0], lambda logits: (logits.sum() * 0.0, logits)


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind. `lm_losses` is None but on the last stage."""

    lm_losses: Tensor | None  # [num_micro_batches] of this rank
    grad_norm: float
    was_applied: bool


def train_step(
    schedule: Schedule, engine: ScheduleEngine, aux_loss_scale: LossScale, batch: Batch, learning_rate: float
) -> StepResult:
    """Forward and backward over the rank's micro-batches, then one update. Collective over all ranks."""
    loss_scale = engine.current_loss_scale
    aux_loss_scale.value = loss_scale / batch.num_micro_batches
    schedule.chunks[0].config.grad_scale_func = (lambda loss: loss * loss_scale) if loss_scale != 1.0 else None
    lm_losses = schedule.losses(batch, engine=engine)
    engine.finalizer.lm_losses = lm_losses
    was_applied = engine.apply_gradients(learning_rate)
    engine.finalizer.lm_losses = None
    return StepResult(lm_losses, engine.finalizer.norm, was_applied)

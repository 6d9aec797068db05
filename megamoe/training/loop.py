"""The training loop. What it does besides training is in hooks."""

from collections.abc import Sequence
from typing import Protocol

from megamoe.data.batches import BatchPlan, RowSource, SampleSource, micro_batches
from megamoe.training.batch_size import global_batch_size
from megamoe.training.build import Trainer
from megamoe.training.step import Batch, StepResult


class RolledBack(Exception):
    """Raised by a hook, on all ranks, that has taken the trainer back to an earlier step: this one never was."""


class Hook(Protocol):
    """Something that happens around steps. Every rank runs every hook, in order; collectives are allowed."""

    def on_start(self, trainer: Trainer) -> None: ...

    def after_step(self, trainer: Trainer, result: StepResult) -> None: ...

    def on_roll_back(self, trainer: Trainer) -> None: ...

    def on_end(self, trainer: Trainer) -> None: ...


def local_batch(trainer: Trainer, dataset: SampleSource | RowSource, consumed_samples: int, batch_size: int) -> Batch:
    """This rank's share of the global batch that begins at `consumed_samples`."""
    grid, micro_batch_size = trainer.groups.grid, trainer.config.run.micro_batch_size
    return Batch(
        micro_batches(
            dataset,
            consumed_samples=consumed_samples,
            global_batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            data_parallel_rank=trainer.groups.coordinates.data,
            data_parallel_size=grid.data,
        ),
        BatchPlan(micro_batch_size, grid.data).num_micro_batches(batch_size),
    )


def train(trainer: Trainer, dataset: SampleSource | RowSource, hooks: Sequence[Hook]) -> None:
    """Train until run.num_steps, or until validations want no more of it, from wherever the trainer stands."""
    for hook in hooks:
        hook.on_start(trainer)
    while trainer.step < trainer.config.run.num_steps and not trainer.has_stopped_early:
        batch_size = global_batch_size(trainer.config.run, trainer.samples)
        batch = local_batch(trainer, dataset, trainer.samples, batch_size)
        result = trainer.train_step(batch, batch_size)
        try:
            for hook in hooks:
                hook.after_step(trainer, result)
        except RolledBack:
            for hook in hooks:
                hook.on_roll_back(trainer)
    for hook in hooks:
        hook.on_end(trainer)

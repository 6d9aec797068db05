"""Global batches cut into micro-batches: which samples each data-parallel rank works on, and in which order.

A global batch is the samples [consumed, consumed + global_batch_size) whatever the layout. Micro-batch m of data
rank r holds the samples consumed + (m * data_parallel_size + r) * micro_batch_size + [0, micro_batch_size), as
Megatron's sampler deals them, so resuming needs one number: the samples consumed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from megamoe.errors import ConfigError


@dataclass(frozen=True)
class Row:
    """One sample: int64 [seq_length] twice, and bool [seq_length]: where the loss counts."""

    tokens: np.ndarray
    labels: np.ndarray
    mask: np.ndarray


class SampleSource(Protocol):
    """What batches are cut from: see `megamoe.data.datasets`."""

    num_samples: int

    def sample(self, index: int) -> np.ndarray:
        """int64 [seq_length + 1] for any index >= 0."""
        ...


@runtime_checkable
class RowSource(Protocol):
    """Samples that say where their losses count: see `megamoe.data.examples`."""

    num_samples: int

    def row(self, index: int) -> Row:
        """Any index >= 0."""
        ...

    def num_loss_tokens(self, indices: range) -> int:
        """How many losses of these samples count."""
        ...


@dataclass(frozen=True)
class MicroBatch:
    """Inputs and the tokens that follow them: both int64 [micro_batch_size, seq_length].

    weights: float32 of the same shape, of the losses: their weighted sum is the micro-batch's loss; None: their mean
    is.
    """

    tokens: np.ndarray
    labels: np.ndarray
    weights: np.ndarray | None = None


@dataclass(frozen=True)
class BatchPlan:
    """How global batches are dealt to the data-parallel ranks."""

    micro_batch_size: int
    data_parallel_size: int

    def num_micro_batches(self, global_batch_size: int) -> int:
        """Micro-batches of one rank in one global batch.

        Raises:
            ConfigError: the global batch is no multiple of micro_batch_size * data_parallel_size.
        """
        samples_at_once = self.micro_batch_size * self.data_parallel_size
        count, left_over = divmod(global_batch_size, samples_at_once)
        if count == 0 or left_over:
            lower, upper = count * samples_at_once, (count + 1) * samples_at_once
            valid = f"{lower} or {upper}" if count else f"{upper}"
            raise ConfigError(
                f"global_batch_size {global_batch_size} is no multiple of micro_batch_size {self.micro_batch_size} x "
                f"data parallel size {self.data_parallel_size}: use {valid}"
            )
        return count

    def sample_indices(self, consumed_samples: int, micro_batch: int, data_parallel_rank: int) -> range:
        """Samples of one micro-batch of one rank, in order."""
        position = micro_batch * self.data_parallel_size + data_parallel_rank
        start = consumed_samples + position * self.micro_batch_size
        return range(start, start + self.micro_batch_size)


def micro_batches(
    dataset: SampleSource | RowSource,
    *,
    consumed_samples: int,
    global_batch_size: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
) -> Iterator[MicroBatch]:
    """The micro-batches of one rank in the global batch that starts at sample `consumed_samples`.

    Of rows the weights are such that the mean of the losses of all micro-batches of all ranks is that of the losses
    that count in the global batch, however many of them each micro-batch has.

    Yields:
        global_batch_size / (micro_batch_size * data_parallel_size) micro-batches, read one at a time.

    Raises:
        ConfigError: the sizes do not divide (before anything is read).
        DataError: a sample is damaged.
    """
    plan = BatchPlan(micro_batch_size, data_parallel_size)
    count = plan.num_micro_batches(global_batch_size)
    indices = (plan.sample_indices(consumed_samples, number, data_parallel_rank) for number in range(count))
    if isinstance(dataset, RowSource):
        num_losses = dataset.num_loss_tokens(range(consumed_samples, consumed_samples + global_batch_size))
        weight = count * data_parallel_size / num_losses
        return (_read_rows(dataset, span, weight) for span in indices)
    return (_read(dataset, span) for span in indices)


def _read(dataset: SampleSource, indices: range) -> MicroBatch:
    blocks = np.stack([dataset.sample(index) for index in indices])
    return MicroBatch(np.ascontiguousarray(blocks[:, :-1]), np.ascontiguousarray(blocks[:, 1:]))


def _read_rows(dataset: RowSource, indices: range, weight: float) -> MicroBatch:
    rows = [dataset.row(index) for index in indices]
    tokens, labels, mask = (np.stack([getattr(row, part) for row in rows]) for part in ("tokens", "labels", "mask"))
    return MicroBatch(tokens, labels, mask.astype(np.float32) * np.float32(weight))

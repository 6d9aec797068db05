"""Global batches cut into micro-batches: which samples each data-parallel rank works on, and in which order.

A global batch is the samples [consumed, consumed + global_batch_size) whatever the layout. Micro-batch m of data
rank r holds the samples consumed + (m * data_parallel_size + r) * micro_batch_size + [0, micro_batch_size), as
Megatron's sampler deals them, so resuming needs one number: the samples consumed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megamoe.errors import ConfigError


class SampleSource(Protocol):
    """What batches are cut from: see `megamoe.data.datasets`."""

    num_samples: int

    def sample(self, index: int) -> np.ndarray:
        """int64 [seq_length + 1] for any index >= 0."""
        ...


@dataclass(frozen=True)
class MicroBatch:
    """Inputs and the tokens that follow them: both int64 [micro_batch_size, seq_length]."""

    tokens: np.ndarray
    labels: np.ndarray


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
    dataset: SampleSource,
    *,
    consumed_samples: int,
    global_batch_size: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
) -> Iterator[MicroBatch]:
    """The micro-batches of one rank in the global batch that starts at sample `consumed_samples`.

    Yields:
        global_batch_size / (micro_batch_size * data_parallel_size) micro-batches, read one at a time.

    Raises:
        ConfigError: the sizes do not divide (before anything is read).
        DataError: a sample is damaged.
    """
    plan = BatchPlan(micro_batch_size, data_parallel_size)
    count = plan.num_micro_batches(global_batch_size)
    indices = (plan.sample_indices(consumed_samples, number, data_parallel_rank) for number in range(count))
    return (_read(dataset, span) for span in indices)


def _read(dataset: SampleSource, indices: range) -> MicroBatch:
    blocks = np.stack([dataset.sample(index) for index in indices])
    return MicroBatch(np.ascontiguousarray(blocks[:, :-1]), np.ascontiguousarray(blocks[:, 1:]))

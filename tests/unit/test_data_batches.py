"""Global batches are the same whatever the data-parallel size; each rank gets Megatron's share of them."""

import numpy as np
import pytest

from megamoe.data.batches import BatchPlan, micro_batches
from megamoe.errors import ConfigError


class Numbered:
    """Sample i is i*100, i*100 + 1, ..."""

    num_samples = 10

    def sample(self, index: int) -> np.ndarray:
        return np.arange(index * 100, index * 100 + 5)


def first_tokens(consumed: int, global_batch_size: int, micro_batch_size: int, rank: int, size: int) -> list[list[int]]:
    batches = micro_batches(
        Numbered(),
        consumed_samples=consumed,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        data_parallel_rank=rank,
        data_parallel_size=size,
    )
    return [(batch.tokens[:, 0] // 100).tolist() for batch in batches]


def global_batch(consumed: int, global_batch_size: int, micro_batch_size: int, size: int) -> list[int]:
    ranks = [first_tokens(consumed, global_batch_size, micro_batch_size, rank, size) for rank in range(size)]
    return [sample for together in zip(*ranks, strict=True) for micro in together for sample in micro]


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_same_global_batches_for_every_data_parallel_size(micro_batch_size):
    for step in range(5):
        batches = [global_batch(16 * step, 16, micro_batch_size, size) for size in (1, 2, 4, 8)]
        assert batches == [list(range(16 * step, 16 * step + 16))] * 4


def test_share_of_one_rank():
    assert first_tokens(24, 12, 2, rank=1, size=3) == [[26, 27], [32, 33]]
    assert BatchPlan(2, 3).sample_indices(24, micro_batch=1, data_parallel_rank=1) == range(32, 34)


def test_labels_follow_tokens():
    (batch,) = micro_batches(
        Numbered(),
        consumed_samples=3,
        global_batch_size=2,
        micro_batch_size=2,
        data_parallel_rank=0,
        data_parallel_size=1,
    )
    assert batch.tokens.tolist() == [[300, 301, 302, 303], [400, 401, 402, 403]]
    assert batch.labels.tolist() == [[301, 302, 303, 304], [401, 402, 403, 404]]
    assert batch.tokens.dtype == batch.labels.dtype == np.int64
    assert batch.tokens.flags.c_contiguous
    assert batch.labels.flags.c_contiguous


@pytest.mark.parametrize(("global_batch_size", "valid"), [(10, "8 or 16"), (3, "8")])
def test_sizes_that_do_not_divide(global_batch_size, valid):
    with pytest.raises(ConfigError) as caught:
        first_tokens(0, global_batch_size, 2, rank=0, size=4)
    assert str(caught.value) == (
        f"global_batch_size {global_batch_size} is no multiple of micro_batch_size 2 x data parallel size 4: "
        f"use {valid}"
    )

"""The batch-size ramp: exact points, and the same as Megatron-core's own."""

import pytest

from megamoe.config.schema import BatchSizeRamp, RunConfig
from megamoe.training.batch_size import global_batch_size


def run(start: int, increment: int, num_samples: int, *, global_batch: int) -> RunConfig:
    ramp = BatchSizeRamp(start=start, increment=increment, num_samples=num_samples)
    return RunConfig(global_batch_size=global_batch, batch_size_ramp=ramp)


def test_without_a_ramp_the_batch_is_constant():
    assert {global_batch_size(RunConfig(global_batch_size=24), n) for n in (0, 1, 10**12)} == {24}


def test_exact_points():
    config = run(8, 4, 300, global_batch=20)  # three increments, one per 100 samples
    points = {0: 8, 99: 8, 100: 12, 199: 12, 200: 16, 299: 16, 300: 20, 301: 20, 10**12: 20}
    assert {samples: global_batch_size(config, samples) for samples in points} == points


def test_a_ramp_that_starts_at_the_whole_batch_is_none():
    assert global_batch_size(run(16, 4, 100, global_batch=16), 0) == 16


def test_an_increment_that_overshoots_ends_at_the_whole_batch():
    config = run(8, 8, 100, global_batch=20)
    assert [global_batch_size(config, samples) for samples in (0, 49, 50, 99, 100)] == [8, 8, 16, 16, 20]


def test_the_steps_of_a_run():
    config = run(2, 2, 12, global_batch=8)
    sizes, consumed = [], 0
    while consumed < 30:
        sizes.append(global_batch_size(config, consumed))
        consumed += sizes[-1]
    assert sizes == [2, 2, 4, 6, 8, 8]


@pytest.mark.parametrize(
    ("start", "increment", "num_samples", "whole"), [(8, 4, 300, 20), (2, 2, 97, 32), (5, 1, 7, 9)]
)
def test_equals_megatron(start, increment, num_samples, whole):
    from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

    theirs = RampupBatchsizeNumMicroBatchesCalculator(whole, 1, 1, False, 0, start, increment, num_samples)
    config = run(start, increment, num_samples, global_batch=whole)
    for samples in range(num_samples + 3):
        theirs.update(samples, False)
        assert global_batch_size(config, samples) == theirs.get_current_global_batch_size(), samples

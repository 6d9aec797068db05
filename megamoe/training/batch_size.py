"""The global batch size of a step, constant or ramping up. No torch."""

from megamoe.config.schema import RunConfig


def global_batch_size(run: RunConfig, consumed_samples: int) -> int:
    """Sequences of the step that begins after `consumed_samples`.

    A ramp starts at `start` and grows by `increment` at equal intervals of its `num_samples`, until it reaches
    run.global_batch_size (Megatron's batch-size ramp).
    """
    ramp = run.batch_size_ramp
    if ramp is None or ramp.start >= run.global_batch_size:
        return run.global_batch_size
    num_increments = -(-(run.global_batch_size - ramp.start) // ramp.increment)
    grown = consumed_samples * num_increments // ramp.num_samples
    return min(run.global_batch_size, ramp.start + grown * ramp.increment)

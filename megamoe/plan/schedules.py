"""How many micro-batches a pipeline stage has in flight, as Megatron-core 0.16.1's schedules order passes. No torch."""

from collections.abc import Sequence


def forward_order(pipeline: int, num_micro_batches: int, num_chunks: int) -> list[int]:
    """The chunk of each forward pass on a rank: groups of `pipeline` micro-batches through one chunk after another.

    Backward passes come in the same order with chunks counted from the last.
    """
    order = []
    for first in range(0, num_micro_batches, pipeline):
        size = min(pipeline, num_micro_batches - first)
        order += [chunk for chunk in range(num_chunks) for _ in range(size)]
    return order


def num_warmup_passes(pipeline: int, pipeline_rank: int, num_micro_batches: int, num_chunks: int) -> int:
    """Forward passes before the first backward pass's own forward pass (one forward, one backward from then on)."""
    if pipeline == 1:
        return 0
    if num_chunks == 1:
        return min(pipeline - pipeline_rank - 1, num_micro_batches)
    warmup = (pipeline - pipeline_rank - 1) * 2 + (num_chunks - 1) * pipeline
    return min(warmup, num_micro_batches * num_chunks)


def in_flight(
    *, pipeline: int, pipeline_rank: int, num_micro_batches: int, weights: Sequence[int]
) -> tuple[int, ...]:
    """Micro-batches of each chunk whose activations are alive at the moment when their weighted sum is the largest.

    `weights` are the bytes of a micro-batch in each of the rank's chunks. With one chunk stage p of P has
    min(P - p, micro-batches) in flight (1F1B: Narayanan et al. 2021, section 2.2).
    """
    num_chunks = len(weights)
    warmup = num_warmup_passes(pipeline, pipeline_rank, num_micro_batches, num_chunks)
    if num_chunks == 1:
        return (min(warmup + 1, num_micro_batches),)
    forward = forward_order(pipeline, num_micro_batches, num_chunks)
    # After the first groups the pattern repeats.
    horizon = min(len(forward), warmup + 2 * pipeline * num_chunks)
    alive, best, best_bytes = [0] * num_chunks, (0,) * num_chunks, -1
    for number in range(horizon):
        alive[forward[number]] += 1
        size = sum(count * weight for count, weight in zip(alive, weights, strict=True))
        if size > best_bytes:
            best, best_bytes = tuple(alive), size
        if number >= warmup:
            alive[num_chunks - 1 - forward[number - warmup]] -= 1
    return best

"""A whole run: days and GPU-hours for its tokens, the checkpoint's size and time, and what failures take.

With a checkpoint that takes w seconds to write, and failures M seconds apart on average, saving every
sqrt(2 w M) seconds loses least (Young, 1974, "A first order approximation to the optimum checkpoint interval"); the
time of writing is lost in each interval, and half an interval and a restart with each failure. Daly (2006, "A higher
order estimate of the optimum checkpoint interval") refines the interval where w is not small against M; that is used.
"""

import math
from dataclasses import dataclass

from megamoe.config.schema import Config
from megamoe.plan.cluster import Cluster
from megamoe.topology.parameters import num_parameters, param_table

SECONDS_PER_DAY = 86_400.0
RESTART_SECONDS = 600.0  # from a failure to the next step: noticed, queued, loaded (Kokolis et al. 2024: 5 to 20 min)


@dataclass(frozen=True)
class Lifetime:
    """What a run of `num_steps` takes. Seconds that are lost are a share of the whole, failures included."""

    num_steps: int
    tokens: int
    days_without_failures: float
    days: float  # expected, with saves, lost work and restarts
    gpu_hours: float  # expected
    checkpoint_bytes: int
    checkpoint_seconds: float  # to write or to read it
    blocking_seconds: float  # of a save, what training waits
    failures_expected: float
    seconds_between_failures: float  # inf: none are expected
    save_interval_seconds: float  # best; inf where nothing fails
    save_interval_steps: int  # the same in whole steps, at least 1; 0: at the end is enough
    lost_share: float  # of the expected time


def checkpoint_bytes(config: Config) -> int:
    """Of one whole checkpoint: fp32 weights, and what the optimizer keeps of each; 16-bit weights are made of them."""
    copies = {"adamw": 3, "sgd": 2 if config.optimizer.momentum else 1}[config.optimizer.name]
    return 4 * copies * num_parameters(param_table(config.model, config.moe))


def lifetime(
    config: Config, cluster: Cluster, world_size: int, step_seconds: float, *, num_tokens: int | None = None,
    restart_seconds: float = RESTART_SECONDS, async_save: bool = False,
) -> Lifetime:  # fmt: skip
    """`num_tokens`: the budget; None: what run.num_steps takes. `async_save`: training goes on while a save is written,
    so that it costs nothing but delays what a failure falls back to."""
    batch_tokens = config.run.global_batch_size * config.model.seq_length
    num_steps = config.run.num_steps if num_tokens is None else math.ceil(num_tokens / batch_tokens)
    working = num_steps * step_seconds
    num_nodes = math.ceil(world_size / cluster.ranks_per_node)
    size = checkpoint_bytes(config)
    writing = size / (cluster.storage_bytes_per_second_per_node * num_nodes)
    per_second = cluster.failures_per_node_day * num_nodes / SECONDS_PER_DAY
    between = 1 / per_second if per_second else math.inf
    blocking = 0.0 if async_save else writing
    # A save under way is not yet what a restart falls back to, so its time counts against it either way.
    interval = best_interval(writing, between)
    lost = lost_share(interval, blocking, between, restart_seconds + writing + (writing if async_save else 0.0))
    total = working / (1 - lost) if lost < 1 else math.inf
    return Lifetime(
        num_steps=num_steps,
        tokens=num_steps * batch_tokens,
        days_without_failures=working / SECONDS_PER_DAY,
        days=total / SECONDS_PER_DAY,
        gpu_hours=total * world_size / 3600,
        checkpoint_bytes=size,
        checkpoint_seconds=writing,
        blocking_seconds=blocking,
        failures_expected=total * per_second,
        seconds_between_failures=between,
        save_interval_seconds=interval,
        save_interval_steps=0 if math.isinf(interval) else max(1, round(interval / step_seconds)),
        lost_share=lost,
    )


def best_interval(write_seconds: float, between_failures: float) -> float:
    """Seconds of work between saves: sqrt(2 w M) (1 + sqrt(w / 2M) / 3 + w / 18M) - w, or M at most (Daly, eq. 37)."""
    if math.isinf(between_failures):
        return math.inf
    ratio = write_seconds / (2 * between_failures)
    if ratio >= 1:
        return between_failures
    young = math.sqrt(2 * write_seconds * between_failures)
    return young * (1 + math.sqrt(ratio) / 3 + ratio / 9) - write_seconds


def lost_share(interval: float, blocking: float, between_failures: float, restart: float) -> float:
    """Of the time of a run, in first order: saves, and with each failure half an interval, its save, and a restart."""
    if math.isinf(between_failures):
        return 0.0
    saves = blocking / (interval + blocking) if blocking else 0.0
    return min(1.0, saves + ((interval + blocking) / 2 + restart) / between_failures)

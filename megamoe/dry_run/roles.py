"""Every distinct role of a job's ranks, played one after the other: what each holds, keeps and calls in a whole step.

Pipeline ranks that hold layers of the same kinds, and the same ends of the model, are one role: their other ranks
differ in numbers only. A step of many micro-batches repeats itself; its calls are linear in their number, and two short
steps say by how much (`tests/parallel/test_dry_run_roles.py` holds that to whole steps).
"""

import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from megamoe.config.schema import Config
from megamoe.dry_run.build import Kernels, trainer_of_rank
from megamoe.dry_run.recorder import Call
from megamoe.dry_run.rows import StatedRows
from megamoe.dry_run.schedule import in_flight_over_a_step
from megamoe.dry_run.step import StateBytes, StepReality, empty_batch, watched
from megamoe.moe.host_read import numbers_from
from megamoe.plan.quantities import Load
from megamoe.plan.roles import roles
from megamoe.plan.states import num_micro_batches
from megamoe.topology.grid import Grid


@dataclass(frozen=True)
class RankReality:
    """What one rank was in one step of `num_micro_batches`, of which `num_played` were played.

    `calls` are in the order of their first occurrence. `kept_bytes` and `in_flight` are by chunk of the model: what one
    micro-batch keeps for its backward pass, its input included, and how many do so when most is kept in all. The peaks
    are those of everything alive, for the whole step.
    """

    rank: int
    pipeline_rank: int
    num_micro_batches: int
    num_played: int
    states: StateBytes
    kept_bytes: tuple[int, ...]
    in_flight: tuple[int, ...]
    schedule_peak_bytes: int
    update_peak_bytes: int
    calls: Mapping[Call, int]

    @property
    def activation_bytes(self) -> int:
        """At the moment when most is kept."""
        return sum(kept * held for kept, held in zip(self.kept_bytes, self.in_flight, strict=True))


def play_roles(config: Config, world_size: int, load: Load) -> dict[int, RankReality]:
    """Every role of `config` on `world_size` ranks, by its first pipeline rank. Raises as `play_rank`."""
    firsts = [role.pipeline_rank for role in roles(config, world_size)]
    return {first: play_rank(config, world_size, first, load) for first in firsts}


def play_rank(
    config: Config, world_size: int, pipeline_rank: int, load: Load, *, whole: bool = False, kernels: Kernels = "cuda"
) -> RankReality:
    """The first rank of a pipeline rank, in one step after its first, under `load` with it as the fullest.

    `whole`: play all micro-batches instead of as many as tell the rest. `kernels`: whose saved tensors. Raises
    TopologyError or ConfigError where the layout does not fit, as training would.
    """
    grid = Grid.from_config(config.parallel, world_size)
    rank = grid.rank_at(tensor=0, data=0, pipeline=pipeline_rank)
    total = num_micro_batches(config, world_size)
    period = grid.pipeline if config.parallel.virtual_pipeline_parallel_size > 1 else 1
    lengths = (period, 2 * period)
    if whole or total % period or total <= 2 * period:
        lengths = (total, total)
    with (
        watched(without_memory=True) as watch,
        trainer_of_rank(config, rank, world_size, kernels=kernels) as trainer,
        numbers_from(StatedRows(config, trainer.groups.coordinates, load)),
    ):
        # The optimizer's state is made in the first step: the second is as all others are.
        short, long = (
            watch.step(trainer, empty_batch(trainer, length), config.run.global_batch_size) for length in lengths
        )
        del trainer
    kept = _kept_bytes(long)
    is_whole = lengths[1] == total
    seen = [each.in_flight for each in long.passes] if is_whole else in_flight_over_a_step(config, pipeline_rank, total)
    in_flight = max(seen, key=lambda counts: sum(map(operator.mul, counts, kept)))
    return RankReality(
        rank,
        pipeline_rank,
        total,
        lengths[1],
        long.states,
        kept,
        in_flight,
        long.schedule_peak_bytes if is_whole else _schedule_peak(long, kept, in_flight),
        long.update_peak_bytes,
        _calls_of(total, short, long),
    )


def _kept_bytes(step: StepReality) -> tuple[int, ...]:
    """By chunk: of the last forward pass, as the first also makes what stays for good."""
    last = {each.chunk: each for each in step.passes}
    return tuple(last[chunk].kept_bytes + last[chunk].input_bytes for chunk in sorted(last))


def _schedule_peak(step: StepReality, kept: tuple[int, ...], in_flight: tuple[int, ...]) -> int:
    """Of a longer step: as in the last backward pass of the one that was played, when gradients were there, but with
    as much kept beside it as ever."""
    last = step.last_backward
    beside = sum(one * (held - few) for one, held, few in zip(kept, in_flight, last.in_flight, strict=True))
    return max(step.schedule_peak_bytes, last.peak_bytes + beside)


def _calls_of(num_micro_batches: int, short: StepReality, long: StepReality) -> dict[Call, int]:
    """Each call of a step of `num_micro_batches` and how often, from two steps whose calls differ by the slope."""
    in_short, in_long = Counter(short.calls), Counter(long.calls)
    apart = long.num_micro_batches - short.num_micro_batches
    if apart == 0:
        return dict(in_long)
    times = (num_micro_batches - long.num_micro_batches) // apart
    return {call: count + times * (count - in_short[call]) for call, count in in_long.items()}

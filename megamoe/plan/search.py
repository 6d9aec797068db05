"""The best layout for a number of GPUs: all folds, with as little recompute as memory allows, ranked by time. No torch.

A fold whose states alone overfill a rank is dropped first. Of the others each micro-batch size takes the least
recompute that fits, which is always the fastest, at ZeRO stage 1 if it can, else at 2; then both all-to-alls are timed.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from megamoe.config.schema import Config
from megamoe.config.validation import validate
from megamoe.errors import ConfigError, MegamoeError
from megamoe.plan.cluster import Cluster
from megamoe.plan.layouts import changed, folds, with_batches, with_exchanges
from megamoe.plan.memory import role_memory
from megamoe.plan.quantities import Load, RoleBytes
from megamoe.plan.roles import roles
from megamoe.plan.states import states
from megamoe.plan.timing import StepTime, StepTimer
from megamoe.topology.grid import Grid

NUM_BEST = 10
_RECOMPUTES = ("none", "selective", "full")


@dataclass(frozen=True)
class Candidate:
    """A layout that fits, its step, and what its fullest rank holds."""

    config: Config
    step: StepTime
    memory: RoleBytes


@dataclass(frozen=True)
class Loser:
    """An obvious alternative, and why it is not the best: its best layout is slower, or its leanest does not fit."""

    name: str
    best: Candidate | None
    leanest_bytes: int | None  # None: no layout of the kind can be made of these GPUs


@dataclass
class SearchResult:
    """`best` are the fastest, of different folds; `losers` those of `alternatives` that the first is not one of."""

    cluster: Cluster
    world_size: int
    best: tuple[Candidate, ...] = ()
    losers: tuple[Loser, ...] = ()
    num_tried: int = 0
    num_fitting: int = 0
    leanest: tuple[Config, RoleBytes] | None = None
    seconds: float = 0.0


@dataclass
class _Tally:
    """What the search has seen of each alternative."""

    best: dict[str, Candidate] = field(default_factory=dict)
    leanest: dict[str, int] = field(default_factory=dict)

    def count_memory(self, names: list[str], num_bytes: int) -> None:
        for name in names:
            self.leanest[name] = min(num_bytes, self.leanest.get(name, num_bytes))

    def count(self, names: list[str], candidate: Candidate) -> None:
        for name in names:
            if name not in self.best or candidate.step.seconds < self.best[name].step.seconds:
                self.best[name] = candidate


def search(
    config: Config, cluster: Cluster, world_size: int, load: Load, progress: Callable[[str], None] | None = None
) -> SearchResult:
    """Every layout of `config`'s model and global batch on these GPUs. Raises ConfigError where the cluster lacks the
    precision, or where no fold of the ranks can train the model at all."""
    cluster.peak(config.run.precision)
    started, result, tally = time.monotonic(), SearchResult(cluster, world_size), _Tally()
    found: list[Candidate] = []
    smallest = changed(config, parallel={"recompute": "none"}, run={"micro_batch_size": 1})
    every_fold = list(folds(smallest, cluster, world_size))
    if not every_fold:
        validate(config, world_size)  # says what is impossible
        raise ConfigError(
            f"no layout of {world_size} ranks, with tensor groups inside nodes of {cluster.ranks_per_node}, can train "
            "this model on its global batch: use another number of GPUs"
        )
    for number, fold in enumerate(every_fold):
        if progress is not None and number % 16 == 0:
            progress(f"layouts {number} of {len(every_fold)}, {len(found)} fit")
        names = _alternatives_of(fold, config, cluster, world_size)
        for candidate in _fitting(fold, cluster, world_size, load, result, tally, names):
            found.append(candidate)
            tally.count(names, candidate)
    found.sort(key=lambda each: each.step.seconds)
    result.best = tuple(_one_of_each_fold(found))
    result.num_fitting, result.seconds = len(found), time.monotonic() - started
    first = _alternatives_of(result.best[0].config, config, cluster, world_size) if result.best else []
    result.losers = tuple(
        Loser(name, tally.best.get(name), tally.leanest.get(name)) for name in ALTERNATIVES if name not in first
    )
    return result


ALTERNATIVES: dict[str, Callable[[Config, Config, Cluster, int], bool]] = {
    "as configured": lambda c, given, _, __: all(
        getattr(c.parallel, key) == getattr(given.parallel, key)
        for key in ("tensor_parallel_size", "pipeline_parallel_size", "expert_parallel_size",
                    "virtual_pipeline_parallel_size", "expert_tensor_parallel_size")
    ),
    "data and experts alone (no tensor, no pipeline)": lambda c, *_: _shape(c) == (1, 1),
    "tensor over a whole node": lambda c, _, cluster, __: c.parallel.tensor_parallel_size == cluster.ranks_per_node,
    "pipeline, no tensor": lambda c, *_: c.parallel.tensor_parallel_size == 1 and c.parallel.pipeline_parallel_size > 1,
    "experts inside a node": lambda c, _, cluster, __: (
        c.moe.num_experts > 0
        and c.parallel.expert_parallel_size * c.parallel.expert_tensor_parallel_size <= cluster.ranks_per_node
    ),
    "an expert on every rank of a stage": lambda c, _, __, world: (
        c.moe.num_experts > 0
        and c.parallel.expert_parallel_size == world // c.parallel.pipeline_parallel_size
    ),
}  # fmt: skip


def _shape(config: Config) -> tuple[int, int]:
    return config.parallel.tensor_parallel_size, config.parallel.pipeline_parallel_size


def _alternatives_of(fold: Config, given: Config, cluster: Cluster, world_size: int) -> list[str]:
    return [name for name, is_one in ALTERNATIVES.items() if is_one(fold, given, cluster, world_size)]


def _fitting(
    fold: Config, cluster: Cluster, world_size: int, load: Load, result: SearchResult, tally: _Tally, names: list[str]
) -> Iterator[Candidate]:
    """The layouts of one fold that fit, timed."""
    stages = [1, 2] if fold.run.precision != "fp32" else [0, 1, 2]
    for zero_stage in stages:
        config = changed(fold, parallel={"zero_stage": zero_stage})
        least = _state_bytes(config, cluster, world_size)
        tally.count_memory(names, least)
        if least > cluster.memory_bytes:
            result.num_tried += 1
            continue
        for batch in with_batches(config, world_size):
            fits = _least_recompute(batch, cluster, world_size, load, result)
            if fits is None:
                continue
            layout, memory = fits
            for exchange in with_exchanges(layout, cluster, world_size):
                result.num_tried += 1
                try:
                    step = StepTimer(exchange, cluster, world_size, load=load).time()
                except MegamoeError:
                    continue
                yield Candidate(exchange, step, memory)


def _state_bytes(config: Config, cluster: Cluster, world_size: int) -> int:
    """Of the fullest role, between steps: no activation, no gradient."""
    ranks = Grid.from_config(config.parallel, world_size).stage_ranks
    firsts = {role.pipeline_rank for role in roles(config, world_size)}
    held = max(states(config, world_size, first * ranks).at("rest") for first in firsts)
    return held + cluster.overhead_bytes


def _least_recompute(
    config: Config, cluster: Cluster, world_size: int, load: Load, result: SearchResult
) -> tuple[Config, RoleBytes] | None:
    """With the first of `_RECOMPUTES` that fits; None: not even the last does."""
    for recompute in _RECOMPUTES:
        tried = changed(config, parallel={"recompute": recompute})
        memory = max(
            (
                role_memory(tried, world_size, role, load, overhead_bytes=cluster.overhead_bytes).num_bytes
                for role in roles(tried, world_size)
            ),
            key=lambda num_bytes: num_bytes.total,
        )
        if result.leanest is None or memory.total < result.leanest[1].total:
            result.leanest = (tried, memory)
        if memory.total <= cluster.memory_bytes:
            return tried, memory
    result.num_tried += 1
    return None


def _one_of_each_fold(ranked: list[Candidate]) -> Iterator[Candidate]:
    """The fastest of each fold, until there are NUM_BEST: ten lines that differ in a batch size tell little."""
    seen: set[tuple[int, ...]] = set()
    for each in ranked:
        parallel = each.config.parallel
        fold = (
            parallel.tensor_parallel_size,
            parallel.pipeline_parallel_size,
            parallel.virtual_pipeline_parallel_size,
            parallel.expert_parallel_size,
            parallel.expert_tensor_parallel_size,
        )
        if fold not in seen and len(seen) < NUM_BEST:
            seen.add(fold)
            yield each

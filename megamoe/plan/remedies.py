"""What to change: settings tried one by one, two by two where one does not do, and planned anew each time. No torch."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megamoe.config.loading import override_config
from megamoe.config.schema import Config
from megamoe.errors import MegamoeError
from megamoe.plan.plan import Plan, make_plan

_MAX_SHOWN = 4


@dataclass(frozen=True)
class Remedy:
    """Settings, and the plan that they make."""

    overrides: tuple[str, ...]
    plan: Plan


def remedies(plan: Plan) -> tuple[Remedy, ...]:
    """Of a plan that does not fit, changes after which it does; of one that does, changes that make a step faster.

    The fastest first. The model, the batch and the number of GPUs stay as they are. Of changes that do no more than
    others with fewer settings none is given; empty where nothing of the kind helps.
    """
    changes = tuple(_changes(plan.config))
    found = [remedy for change in changes for remedy in _tried(plan, (change,))]
    if not plan.fits and not found:
        pairs = itertools.combinations(changes, 2)
        found = [remedy for pair in pairs if _key(pair[0]) != _key(pair[1]) for remedy in _tried(plan, pair)]
    return tuple(sorted(found, key=lambda remedy: remedy.plan.step.seconds)[:_MAX_SHOWN])


def _tried(plan: Plan, changes: Sequence[str]) -> Iterator[Remedy]:
    """The remedy that these changes are, if they are one."""
    try:
        config = override_config(plan.config, changes, "a change that was tried")
        changed = make_plan(config, plan.cluster, plan.world_size, plan.load)
    except MegamoeError:
        return  # sizes that do not divide, or what is not supported: no remedy
    faster = changed.step.seconds < 0.99 * plan.step.seconds
    if changed.fits and (faster or not plan.fits):
        yield Remedy(tuple(changes), changed)


def _key(change: str) -> str:
    return change.partition("=")[0]


def _changes(config: Config) -> Iterator[str]:
    parallel, run = config.parallel, config.run
    for recompute in ("none", "selective", "full"):
        if recompute != parallel.recompute:
            yield f"parallel.recompute={recompute}"
    for stage in (1, 2):
        if stage != parallel.zero_stage:
            yield f"parallel.zero_stage={stage}"
    if parallel.tensor_parallel_size > 1 and not parallel.sequence_parallel:
        yield "parallel.sequence_parallel=true"
    for factor in (2, 4):
        if run.micro_batch_size % factor == 0:
            yield f"run.micro_batch_size={run.micro_batch_size // factor}"
        yield f"run.micro_batch_size={run.micro_batch_size * factor}"
        for key in ("tensor_parallel_size", "pipeline_parallel_size", "expert_parallel_size"):
            size = getattr(parallel, key)
            yield f"parallel.{key}={size * factor}"
            if size % factor == 0:
                yield f"parallel.{key}={size // factor}"
    if parallel.expert_parallel_size > 1:
        other = {"flat": "hierarchical", "hierarchical": "flat"}[parallel.all_to_all]
        yield f"parallel.all_to_all={other}"

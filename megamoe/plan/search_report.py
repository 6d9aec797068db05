"""What a search found, in words and numbers: the best layouts, the settings of the first, why others lose. No torch."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from megamoe.config.schema import Config
from megamoe.plan.quantities import RoleBytes
from megamoe.plan.report import GIB, PART_NAMES, aligned
from megamoe.plan.search import Candidate, Loser, SearchResult

_PARALLEL_KEYS = (
    "tensor_parallel_size", "pipeline_parallel_size", "virtual_pipeline_parallel_size", "expert_parallel_size",
    "expert_tensor_parallel_size", "sequence_parallel", "all_to_all", "ranks_per_node", "zero_stage", "recompute",
)  # fmt: skip


def search_text(found: SearchResult) -> str:
    """A page; the last lines are settings to give to `megamoe plan` or `megamoe train`."""
    cluster = found.cluster
    lines = [
        f"{found.num_tried:,} layouts tried on {found.world_size} x {cluster.accelerator} in {found.seconds:.1f} s, "
        f"{found.num_fitting:,} fit"
    ]
    if not found.best:
        return "\n".join([*lines, *_nothing_fits(found)]) + "\n"
    lines += ["", *_ranking(found), "", "settings of the first:"]
    lines.append(f"  {' '.join(overrides_of(found.best[0].config))}")
    if found.losers:
        lines += ["", "why not"]
        lines += [f"  {loser.name}: {_why(loser, found)}" for loser in found.losers]
    return "\n".join(lines) + "\n"


def search_tree(found: SearchResult) -> dict[str, Any]:
    """The same for JSON."""
    return {
        "world_size": found.world_size,
        "cluster": found.cluster.name,
        "num_tried": found.num_tried,
        "num_fitting": found.num_fitting,
        "seconds": found.seconds,
        "best": [
            {
                "overrides": list(overrides_of(each.config)),
                "step": dataclasses.asdict(each.step),
                "bytes": {**dataclasses.asdict(each.memory), "total": each.memory.total},
            }
            for each in found.best
        ],
        "losers": [{"name": loser.name, "why": _why(loser, found)} for loser in found.losers] if found.best else [],
    }


def overrides_of(config: Config) -> tuple[str, ...]:
    """What the search has decided, as settings that win over any other layout."""
    settings = [f"parallel.{key}={_yaml(getattr(config.parallel, key))}" for key in _PARALLEL_KEYS]
    return (*settings, f"run.micro_batch_size={config.run.micro_batch_size}")


def _yaml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "null" if value is None else str(value)


def _ranking(found: SearchResult) -> Iterator[str]:
    rows = [
        [
            "", "tensor", "pipeline", "virtual", "expert", "expert tensor", "micro-batch", "ZeRO", "recompute",
            "all-to-all", "s/step", "tok/s/GPU", "MFU %", "GiB of " + f"{found.cluster.memory_bytes / GIB:.0f}",
        ]
    ]  # fmt: skip
    for number, each in enumerate(found.best, 1):
        parallel = each.config.parallel
        rows.append(
            [
                str(number),
                *(str(getattr(parallel, key)) for key in _PARALLEL_KEYS[:5]),
                str(each.config.run.micro_batch_size),
                str(parallel.zero_stage),
                parallel.recompute,
                parallel.all_to_all,
                f"{each.step.seconds:.3f}",
                f"{each.step.tokens_per_second_per_gpu:,.0f}",
                f"{100 * each.step.model_flops_utilisation:.1f}",
                f"{each.memory.total / GIB:.1f}",
            ]
        )
    return aligned(rows)


def _why(loser: Loser, found: SearchResult) -> str:
    memory = found.cluster.memory_bytes
    if loser.best is not None:
        first = found.best[0]
        slower = loser.best.step.seconds / first.step.seconds - 1
        return f"{100 * slower:.0f} % slower, {_main_cost(loser.best, first)}"
    if loser.leanest_bytes is None:
        return "no such layout of these GPUs can train this model"
    if loser.leanest_bytes > memory:
        return (
            f"does not fit: weights and optimizer alone take {loser.leanest_bytes / GIB:.1f} of "
            f"{memory / GIB:.1f} GiB"
        )
    return "does not fit: no micro-batch leaves room for gradients and activations, even with full recompute"


def _main_cost(slow: Candidate, fast: Candidate) -> str:
    """The kind of time that differs most."""
    kinds = slow.step.by_kind.keys() | fast.step.by_kind.keys()
    more = {kind: slow.step.by_kind.get(kind, 0.0) - fast.step.by_kind.get(kind, 0.0) for kind in kinds}
    worst = max(sorted(more), key=lambda kind: more[kind])
    return f"most of it {worst} (+{more[worst]:.2f} s)"


def _nothing_fits(found: SearchResult) -> Iterator[str]:
    if found.leanest is None:
        yield "no layout fits: weights and optimizer alone fill the memory of each; use more GPUs"
        return
    config, memory = found.leanest
    yield (
        f"the leanest needs {memory.total / GIB:.1f} of {found.cluster.memory_bytes / GIB:.1f} GiB, most of it "
        f"{_largest(memory)}: {' '.join(overrides_of(config))}"
    )


def _largest(memory: RoleBytes) -> str:
    parts = {PART_NAMES[field.name]: getattr(memory, field.name) for field in dataclasses.fields(memory)}
    return max(parts, key=lambda name: parts[name])

"""A plan in words and numbers: a page that is read at a glance, or a tree for programs. No torch."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from typing import Any

from megamoe.plan.assumptions import assumptions
from megamoe.plan.plan import Plan, RolePlan
from megamoe.plan.quantities import RoleBytes
from megamoe.plan.remedies import Remedy

GIB = 2**30
PART_NAMES = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "buffers": "engine buffers",
    "activations": "saved activations",
    "working": "working set",
    "overhead": "context, libraries",
}


def text_report(plan: Plan, remedies: Sequence[Remedy], *, with_assumptions: bool = True) -> str:
    """The whole report; lines of up to about 110 columns."""
    lines = [
        *_head(plan),
        "",
        *_verdict(plan, remedies),
        "",
        *_memory_table(plan),
        "",
        *_time_table(plan),
        "",
        *_link_table(plan),
        "",
        *_life(plan),
    ]
    if with_assumptions:
        lines += ["", *_assumption_table(plan)]
    return "\n".join(lines) + "\n"


def tree_report(plan: Plan, remedies: Sequence[Remedy]) -> dict[str, Any]:
    """The same for JSON; bytes and seconds as numbers."""
    return {
        "world_size": plan.world_size,
        "cluster": plan.cluster.name,
        "num_parameters": plan.num_parameters,
        "num_active_parameters": plan.num_active_parameters,
        "load_max_over_mean": plan.load.max_over_mean,
        "fits": plan.fits,
        "memory_bytes": plan.cluster.memory_bytes,
        "free_bytes": plan.free_bytes,
        "worst_pipeline_rank": plan.worst.role.pipeline_rank,
        "roles": [_role_tree(each) for each in plan.roles],
        "step": asdict(plan.step),
        "lifetime": {key: _finite(value) for key, value in asdict(plan.lifetime).items()},
        "remedies": [
            {
                "overrides": list(remedy.overrides),
                "step_seconds": remedy.plan.step.seconds,
                "free_bytes": remedy.plan.free_bytes,
            }
            for remedy in remedies
        ],
        "assumptions": [asdict(each) for each in assumptions(plan.cluster)],
        "config": plan.config.model_dump(mode="json"),
    }


def _role_tree(each: RolePlan) -> dict[str, Any]:
    return {
        "pipeline_ranks": list(each.role.pipeline_ranks),
        "layers": [[chunk.layers.start, chunk.layers.stop] for chunk in each.role.chunks],
        "num_parameters": each.role.num_elements,
        "fullest_at": each.memory.moment,
        "bytes": {**asdict(each.memory.num_bytes), "total": each.memory.num_bytes.total},
        "collectives": [asdict(collective) for collective in each.collectives],
    }


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return None if value == float("inf") else value


def _head(plan: Plan) -> Iterator[str]:
    parallel, run = plan.config.parallel, plan.config.run
    data = plan.world_size // (parallel.tensor_parallel_size * parallel.pipeline_parallel_size)
    experts = f", experts over {parallel.expert_parallel_size}" if plan.config.moe.num_experts else ""
    yield (
        f"{plan.num_parameters:,} parameters, {plan.num_active_parameters:,} active per token, "
        f"on {plan.world_size} x {plan.cluster.accelerator}"
    )
    yield (
        f"tensor {parallel.tensor_parallel_size} x data {data} x pipeline {parallel.pipeline_parallel_size}{experts}, "
        f"ZeRO-{parallel.zero_stage}, {run.precision}, recompute {parallel.recompute}"
    )
    yield (
        f"batch of {run.global_batch_size} x {plan.config.model.seq_length} tokens, micro-batches of "
        f"{run.micro_batch_size}; expert ranks filled to {plan.load.max_over_mean:g} x the mean"
    )


def _verdict(plan: Plan, remedies: Sequence[Remedy]) -> Iterator[str]:
    worst = plan.worst.memory.num_bytes
    where = stages_of(plan.worst)
    need = f"{worst.total / GIB:.1f} of {plan.cluster.memory_bytes / GIB:.1f} GiB on {where}"
    largest = sorted(_parts(worst), key=lambda part: -part[1])[:2]
    most = " and ".join(f"{name} {size / GIB:.1f}" for name, size in largest)
    if plan.fits:
        yield f"FITS: {need}, {plan.free_bytes / GIB:.1f} GiB free; most of it {most}"
    else:
        yield f"DOES NOT FIT: {need}, {-plan.free_bytes / GIB:.1f} GiB too much; most of it {most}"
    slow = sorted(plan.step.by_kind.items(), key=lambda item: -item[1])[:2]
    shares = ", ".join(f"{name} {100 * seconds / plan.step.seconds:.0f} %" for name, seconds in slow)
    yield f"time goes into {shares}"
    if remedies:
        yield "what would be faster and fit:" if plan.fits else "what would make it fit:"
        for remedy in remedies:
            after = remedy.plan
            yield (
                f"  {' '.join(remedy.overrides)}: {after.step.seconds:.2f} s a step, "
                f"{after.free_bytes / GIB:.1f} GiB free"
            )
    elif not plan.fits:
        yield "no change of one or two settings makes it fit: use more GPUs, or `--search` for a layout"


def stages_of(each: RolePlan) -> str:
    """The pipeline stages that play a role, for a reader."""
    ranks = each.role.pipeline_ranks
    if len(ranks) == 1:
        return f"stage {ranks[0]}"
    whole = list(ranks) == list(range(ranks[0], ranks[-1] + 1))
    return f"stages {ranks[0]}-{ranks[-1]}" if whole else f"stages {', '.join(map(str, ranks))}"


def _parts(num_bytes: RoleBytes) -> list[tuple[str, int]]:
    return [(PART_NAMES[field.name], getattr(num_bytes, field.name)) for field in fields(num_bytes)]


def _memory_table(plan: Plan) -> Iterator[str]:
    rows = [["GiB a rank, at the fullest", *(stages_of(each) for each in plan.roles)]]
    columns = [_parts(each.memory.num_bytes) for each in plan.roles]
    for index, (name, _) in enumerate(columns[0]):
        rows.append([f"  {name}", *(f"{column[index][1] / GIB:.2f}" for column in columns)])
    rows.append(["  all", *(f"{each.memory.num_bytes.total / GIB:.2f}" for each in plan.roles)])
    rows.append(["  fullest in the", *(each.memory.moment for each in plan.roles)])
    rows.append(["  layers, with experts", *(f"{r.role.num_layers}, {len(r.role.moe_experts)}" for r in plan.roles)])
    return aligned(rows)


def _time_table(plan: Plan) -> Iterator[str]:
    step = plan.step
    yield (
        f"step {step.seconds:.3f} s, {step.tokens_per_second_per_gpu:,.0f} tokens/s/GPU, model FLOP/s utilisation "
        f"{100 * step.model_flops_utilisation:.1f} % ({100 * step.hardware_flops_utilisation:.1f} % with recompute)"
    )
    rows = [["seconds of a step, slowest stage", "s", "%"]]
    for name, seconds in sorted(step.by_kind.items(), key=lambda item: -item[1]):
        if seconds > 0.0:
            rows.append([f"  {name}", f"{seconds:.4f}", f"{100 * seconds / step.seconds:.1f}"])
    yield from aligned(rows)
    if step.hidden_seconds:
        yield f"  {step.hidden_seconds:.4f} s of sending run beside computation"


def _link_table(plan: Plan) -> Iterator[str]:
    volumes: Counter[tuple[str, str, str]] = Counter()
    counts: Counter[tuple[str, str, str]] = Counter()
    for each in plan.worst.collectives:
        key = (each.group, each.kind, each.purpose)
        volumes[key] += each.total_bytes
        counts[key] += each.count
    rows = [[f"sent in a step by a rank of {stages_of(plan.worst)}", "group", "kind", "calls", "MB"]]
    for key, volume in volumes.most_common():
        group, kind, purpose = key
        rows.append([f"  {purpose}", group, kind, f"{counts[key]:,}", f"{volume / 1e6:,.1f}"])
    return aligned(rows)


def _life(plan: Plan) -> Iterator[str]:
    life = plan.lifetime
    yield (
        f"{life.tokens:,} tokens in {life.num_steps:,} steps: {life.days_without_failures:.2f} days, "
        f"{life.days:.2f} with failures; {life.gpu_hours:,.0f} GPU-hours"
    )
    yield (
        f"checkpoint {life.checkpoint_bytes / 1e9:,.1f} GB, {life.checkpoint_seconds:,.0f} s to write; "
        f"{life.failures_expected:.1f} failures expected, {100 * life.lost_share:.1f} % of the time lost to them and "
        f"to saves, best saved every {life.save_interval_steps:,} steps"
    )


def _assumption_table(plan: Plan) -> Iterator[str]:
    yield "assumed:"
    for each in assumptions(plan.cluster):
        value = f"{each.value:,.6g}" if isinstance(each.value, int | float) else str(each.value)
        yield f"  {each.name} = {value} ({each.source})"


def aligned(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """First column to the left, the others to the right unless they are words."""
    rows = [list(row) for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        yield "  ".join(cells).rstrip()

"""Where the time of a training step goes: one rank's operators, in kinds, and the longest of them.

One of N local ranks is profiled (torch.profiler); the others train beside it. Each operator counts with the time
spent in it alone, so the shares add up to the whole step. A backward operator belongs where its forward one was
called. What no operator accounts for is Python between operators: Megatron's schedule and modules, DeepSpeed's
engine, ours. The profiler slows Python most: the step without it is printed beside, and the shares of overhead are
upper bounds. On a GPU this shows the host's time, not the kernels'.

    python tools/benchmarks/profile_step.py                                  # laptop-moe, one rank
    python tools/benchmarks/profile_step.py --preset quickstart --ranks 8    # the quickstart's layout
    python tools/benchmarks/profile_step.py --ranks 2 --threads 1 parallel.expert_parallel_size=2
"""

import argparse
import functools
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from local_runs import RandomSamples, configuration, device, layout_name, machine, run_on_ranks, take_steps
from torch.profiler import ProfilerActivity, profile, record_function

from megamoe.config.schema import Config
from megamoe.errors import MegamoeError

MATMUL = "matrix products (dense, experts, output)"
ATTENTION = "attention core"
ELEMENTWISE = "norms, elementwise, embedding"
LOSS = "cross entropy of the output"
MOE = "MoE routing and dispatch"
COLLECTIVE = "collectives, with waiting for other ranks"
OPTIMIZER = "optimizer (AdamW)"
GRADIENTS = "gradients: ZeRO's copies, norm, clipping"
AUTOGRAD = "autograd: engine, nodes, accumulation of gradients"
PYTHON = "Python between operators (Megatron, DeepSpeed, ours)"
KINDS = (MATMUL, ATTENTION, ELEMENTWISE, LOSS, MOE, COLLECTIVE, OPTIMIZER, GRADIENTS, AUTOGRAD, PYTHON)
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm"}
RANGE = "megamoe/"  # what our own ranges begin with: "megamoe/KIND"
STEP = f"{RANGE}step"


# ---------------------------------------------------------------- on a rank


def measure(config: Config, num_steps: int, num_threads: int, profiled_rank: int) -> dict[str, Any]:
    """On a rank: seconds of a plain step, and on one rank of a profiled one by kind and operator. Collective."""
    from megamoe.training.build import build_trainer

    torch.set_num_threads(num_threads)
    trainer = build_trainer(config, device())
    samples = RandomSamples(config)
    take_steps(trainer, samples, 2)  # first steps allocate
    seconds = []
    for _ in range(num_steps):
        started = time.perf_counter()
        take_steps(trainer, samples, 1)
        seconds.append(time.perf_counter() - started)
    result: dict[str, Any] = {"step_seconds": statistics.median(seconds)}
    if torch.distributed.get_rank() == profiled_rank:
        mark_ranges(trainer)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(num_steps):
                with record_function(STEP):
                    take_steps(trainer, samples, 1)
        result |= summarize(profiler.events(), num_steps)
    else:
        take_steps(trainer, samples, num_steps)
    torch.distributed.barrier()
    trainer.close()
    return result


def mark_ranges(trainer: Any) -> None:
    """Name the parts of a step that operators alone do not tell apart."""
    from megamoe.model.attention import CausalAttention
    from megamoe.moe.experts import StackedExperts
    from megamoe.moe.layer import MoELayer

    kinds = {CausalAttention: ATTENTION, MoELayer: MOE, StackedExperts: ELEMENTWISE}
    for chunk in trainer.chunks:
        chunk.compute_language_model_loss = ranged(LOSS, chunk.compute_language_model_loss)
        for module in chunk.modules():
            if type(module) in kinds:
                module.forward = ranged(kinds[type(module)], module.forward)
    trainer.engine.apply_gradients = ranged(GRADIENTS, trainer.engine.apply_gradients)
    torch.distributed.Work.wait = ranged(COLLECTIVE, torch.distributed.Work.wait)


def ranged(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def within(*arguments: Any, **named: Any) -> Any:
        with record_function(RANGE + kind):
            return function(*arguments, **named)

    return within


# ---------------------------------------------------------------- from events to a table


def summarize(events: Iterable[Any], num_steps: int) -> dict[str, Any]:
    """Seconds a step: of the whole, by kind, and by operator with its kind, calls and share."""
    inside = [event for event in events if root_of(event).name == STEP]
    forward = {}  # sequence number -> the forward operator that autograd's node stands for
    for event in inside:
        if event.sequence_nr >= 0 and backward_root(event) is None:
            forward.setdefault(event.sequence_nr, event)
    by_kind, by_operator = defaultdict(float), defaultdict(lambda: [0.0, 0])
    for event in inside:
        kind = kind_of(event, forward)
        seconds = event.self_cpu_time_total / 1e6 / num_steps
        by_kind[kind] += seconds
        operator = by_operator[operator_name(event.name), kind]
        operator[0] += seconds
        operator[1] += 1
    longest = sorted(by_operator.items(), key=lambda item: -item[1][0])
    return {
        "profiled_seconds": sum(by_kind.values()),
        "by_kind": by_kind,
        "operators": [(name, kind, took, calls / num_steps) for (name, kind), (took, calls) in longest],
    }


def operator_name(name: str) -> str:
    """How the table calls an operator; our own ranges stand for what happens in them outside operators."""
    if name == RANGE + COLLECTIVE:
        return "(waiting)"
    if name.startswith(RANGE):
        return f"(Python in: {name.removeprefix(RANGE)})"
    return name.removeprefix("autograd::engine::evaluate_function: ").removeprefix("aten::")


def root_of(event: Any) -> Any:
    while event.cpu_parent is not None:
        event = event.cpu_parent
    return event


def backward_root(event: Any) -> Any | None:
    """The autograd node whose evaluation this event is part of."""
    while event is not None and not event.name.startswith("autograd::engine::evaluate_function"):
        event = event.cpu_parent
    return event


def kind_of(event: Any, forward: dict[int, Any]) -> str:
    """An operator's kind: by its name where that tells, else by where it was called from."""
    name = event.name
    if name.startswith(("c10d::", "gloo:", "nccl:")) or name == RANGE + COLLECTIVE:
        return COLLECTIVE
    place = place_of(event, forward)
    if place in (ATTENTION, OPTIMIZER, COLLECTIVE):
        return place
    if name in PRODUCTS:
        return MATMUL
    if name == STEP or name.startswith((RANGE, "record_param_comms")):
        return PYTHON
    if not name.startswith("aten::") or any(parent.name.endswith("AccumulateGrad") for parent in ancestors(event)):
        return AUTOGRAD  # the engine, its nodes, and functions written in Python
    return place or ELEMENTWISE


def place_of(event: Any, forward: dict[int, Any]) -> str | None:
    """The innermost of our ranges around the event, or around the forward operator it is the backward of."""
    for parent in (event, *ancestors(event)):
        if parent.name.startswith("Optimizer.step#"):
            return OPTIMIZER
        if parent.name.startswith(RANGE) and parent.name != STEP:
            return parent.name.removeprefix(RANGE)
    node = backward_root(event)
    origin = forward.get(node.sequence_nr) if node is not None else None
    return place_of(origin, forward) if origin is not None else None


def ancestors(event: Any) -> Iterable[Any]:
    while (event := event.cpu_parent) is not None:
        yield event


# ---------------------------------------------------------------- printing


def show(result: dict[str, Any], num_operators: int) -> str:
    """Two tables: kinds, and the operators that took longest."""
    whole = result["profiled_seconds"]
    lines = [
        f"step {result['step_seconds'] * 1e3:.1f} ms (median, without profiler), {whole * 1e3:.1f} ms with it",
        "",
        f"{'kind':<54} {'ms a step':>10} {'share':>7}",
    ]
    for kind in sorted(KINDS, key=lambda kind: -result["by_kind"].get(kind, 0.0)):
        seconds = result["by_kind"].get(kind, 0.0)
        lines.append(f"{kind:<54} {seconds * 1e3:>10.2f} {seconds / whole:>7.1%}")
    lines += ["", f"{'operator':<54} {'ms a step':>10} {'share':>7} {'calls':>7}  kind"]
    for name, kind, seconds, calls in result["operators"][:num_operators]:
        lines.append(f"{name[:54]:<54} {seconds * 1e3:>10.2f} {seconds / whole:>7.1%} {calls:>7.0f}  {kind}")
    return "\n".join(lines)


def main() -> int:
    """Run the benchmark; 0, or 2 after printing what the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--preset", default="laptop-moe", help="preset or YAML file (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=1, help="ranks on this machine (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=0, help="the rank that is profiled (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="torch threads of a rank (default: cores / ranks, at least 1)")
    parser.add_argument("--steps", type=int, default=3, help="steps with the profiler (default: %(default)s)")
    parser.add_argument("--top", type=int, default=12, help="operators to list (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    arguments = parser.parse_args()
    num_threads = arguments.threads or max(1, (os.cpu_count() or 1) // arguments.ranks)
    try:
        config = configuration(arguments.preset, *arguments.overrides)
        batch = f"global batch {config.run.global_batch_size} x {config.model.seq_length} tokens"
        print(f"{arguments.preset}, {layout_name(config, arguments.ranks)}, {config.run.precision}, {batch},")
        print(f"{num_threads} threads a rank. {machine()}", flush=True)
        if not 0 <= arguments.rank < arguments.ranks:
            raise MegamoeError(f"--rank {arguments.rank} is not below --ranks {arguments.ranks}")
        results = run_on_ranks(
            "profile_step", "measure", config, arguments.ranks,
            num_steps=arguments.steps, num_threads=num_threads, profiled_rank=arguments.rank,
        )  # fmt: skip
        print(f"rank {arguments.rank}: {show(results[arguments.rank], arguments.top)}")
    except MegamoeError as error:
        print(f"profile_step: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

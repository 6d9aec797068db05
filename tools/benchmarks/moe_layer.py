"""Speed and memory of one MoE layer, forward and backward, megamoe against its floor and against other layers.

All contestants share one process, the same tokens, weights and router, and take turns; who starts changes from round
to round, so that a machine that slows down hurts all alike. Ratios are medians over the rounds of one round's ratio.
Steps beside which other processes computed are repeated while --patience lasts; "others" is what they took of the
cores during the steps that count. Above a few percent believe the column of best times, or neither; there,
`--threads 1 --clock cpu` still compares. All contestants run on huge pages, in a process that keeps large blocks that
it frees, as ranks of `megamoe train` do (without: THP_MEM_ALLOC_ENABLE=0 MALLOC_MMAP_MAX_=65536 in the environment).

    python tools/benchmarks/moe_layer.py                                    # everything; bf16 takes long on a CPU
    python tools/benchmarks/moe_layer.py --dtypes fp32 --shapes 4096,64,512,1024,2 --sections speed
    python tools/benchmarks/moe_layer.py --gradients accumulate             # as in a step of many micro-batches

The floor is the six matrix products of the experts on tokens already sorted, without activation: the faster of one
batched product per matrix on perfectly even tokens, and of one product per expert on the actual rows with results and
gradients written in place. Sections: speed (with the share of routing), skew (Zipf over experts), memory.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import moe_layer_competitors as competitors
import moe_layer_measures as measures
import torch
from moe_layer_competitors import CannotRun, Contestant, Problem, Shape, demand, impose_load, make_problem
from moe_layer_measures import Patience, Row, compare, timed

from megamoe.host_memory import keep_freed_memory

SHAPES = ("4096,8,512,2048,2", "4096,64,512,1024,2", "8192,512,256,512,2", "4096,64,512,512,8")
QUICK_SHAPES = ("256,8,32,64,2", "256,64,32,32,8")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Build = Callable[[], Contestant]


@dataclass
class Finding:
    """One figure held against a goal of the issue."""

    goal: str
    dtype: str
    where: str
    value: float
    limit: float
    at_most: bool = True

    @property
    def met(self) -> bool:
        return self.value <= self.limit if self.at_most else self.value >= self.limit


@dataclass
class Report:
    """What is printed at the end and written as JSON."""

    findings: list[Finding] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)

    def find(self, *args: Any, **kwargs: Any) -> None:
        self.findings.append(Finding(*args, **kwargs))


# ---------------------------------------------------------------- the race


def build_all(builds: dict[str, Build], accumulate: bool) -> tuple[dict[str, Contestant], dict[str, Row]]:
    """The contestants that can be built; those that cannot have a row that says why."""
    built, rows = {}, {}
    for name, build in builds.items():
        rows[name] = Row(name)
        try:
            built[name] = build()
        except CannotRun as reason:
            rows[name].note = f"cannot run: {reason}"
        except Exception as error:  # any failure of another library is a result of this benchmark
            if name.startswith(("ours", "floor")):
                raise
            rows[name].note = f"cannot run: {type(error).__name__}: {str(error).splitlines()[0][:90]}"
            continue
        else:
            built[name].accumulates = accumulate
            rows[name].note = built[name].note
    return built, rows


def race(builds: dict[str, Build], options: argparse.Namespace) -> dict[str, Row]:
    """First steps (compared with the first contestant of the same mode, not timed), then alternating rounds.

    A contestant whose rounds took `options.seconds` rests; one whose first step took that long keeps that one figure.
    """
    built, rows = build_all(builds, options.gradients == "accumulate")
    reference: dict[str, dict[str, torch.Tensor]] = {}
    running = []
    for name, contestant in built.items():
        try:
            seconds, others, out = timed(contestant, options.clock)
            if contestant.results is not None:
                mode = "capacity" if "capacity" in name else "dropless"
                results = contestant.results(out)
                compare(rows[name], results, reference.setdefault(mode, results))
        except Exception as error:
            if name.startswith(("ours", "floor")):
                raise
            rows[name].note = f"cannot run: {type(error).__name__}: {str(error).splitlines()[0][:90]}"
            continue
        finally:
            contestant.clean()
        if seconds > options.seconds:
            rows[name].seconds, rows[name].others = [seconds], [others]
            rows[name].note = f"{contestant.note}; first step only".lstrip("; ")
        else:
            running.append(name)
    reference.clear()
    gc.collect()
    patience = Patience(options.patience, options.clock)
    for turn in range(options.rounds):
        order = running[turn % len(running) :] + running[: turn % len(running)]
        for name in order:
            if sum(rows[name].seconds) < options.seconds:
                seconds, others = patience.undisturbed(built[name])
                rows[name].seconds.append(seconds)
                rows[name].others.append(others)
    return rows


# ---------------------------------------------------------------- sections


def speed_builds(problem: Problem, options: argparse.Namespace) -> dict[str, Build]:
    """Contestants of the speed table of one family."""
    modes = ("dropless",) if problem.gated else ("dropless", "capacity")
    accumulate = {"accumulate": options.gradients == "accumulate"}
    builds: dict[str, Build] = {}
    for mode in modes:
        dropless = {"dropless": mode == "dropless"}
        builds[f"ours, {mode}"] = partial(competitors.ours, problem, **dropless)
        for activation in (False, True):
            name = f"floor: per expert{' + activation' if activation else ''}, {mode}"
            builds[name] = partial(measures.floor_per_expert, problem, **dropless, **accumulate, activation=activation)
        builds[f"floor: batched, {mode}"] = partial(measures.floor_batched, problem, **dropless, **accumulate)
        builds[f"ours, {mode}, without experts"] = partial(measures.without_experts, problem, **dropless)
        if not problem.gated:
            builds[f"deepspeed, {mode}"] = partial(competitors.deepspeed, problem, **dropless)
    if problem.gated:
        for name in ("eager", "grouped_mm", "batched_mm"):
            builds[f"transformers, {name}"] = partial(competitors.hugging_face, problem, implementation=name)
        builds["megatron, sequential"] = partial(competitors.megatron, problem)
    else:
        builds["tutel, capacity"] = partial(competitors.tutel, problem)
    mine = ("ours", "floor")
    return {name: b for name, b in builds.items() if name.startswith(mine) or name.split(",")[0] in options.competitors}


def speed(problem: Problem, dtype: str, options: argparse.Namespace, report: Report) -> None:
    """The main table, and its figures for the goals."""
    shape = problem.shape
    rows = race(speed_builds(problem, options), options)
    where = f"{shape} {problem.family}"
    for mode in ("dropless", "capacity"):
        mine = rows.get(f"ours, {mode}")
        if mine is None:
            continue
        floors = (rows[f"floor: per expert, {mode}"], rows[f"floor: batched, {mode}"])
        floor = min(floors, key=lambda row: row.milliseconds)
        floor.note = f"{floor.note}; THE floor".lstrip("; ")
        limit = 1.15 if shape.experts >= 512 else 1.10
        report.find(f"ours / floor, E={shape.experts}", dtype, f"{where} {mode}", mine.ratio(floor), limit)
        share = rows[f"ours, {mode}, without experts"].ratio(mine)
        if shape.experts == 64:
            report.find("router + dispatch + combine, share at E=64", dtype, f"{where} {mode}", share, 0.15)
        for row in rows.values():
            theirs = "capacity" if "capacity" in row.name else "dropless"
            if row.name.startswith(("ours", "floor")) or not row.seconds or mode != theirs:
                continue
            goal, against = "faster than every competitor: theirs / ours", f"{where} {row.name}"
            report.find(goal, dtype, against, row.ratio(mine), 1.0, at_most=False)
            if row.name.startswith("deepspeed") and shape.experts == 512:
                report.find("DeepSpeed / ours, E=512", dtype, f"{where} {row.name}", row.ratio(mine), 2.2,
                            at_most=False)  # fmt: skip
    load = demand(problem).float()
    title = f"{where} {dtype}: fullest expert {load.max() / load.mean():.2f} x the mean"
    print_race(title, rows, report)


def print_race(title: str, rows: dict[str, Row], report: Report) -> None:
    """Times, ratios to the floor of the same mode and to ours, agreement with ours."""
    print(f"\n{title}\n{'':<41}{'ms':>9} {'ms':>9} others {'/ floor':>8} {'/ ours':>7} {'tokens':>7} {'grads':>6}")
    print(f"{'':<41}{'median':>9} {'best':>9}{'':>25}{'differ':>7} {'differ':>6}  remarks")
    records = []
    for row in rows.values():
        record = {"name": row.name, "note": row.note, "seconds": row.seconds, "others": row.others}
        records.append(record)
        if not row.seconds:
            print(f"{row.name:<41}{'-':>9}{'':>50}{row.note}")
            continue
        mode = "capacity" if "capacity" in row.name and "ours, capacity" in rows else "dropless"
        floors = [r for r in rows.values() if "THE floor" in r.note and mode in r.name]
        record |= {
            "over_floor": row.ratio(floors[0]) if floors else None, "over_ours": row.ratio(rows[f"ours, {mode}"]),
            "differing_tokens": row.differing_tokens, "gradient_difference": row.gradient_difference,
        }  # fmt: skip
        print(
            f"{row.name:<41}{row.milliseconds:>9.1f} {row.best_milliseconds:>9.1f} "
            f"{statistics.median(row.others):>6.0%} {number(record['over_floor'], '8.2f')} "
            f"{record['over_ours']:>7.2f} {number(row.differing_tokens, '7.2%')} "
            f"{number(row.gradient_difference, '6.0e')}  {row.note}"
        )
    report.tables.append({"title": title, "rows": records})
    sys.stdout.flush()


def number(value: float | None, form: str) -> str:
    """`value` in `form`, or blanks of the same width."""
    return format(value, form) if value is not None else " " * int(form.split(".")[0])


def skew(shape: Shape, dtype: str, options: argparse.Namespace, report: Report) -> None:
    """Zipf over experts against an even load: ours dropless, and layers that pad."""
    builds: dict[str, Build] = {}
    loads = {}
    for load in ("even", "zipf"):
        problem = make_problem(shape, DTYPES[dtype], gated=False)
        impose_load(problem, zipf=load == "zipf")
        counts = demand(problem).float()
        loads[load] = (counts.max() / counts.mean()).item()
        builds[f"ours, dropless, {load}"] = partial(competitors.ours, problem, dropless=True)
        if "deepspeed" in options.competitors:
            for mode in ("dropless", "capacity"):
                builds[f"deepspeed, {mode}, {load}"] = partial(
                    competitors.deepspeed, problem, dropless=mode == "dropless"
                )
    rows = race(dict(sorted(builds.items(), reverse=True)), options)
    print(f"\n{shape} {dtype}, Zipf over experts: fullest {loads['zipf']:.1f} x the mean, even {loads['even']:.2f}")
    print(f"{'':<39}{'even ms':>9} {'Zipf ms':>9} {'Zipf / even':>12}  remarks")
    records = []
    for name in ("ours, dropless", "deepspeed, dropless", "deepspeed, capacity"):
        if f"{name}, even" not in rows:
            continue
        even, zipf = rows[f"{name}, even"], rows[f"{name}, zipf"]
        both = bool(even.seconds and zipf.seconds)
        ratio = zipf.ratio(even) if both else None
        cells = [number(r.milliseconds if r.seconds else None, "9.1f") for r in (even, zipf)]
        note = "drops what overflows" if "capacity" in name else zipf.note
        print(f"{name:<39}{cells[0]} {cells[1]} {number(ratio, '12.2f')}  {note}", flush=True)
        records.append({"name": name, "zipf_over_even": ratio, "note": note,
                        "ms": [r.milliseconds if r.seconds else None for r in (even, zipf)]})  # fmt: skip
    report.tables.append({"title": f"skew {shape} {dtype}", "rows": records})
    mine = rows["ours, dropless, zipf"].ratio(rows["ours, dropless, even"])
    report.find("dropless: Zipf / even load", dtype, str(shape), mine, 1.3)


def memory(shape: Shape, dtype: str, options: argparse.Namespace, report: Report) -> None:
    """Peak of a step beyond weights and their gradients, over dispatched tokens + expert activations."""
    print(f"\n{shape} {dtype}: peak extra memory of a step over (dispatched tokens + expert activations)")
    records = []
    for gated in (False, True):
        problem = make_problem(shape, DTYPES[dtype], gated=gated)
        builds = {name: build for name, build in speed_builds(problem, options).items()
                  if "floor" not in name and "without" not in name and "batched_mm" not in name}  # fmt: skip
        for name, build in builds.items():
            needed = measures.activation_bytes(problem, dropless="capacity" not in name)
            try:
                peak = measures.peak_bytes(build())
            except Exception as error:
                if name.startswith("ours"):
                    raise
                print(f"{name:<39}cannot run: {str(error).splitlines()[0][:80]}")
                continue
            print(f"{name + ', ' + problem.family:<39}{peak / 2**20:>9.1f} MiB {peak / needed:>6.2f} x", flush=True)
            records.append({"name": name, "family": problem.family, "peak_bytes": peak, "over_needed": peak / needed})
            if name.startswith("ours"):
                report.find("peak extra memory / activations", dtype, f"{shape} {name} {problem.family}",
                            peak / needed, 1.3)  # fmt: skip
            gc.collect()
    report.tables.append({"title": f"memory {shape} {dtype}", "rows": records})


def largest(report: Report) -> None:
    """No tensor of tokens x experts x capacity."""
    for mode in ("dropless", "capacity"):
        elements, product, where = measures.largest_tensor(dropless=mode == "dropless")
        print(f"\nprobe, {mode}: largest tensor {elements:,} elements ({where}), S*E*C {product:,}")
        report.find("largest tensor / S*E*C", "fp32", f"probe {mode}", elements / product, 0.5)


def print_verdicts(report: Report) -> None:
    """For each goal and dtype the worst figure."""
    print(f"\n{'goal':<44}{'dtype':>6}{'limit':>8}{'worst':>8}  {'verdict':<16}where")
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in report.findings:
        groups.setdefault((finding.goal, finding.dtype), []).append(finding)
    for (goal, dtype), found in sorted(groups.items()):
        worst = (max if found[0].at_most else min)(found, key=lambda f: f.value)
        met = sum(f.met for f in found)
        verdict = "met" if met == len(found) else f"MISSED {len(found) - met} of {len(found)}"
        limit = f"{'<=' if worst.at_most else '>='} {worst.limit:.2f}"
        print(f"{goal:<44}{dtype:>6}{limit:>8}{worst.value:>8.2f}  {verdict:<16}{worst.where}")
    print("bytes through all-to-all with EP 4: not measured here, this is one process")


# ---------------------------------------------------------------- command line


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    names = ("deepspeed", "transformers", "megatron", "tutel")
    parser.add_argument("--shapes", nargs="+", default=None, metavar="S,E,d,ffn,k", help=f"default: {' '.join(SHAPES)}")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=tuple(DTYPES))
    parser.add_argument("--competitors", nargs="*", choices=names, default=names)
    sections = ("speed", "skew", "memory")
    parser.add_argument("--sections", nargs="+", choices=sections, default=sections)
    parser.add_argument("--families", nargs="+", choices=("gelu", "swiglu"), default=("gelu", "swiglu"))
    parser.add_argument("--gradients", choices=("fresh", "accumulate"), default="fresh")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each contestant (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="most time for one contestant's rounds of a table")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds per table for steps to be repeated")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall",
                        help="cpu: this process's own time; with --threads 1 it holds on a busy machine")  # fmt: skip
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, 2 rounds, fp32, 1 thread: does it run?")
    arguments = parser.parse_args()
    arguments.shapes = [
        Shape(*map(int, text.split(","))) for text in arguments.shapes or (QUICK_SHAPES if arguments.quick else SHAPES)
    ]
    if arguments.quick:
        # One thread: tiny products on several wait for each other for milliseconds where the machine is busy.
        arguments.rounds, arguments.dtypes, arguments.threads, arguments.patience = 2, ("fp32",), 1, 0.0
    return arguments


def main() -> int:
    """Run the benchmark; 0, also where goals are missed."""
    options = parse_arguments()
    keep_freed_memory()  # as every rank does, before the first tensor
    warnings.filterwarnings("ignore")
    competitors.join_world()
    torch.set_num_threads(options.threads)  # an engine may have changed it
    print(
        f"torch {torch.__version__}, {options.threads} threads, {options.clock} time, load average "
        f"{os.getloadavg()[0]:.1f}, gradients {options.gradients}, up to {options.rounds} rounds"
    )
    report = Report()
    for dtype in options.dtypes:
        for shape in options.shapes:
            if "speed" in options.sections:
                for family in options.families:
                    speed(make_problem(shape, DTYPES[dtype], gated=family == "swiglu"), dtype, options, report)
            if "skew" in options.sections:
                skew(shape, dtype, options, report)
            if "memory" in options.sections:
                memory(shape, dtype, options, report)
    if "memory" in options.sections:
        largest(report)
    print_verdicts(report)
    print(f"load average {os.getloadavg()[0]:.1f}")
    if options.json:
        findings = [{**vars(f), "met": f.met} for f in report.findings]
        options.json.write_text(json.dumps({"findings": findings, "tables": report.tables}, indent=1))
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())

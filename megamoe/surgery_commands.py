"""`megamoe experts upcycle | prune | merge | resize` and `megamoe average`: arguments, output and exit codes. No torch.

Exit codes: 0 done, 2 usage, a model it does not fit, a damaged checkpoint. JSON goes to stdout, progress to stderr.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamoe.progress import ByteProgress

if TYPE_CHECKING:
    from megamoe.surgery.recipes import Plan
    from megamoe.surgery.sources import Sources

_PATH_HELP = "a checkpoint's folder, or a run's: then its newest checkpoint"
_OUT_HELP = "the folder of the new run; it must not exist"
_LOAD_HELP = 'tokens of each expert: a run, or a JSON file {"layer": [counts]}, layers counted from 0'
_BY_HELP = "what makes experts alike: their router rows (default) or all their weights"
_NOISE_HELP = "standard deviation of noise on {}, relative to what it is added to (default 0)"


def add_surgery_commands(commands: Any) -> None:
    """Add `experts` with its four commands, and `average`, to the subparsers of `megamoe`."""
    summary = "make, drop, merge and copy the experts of a checkpoint"
    parser = commands.add_parser("experts", help=summary, description=f"{summary.capitalize()}. See docs/surgery.md.")
    inner = parser.add_subparsers(metavar="COMMAND", required=True)

    upcycle = _add(inner, "upcycle", _upcycle, "turn a dense model into a mixture of experts")
    _add_experts(upcycle, required=True)
    upcycle.add_argument(
        "--granularity", type=int, default=1, metavar="G", help="split each FFN into G experts (default 1)"
    )
    _add_noise(upcycle, "every expert")

    prune = _add(inner, "prune", _prune, "keep the busiest experts of each layer")
    _add_experts(prune, required=True)
    prune.add_argument("--load", type=Path, required=True, metavar="FILE", help=_LOAD_HELP)

    merge = _add(inner, "merge", _merge, "average experts that are alike, or that you name")
    how = merge.add_mutually_exclusive_group(required=True)
    _add_experts(how, required=False)
    how.add_argument("--groups", type=Path, metavar="FILE", help='JSON {"layer": [[0, 3], [1], ...]}: what to average')
    _add_by(merge)
    merge.add_argument("--load", type=Path, metavar="FILE", help=f"weights of the averages; {_LOAD_HELP}")

    resize = _add(inner, "resize", _resize, "change the number of experts: copies make more, --shrink says how less")
    _add_experts(resize, required=True)
    resize.add_argument("--shrink", choices=("prune", "merge"), default="prune", help="how layers shrink")
    _add_by(resize)
    resize.add_argument("--load", type=Path, metavar="FILE", help=_LOAD_HELP)
    _add_noise(resize, "copies but the first")

    summary = "average checkpoints of one model"
    average = commands.add_parser("average", help=summary, description=f"{summary.capitalize()}. See docs/surgery.md.")
    average.add_argument("paths", metavar="PATH", nargs="+", type=Path, help=_PATH_HELP)
    average.add_argument("out", metavar="OUT", type=Path, help=_OUT_HELP)
    average.add_argument("--weights", type=_numbers(float), metavar="W,W,...", help="one for each (default: all equal)")
    average.add_argument("--json", action="store_true", help="print one JSON object")
    average.add_argument("--text", type=Path, metavar="FILE", help="compare the loss on this text, before and after")
    average.set_defaults(command=_average, parser=average)


def _add(commands: Any, name: str, run: Callable[[argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=f"{summary.capitalize()}.")
    parser.add_argument("path", metavar="PATH", type=Path, help=_PATH_HELP)
    parser.add_argument("out", metavar="OUT", type=Path, help=_OUT_HELP)
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="moe.* and parallel.* of the new run")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--text", type=Path, metavar="FILE", help="compare the loss on this text, before and after")
    parser.set_defaults(command=run, parser=parser)
    return parser


def _add_experts(parser: Any, *, required: bool) -> None:
    more = {"required": True} if required else {}
    parser.add_argument(
        "--experts", type=_numbers(int), metavar="N[,N,...]",
        help="experts of each MoE layer, or of one after the other, lowest first", **more,
    )  # fmt: skip


def _add_by(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--by", choices=("router", "weights"), default="router", help=_BY_HELP)


def _add_noise(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--noise", type=float, default=0.0, metavar="R", help=_NOISE_HELP.format(what))
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of all that is drawn (default 1)")


def _numbers(kind: type) -> Callable[[str], Any]:
    """ "4" -> (4,), "4,8" -> (4, 8)."""

    def parse(text: str) -> tuple[Any, ...]:
        try:
            return tuple(kind(word) for word in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f'"{text}" is no list of numbers, as in 4,8') from None

    return parse


def _counts(options: argparse.Namespace) -> int | tuple[int, ...]:
    """One number is for all layers."""
    return options.experts[0] if len(options.experts) == 1 else options.experts


def _loads(options: argparse.Namespace, sources: "Sources") -> dict[int, list[float]] | None:
    from megamoe.surgery.counts import old_counts
    from megamoe.surgery.loads import read_loads

    return None if options.load is None else read_loads(options.load, old_counts(sources))


def _upcycle(options: argparse.Namespace) -> int:
    from megamoe.surgery.upcycle import plan_upcycle

    return _operate(
        options, [options.path],
        lambda sources: plan_upcycle(
            sources, _counts(options), granularity=options.granularity, noise=options.noise, seed=options.seed,
            settings=options.overrides,
        ),
    )  # fmt: skip


def _prune(options: argparse.Namespace) -> int:
    from megamoe.surgery.prune import plan_prune

    return _operate(
        options, [options.path],
        lambda sources: plan_prune(sources, _counts(options), _loads(options, sources), settings=options.overrides),
    )  # fmt: skip


def _merge(options: argparse.Namespace) -> int:
    from megamoe.surgery.counts import old_counts
    from megamoe.surgery.loads import read_layers
    from megamoe.surgery.merge import alike_groups, plan_merge

    def plan(sources: "Sources") -> "Plan":
        if options.groups is not None:
            groups = read_layers(options.groups, old_counts(sources))
        else:
            groups = alike_groups(sources, _counts(options), options.by)
        return plan_merge(sources, groups, loads=_loads(options, sources), settings=options.overrides)

    return _operate(options, [options.path], plan)


def _resize(options: argparse.Namespace) -> int:
    from megamoe.surgery.resize import plan_resize

    return _operate(
        options, [options.path],
        lambda sources: plan_resize(
            sources, _counts(options), shrink=options.shrink, by=options.by, loads=_loads(options, sources),
            noise=options.noise, seed=options.seed, settings=options.overrides,
        ),
    )  # fmt: skip


def _average(options: argparse.Namespace) -> int:
    from megamoe.surgery.average import plan_average

    return _operate(options, options.paths, lambda sources: plan_average(sources, options.weights))


def _operate(options: argparse.Namespace, paths: Sequence[Path], plan_of: Callable[["Sources"], "Plan"]) -> int:
    """Plan, carry out, tell."""
    from megamoe.checkpoint.folders import resolve_checkpoint
    from megamoe.surgery.execute import apply
    from megamoe.surgery.sources import Sources

    with Sources([resolve_checkpoint(path) for path in paths]) as sources:
        plan = plan_of(sources)
        progress = ByteProgress("writing", plan.num_bytes)
        try:
            result = apply(sources, plan, options.out, progress=progress.add, check_loss=_check_loss(options))
        finally:
            progress.finish()
    if options.json:
        print(json.dumps(dataclasses.asdict(result), indent=2))
        return 0
    print(f"{result.operation}: {', '.join(result.sources)} -> {result.folder}, {result.num_bytes:,} bytes")
    print(f"parameters        {result.num_parameters_before:,} -> {result.num_parameters:,}")
    print(f"active per token  {result.num_active_parameters_before:,} -> {result.num_active_parameters:,}")
    print(f"preserved         {result.preserves}")
    if result.loss is not None:
        before = ", ".join(f"{loss:.4f}" for loss in result.losses_before)
        print(f"loss on the text  {before} -> {result.loss:.4f} nats a token, drops off")
    for note in result.notes:
        print(f"note              {note}")
    print(
        f"go on with        megamoe train {result.folder}/config.yaml checkpoint.load_from={result.folder} run.dir=..."
    )
    return 0


def _check_loss(options: argparse.Namespace) -> Callable[[Path], float] | None:
    if options.text is None:
        return None
    from megamoe.verification.text_loss import text_loss

    return lambda checkpoint: text_loss(checkpoint, options.text)

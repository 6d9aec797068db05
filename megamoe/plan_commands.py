"""`megamoe plan` and `megamoe dry-run`: arguments, output, exit codes. No torch, but where ranks are played.

Exit codes: 0 it fits (of --search: some layout does) and is as planned, 1 it is not, 2 usage, or sizes that do not go
together.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamoe.arguments import add_config_arguments, positive
from megamoe.errors import ConfigError

if TYPE_CHECKING:
    from megamoe.config.schema import Config
    from megamoe.plan.cluster import Cluster
    from megamoe.plan.quantities import Load

_CLUSTER_HELP = "a shipped cluster's name, a YAML file, or `cpu`: this machine, measured now"


def add_plan_commands(commands: Any) -> None:
    """Add `plan` and `dry-run` to the subcommands of `megamoe`."""
    plan = commands.add_parser(
        "plan",
        help="memory, communication and time of a configuration on a cluster",
        description="Plan memory, communication and time of a configuration on a cluster, or search its best layout.",
        epilog="examples:\n"
        "  megamoe plan moe-1.1t --cluster a100-80gb --gpus 512 parallel.expert_parallel_size=512\n"
        "  megamoe plan moe-1.1t --cluster a100-80gb --gpus 512 --search",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_arguments(plan, _plan)
    plan.add_argument("--cluster", required=True, metavar="NAME|FILE", help=_CLUSTER_HELP)
    plan.add_argument("--tokens", type=float, metavar="N", help="the budget; default: what run.num_steps takes")
    plan.add_argument("--search", action="store_true", help="try all layouts on these GPUs and rank those that fit")
    plan.add_argument("--html", type=Path, metavar="FILE", help="write a page with pictures, too")
    plan.add_argument("--no-assumptions", action="store_true", help="leave the list of assumptions out")
    dry_run = commands.add_parser(
        "dry-run",
        help="play every role of a job without memory, and hold it to its plan",
        description="Build the real model, groups and optimizer of every role of a job without memory, run the shapes "
        "of one step, and compare bytes and collectives with the plan.",
        epilog="example:\n  megamoe dry-run launch_scripts/layouts/moe-1.1t.yaml --gpus 512 --cluster a100-80gb",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_arguments(dry_run, _dry_run)
    dry_run.add_argument("--cluster", metavar="NAME|FILE", help=f"{_CLUSTER_HELP}: whose memory must hold every role")
    dry_run.add_argument(
        "--shapes-only", action="store_true", help="leave out the two real steps of the job folded down to CPU ranks"
    )
    dry_run.add_argument(
        "--ranks", type=positive, default=8, metavar="N", help="for those, at most (default: %(default)s)"
    )


def _add_arguments(parser: argparse.ArgumentParser, run: Any) -> None:
    parser.set_defaults(command=run, parser=parser)
    add_config_arguments(parser)
    parser.add_argument("--gpus", type=positive, metavar="N", help="default: the fewest that the layout folds")
    parser.add_argument(
        "--imbalance", type=_imbalance, default=1.0, metavar="X",
        help="rows on the fullest expert rank over the mean (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _imbalance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f'"{text}" is not a number of at least 1: the mean is the least')
    return value


def _plan(options: argparse.Namespace) -> int:
    from megamoe.config.loading import load_config
    from megamoe.plan.plan import fewest_ranks, make_plan
    from megamoe.plan.quantities import Load
    from megamoe.plan.remedies import remedies
    from megamoe.plan.report import text_report, tree_report

    config = load_config(options.source, options.overrides)
    world_size, load = options.gpus or fewest_ranks(config.parallel), Load(options.imbalance)
    cluster = _cluster(options.cluster, world_size)
    if options.search:
        if options.html is not None or options.tokens is not None:
            options.parser.error("--html and --tokens are of one plan, not of a search")
        return _search(options, config, cluster, world_size, load)
    num_tokens = None if options.tokens is None else int(options.tokens)
    plan = make_plan(config, cluster, world_size, load, num_tokens=num_tokens)
    found = remedies(plan)
    if options.html is not None:
        from megamoe.plan.picture import html_report

        _write(options.html, html_report(plan, found, f"{options.source} on {world_size} x {cluster.name}"))
    if options.json:
        print(json.dumps(tree_report(plan, found), indent=2))
    else:
        print(text_report(plan, found, with_assumptions=not options.no_assumptions), end="")
    return 0 if plan.fits else 1


def _search(
    options: argparse.Namespace, config: "Config", cluster: "Cluster", world_size: int, load: "Load"
) -> int:
    from megamoe.plan.search import search
    from megamoe.plan.search_report import search_text, search_tree
    from megamoe.progress import StatusLine

    status = StatusLine(sys.stderr)
    try:
        found = search(config, cluster, world_size, load, progress=lambda text: status.is_due and status.show(text))
    finally:
        status.end()
    if options.json:
        print(json.dumps(search_tree(found), indent=2))
    else:
        print(search_text(found), end="")
    return 0 if found.best else 1


def _cluster(name: str, world_size: int) -> "Cluster":
    """A shipped one, a file, or `cpu`: this machine, measured now."""
    if name == "cpu":
        from megamoe.dry_run.this_machine import measure_cpu

        return measure_cpu(world_size)
    from megamoe.plan.cluster import load_cluster

    return load_cluster(name)


def _dry_run(options: argparse.Namespace) -> int:
    from megamoe.config.loading import load_config
    from megamoe.config.validation import validate
    from megamoe.plan.plan import fewest_ranks
    from megamoe.plan.quantities import Load
    from megamoe.progress import StatusLine

    config = load_config(options.source, options.overrides)
    world_size = options.gpus or fewest_ranks(config.parallel)
    validate(config, world_size)
    cluster = None if options.cluster is None else _cluster(options.cluster, world_size)
    _without_gpus()
    from megamoe.dry_run.folding import fold_down
    from megamoe.dry_run.rehearsal import rehearse
    from megamoe.dry_run.report import check_job, check_text, check_tree

    folded = None if options.shapes_only else fold_down(config, options.ranks)
    status = StatusLine(sys.stderr)
    try:
        checks = check_job(config, world_size, Load(options.imbalance), cluster, status.show)
        if folded is not None:
            status.show(f"two steps on {folded.world_size} ranks of this machine")
        rehearsal = None if folded is None else rehearse(folded)
    finally:
        status.end()
    if options.json:
        print(json.dumps(check_tree(checks, world_size, rehearsal), indent=2))
    else:
        print(check_text(checks, world_size, rehearsal), end="")
    return 0 if all(check.is_good for check in checks) else 1


def _without_gpus() -> None:
    """Roles are played on no device; an engine that finds a GPU would use it."""
    from megamoe.launch.devices import hide_gpus

    hide_gpus(os.environ)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror})") from None

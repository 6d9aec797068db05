"""`megamoe preflight`: one process a rank, started as training is. No torch is imported before the checks begin.

Exit codes: 0 all nodes are good, 5 some are not, 2 usage.
"""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamoe.arguments import positive
from megamoe.errors import ConfigError, MegamoeError, PreflightFailed

if TYPE_CHECKING:
    from megamoe.config.schema import Config


def add_preflight_commands(commands: Any) -> None:
    """Add `preflight` to the subcommands of `megamoe`."""
    parser = commands.add_parser(
        "preflight",
        help="measure the nodes of a job and name the bad ones",
        description="Measure the nodes of a job and name the bad ones: folders, disk, memory, data, GPUs, clocks, "
        "versions, rate of products, and the network between neighbours.",
        epilog="examples:\n"
        "  megamoe preflight my_run.yaml --local-ranks 2\n"
        "  srun --ntasks-per-node 8 megamoe preflight my_run.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=_preflight, parser=parser)
    source_help = "the run's preset or YAML file; without one only the machines are looked at"
    parser.add_argument("source", metavar="CONFIG|PRESET", nargs="?", help=source_help)
    parser.add_argument(
        "overrides", metavar="section.key=value", nargs="*", help="settings that win over it; values are YAML"
    )
    parser.add_argument("--run-dir", metavar="DIR", help="where the results go; default: run.dir of the configuration")
    parser.add_argument("--local-ranks", type=positive, metavar="N", help="start N ranks on this machine")


def _preflight(options: argparse.Namespace) -> int:
    from megamoe.launch.environment import rank_environment
    from megamoe.runs.attempts import current_attempt

    environment = rank_environment()
    try:
        config = _config(options)
    except MegamoeError as error:
        if environment.local_rank == 0:  # one of each node: a file may be wrong on one of them alone
            raise
        return error.exit_code
    run_dir = options.run_dir or (config.run.dir if config is not None else None)
    num_local_ranks = options.local_ranks or environment.local_world_size
    payload = {
        "config": None if config is None else config.model_dump(mode="json"),
        "run_dir": run_dir,
        "attempt": current_attempt(run_dir) if run_dir is not None else 0,
        "device_problem": _choose_device(
            "auto" if config is None else config.run.device, num_local_ranks,
            one_gpu_each=environment.source == "srun" and not options.local_ranks,
        ),
    }  # fmt: skip
    if options.local_ranks:
        from megamoe.launch.local import run_local

        return run_local(
            "megamoe.preflight.run:run_rank", payload, num_ranks=options.local_ranks, preload=("megamoe.preflight.run",)
        ).exit_code  # which has printed why, if it failed
    from megamoe.preflight.run import FirstRankUnreachable, run_rank

    try:
        run_rank(payload)
    except PreflightFailed as error:
        if environment.rank == 0 or (isinstance(error, FirstRankUnreachable) and environment.local_rank == 0):
            raise
        return error.exit_code  # every rank knows the same: one says it
    return 0


def _config(options: argparse.Namespace) -> "Config | None":
    from megamoe.config.loading import load_config
    from megamoe.config.validation import validate

    if options.source is None:
        return None
    config = load_config(options.source, options.overrides)
    if options.run_dir is not None:
        run = config.run.model_copy(update={"dir": str(Path(options.run_dir))})
        config = config.model_copy(update={"run": run})
    validate(config)
    return config


def _choose_device(setting: Any, num_local_ranks: int, *, one_gpu_each: bool) -> str | None:
    """Settle on GPUs or CPU as training does; returns why a node has not what was asked for."""
    from megamoe.launch.devices import choose_device, hide_gpus

    try:
        if choose_device(setting, num_local_ranks, os.environ, one_gpu_each=one_gpu_each) == "cuda":
            return None
    except ConfigError as error:
        hide_gpus(os.environ)
        return str(error)
    hide_gpus(os.environ)
    return None

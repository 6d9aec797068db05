"""From a configuration to trained steps: what `train` and `finetune` have in common. No torch before a rank runs."""

import argparse
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from megamoe.arguments import positive
from megamoe.attempt_commands import train_again
from megamoe.errors import MegamoeError

if TYPE_CHECKING:
    from megamoe.config.schema import Config
    from megamoe.launch.environment import RankEnvironment

# After a rank's death the others hear from the watchdog within two seconds who it was, on a busy machine later.
GRACE_SECONDS = 6.0


def add_start_arguments(parser: argparse.ArgumentParser) -> None:
    """Ranks and restarts; the command's exit code is left for a batch script."""
    parser.add_argument(
        "--local-ranks",
        type=positive,
        metavar="N",
        help="start N ranks on this machine; without it this process is the only rank, or one of torchrun's or srun's",
    )
    parser.add_argument(
        "--restarts", type=positive, metavar="K", help="with --local-ranks: start them again after failures, K times"
    )
    parser.set_defaults(leaves_exit_code=True)


def _completed_steps(config: "Config") -> tuple[int, bool]:
    """Steps that a resumed run has behind it, and whether it stopped early; read before any rank is started."""
    from megamoe.runs.run_folder import resumable_manifest
    from megamoe.training.best import BestValidation
    from megamoe.training.checkpoint_state import check_same_model

    found = resumable_manifest(config.run.dir) if config.checkpoint.resume else None
    if found is None:
        return 0, False
    folder, manifest = found
    check_same_model(manifest.config, config, folder, with_optimizer=True)
    best = BestValidation(config.finetune)
    best.restore(manifest.state.get("best_validation"))
    return manifest.state["step"], best.has_stopped


def start_training(options: argparse.Namespace, load: Callable[["RankEnvironment"], "Config"]) -> int:
    """Train the configuration that `load` gives, as the arguments of `add_start_arguments` say; returns the exit code.

    `load` is called on every rank that is a process of its own. Raises MegamoeError for what the user must mend.
    """
    from megamoe.config.validation import validate_for_training
    from megamoe.launch.devices import settle_device
    from megamoe.launch.environment import rank_environment
    from megamoe.launch.refusal import refused

    environment = rank_environment()
    num_ranks = options.local_ranks or environment.world_size
    try:
        config = load(environment)
        validate_for_training(config, num_ranks)
        done, has_stopped = _completed_steps(config)
        settle_device(config.run.device, environment, options.local_ranks, os.environ)
    except MegamoeError as error:
        return refused(error, environment)
    if done >= config.run.num_steps or has_stopped:
        if environment.rank == 0:
            why = ", where it stopped early" if has_stopped else ""
            print(f"{config.run.dir} is complete: step {done} of {config.run.num_steps}{why}. Nothing to do.")
        return 0
    if options.restarts:
        if not options.local_ranks:
            options.parser.error("--restarts is for --local-ranks: a job's script restarts other ranks")
        once = argparse.Namespace(**vars(options) | {"restarts": None})
        return train_again(lambda: start_training(once, load), config.run.dir, options.restarts)
    payload = {"config": config.model_dump(mode="json")}
    if options.local_ranks:
        return _train_here(config, payload, options.local_ranks)
    from megamoe.host_memory import keep_freed_memory

    keep_freed_memory()
    from megamoe.training.main import run_rank

    run_rank(payload)
    return 0


def _train_here(config: "Config", payload: Mapping[str, Any], num_ranks: int) -> int:
    """Start so many ranks on this machine, and record how they ended."""
    from megamoe.launch.local import run_local
    from megamoe.runs.attempts import current_attempt
    from megamoe.runs.failures import conclude

    attempt = current_attempt(config.run.dir)
    result = run_local(
        "megamoe.training.main:run_rank",
        {**payload, "attempt": attempt},
        num_ranks=num_ranks,
        preload=("megamoe.training.main",),
        timeout_seconds=None,
        grace_seconds=GRACE_SECONDS,
        stop_seconds=config.parallel.timeout_seconds + config.checkpoint.save_timeout_seconds,
    )  # which has printed why, if it failed
    if (failure := result.failure) is not None:
        conclude(
            config.run.dir, attempt, kind=failure.kind, rank=failure.rank, message=failure.message,
            exit_code=failure.exit_code, num_ranks=num_ranks,
        )  # fmt: skip
    return result.exit_code

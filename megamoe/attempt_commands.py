"""`megamoe before-attempt` and `megamoe after-attempt`: what a batch script asks around a launch. No torch."""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megamoe.errors import ConfigError, TrainingInterrupted

if TYPE_CHECKING:
    from megamoe.runs.restarts import Verdict

# How a launch on this machine ends when somebody asks it to.
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_ENDED_BY_WISH = (TrainingInterrupted.exit_code, *(128 + number for number in _STOP_SIGNALS))


def add_attempt_commands(commands: Any) -> None:
    """Add both to the subcommands of `megamoe`."""
    before = _add(
        commands,
        "before-attempt",
        _before,
        "number and record an attempt to train a run; for batch scripts",
        "example:\n  export MEGAMOE_ATTEMPT=$(megamoe before-attempt runs/first) || exit",
    )
    before.add_argument("run_dir", metavar="RUN_DIR", help="the run's folder; made where it is missing")
    after = _add(
        commands,
        "after-attempt",
        _after,
        "record how an attempt ended and say whether another one follows; for batch scripts",
        "prints one line, `requeue`, `requeue exclude=HOST,HOST` or `stop REASON`\n\n"
        "example:\n  megamoe after-attempt runs/first --exit-code $?",
    )
    after.add_argument("run_dir", metavar="RUN_DIR", help="the run's folder")
    after.add_argument("--exit-code", type=_exit_code, required=True, metavar="N", help="of training, or of preflight")


def _add(commands: Any, name: str, run: Any, summary: str, epilog: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=summary, description=f"{summary.capitalize()}.", epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(command=run, parser=parser)
    return parser


def _exit_code(text: str) -> int:
    if not text.isdecimal() or int(text) > 255:
        raise argparse.ArgumentTypeError(f'"{text}" is no exit code: give a whole number of 0 to 255')
    return int(text)


def _before(options: argparse.Namespace) -> int:
    print(_start(options.run_dir))
    return 0


def _start(run_dir: str) -> int:
    """The number of the attempt that begins."""
    from megamoe.runs.restarts import start_attempt

    try:
        return start_attempt(run_dir, os.environ).attempt
    except OSError as error:
        raise ConfigError(
            f"no attempt can be recorded in {run_dir} ({error.strerror or error}): make it a folder that can be written"
        ) from None


def _after(options: argparse.Namespace) -> int:
    print(_finish(options.run_dir, options.exit_code).line)
    return 0


def _finish(run_dir: str, exit_code: int) -> "Verdict":
    """Where nothing can be recorded nothing can be counted, so there is no further attempt."""
    from megamoe.runs.restarts import Verdict, finish_attempt

    try:
        return finish_attempt(run_dir, exit_code, os.environ)
    except OSError as error:
        return Verdict("stop", f"the attempt cannot be recorded in {run_dir} ({error.strerror or error})")


def train_again(train: Callable[[], int], run_dir: str, max_restarts: int) -> int:
    """Call `train`, whose result is an exit code, again where it failed and a batch script would be told to; at most
    `max_restarts` times more. What a signal to the launcher ended is not started again. Returns the last exit code.
    """
    from megamoe.runs.attempts import ATTEMPT_VARIABLE

    for left in range(max_restarts, -1, -1):
        os.environ[ATTEMPT_VARIABLE] = str(_start(run_dir))
        exit_code = train()
        verdict = _finish(run_dir, exit_code)
        if verdict.decision == "stop" or exit_code in _ENDED_BY_WISH or not left:
            break
        print(f"megamoe: ended by {verdict.reason}: starting again, {left} more at most", file=sys.stderr, flush=True)
    return exit_code

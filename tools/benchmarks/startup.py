"""Seconds from a command to what the user waits for: the first training step on 8 local ranks, help, presets, show.

Trains the quickstart's model and layout on a dataset of bytes that it makes in a temporary folder, through the command
itself; the clock runs from the start of the process to the line of step 1. Every round also times
`python -c "import torch, deepspeed"`, which no training command can undercut: the ratio to it tells a slow machine
from a slow launcher.

    python tools/benchmarks/startup.py
    python tools/benchmarks/startup.py --ranks 4 --repeats 3 parallel.pipeline_parallel_size=1

Prints medians, the goals, and the ratios.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megamoe.data.indexed import IndexedWriter
from megamoe.errors import MegamoeError

FIRST_STEP_GOAL_SECONDS = 20.0
QUICK_GOAL_SECONDS = 1.0
TIMEOUT_SECONDS = 300.0
NUM_TOKENS = 200_000
BYTE_VOCABULARY = 260  # ids of the byte tokenizer
QUICK = (["--help"], ["presets"], ["show", "moe-1.1t"])
TRAIN = (
    "model.vocab_size=260", "data.tokenizer.kind=byte", "run.num_steps=2", "optimizer.warmup_steps=0",
    "monitor.log_interval_steps=1", "run.num_eval_batches=0", "checkpoint.save_at_end=false",
)  # fmt: skip


def megamoe_command() -> list[str]:
    """The console script of this environment, else the module."""
    script = Path(sys.executable).with_name("megamoe")
    return [str(script)] if script.exists() else [sys.executable, "-m", "megamoe"]


def wall_seconds(command: Sequence[str]) -> float:
    """From the start of a command to its end. Raises MegamoeError if it fails."""
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        raise MegamoeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return seconds


def make_dataset(prefix: Path) -> None:
    """A dataset of random bytes."""
    with IndexedWriter(prefix, BYTE_VOCABULARY) as writer:
        ids = np.random.default_rng(0).integers(4, BYTE_VOCABULARY, NUM_TOKENS).astype(writer.dtype)
        writer.add_documents(ids, np.array([len(ids)]))


def first_step_seconds(folder: Path, num_ranks: int, overrides: Sequence[str]) -> float:
    """From the start of `megamoe train` to the printed line of step 1. Raises MegamoeError if there is none."""
    make_dataset(folder / "bytes")
    command = [
        *megamoe_command(), "train", "quickstart", "--local-ranks", str(num_ranks), *TRAIN,
        f"data.train=[{{path: {folder / 'bytes'}}}]", f"run.dir={folder / 'run'}", *overrides,
    ]  # fmt: skip
    seconds, said = None, []
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            said.append(line)
            if seconds is None and line.startswith("step 1/"):
                seconds = time.perf_counter() - started
    if seconds is None or process.returncode != 0:
        raise MegamoeError(f"{' '.join(command)} failed:\n{''.join(said)}")
    return seconds


def report(name: str, seconds: Sequence[float], goal: float | None, reference: float) -> None:
    median = statistics.median(seconds)
    verdict = "" if goal is None else f"   goal {goal:>4.0f}   {'met' if median <= goal else 'MISSED'}"
    spread = f"({min(seconds):.2f} to {max(seconds):.2f})"
    print(f"{name:<36} {median:>6.2f} s {spread:<18} {median / reference:>5.2f} of the import{verdict}", flush=True)


def main() -> int:
    """Run the benchmark; 0, or 2 after printing what the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--ranks", type=int, default=8, help="local ranks of the run (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="runs to the first step (default: %(default)s)")
    parser.add_argument("--quick-repeats", type=int, default=5, help="of help, presets, show (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", help="section.key=value of the run")
    arguments = parser.parse_args()
    plain = [sys.executable, "-c", "import torch, deepspeed"]
    try:
        wall_seconds(plain)  # the first one reads files from disk
        imports, runs = [], []
        for _ in range(arguments.repeats):
            imports.append(wall_seconds(plain))
            with tempfile.TemporaryDirectory() as folder:
                runs.append(first_step_seconds(Path(folder), arguments.ranks, arguments.overrides))
        reference = statistics.median(imports)
        print(f"{os.cpu_count()} cores; medians, in brackets the spread")
        report('python -c "import torch, deepspeed"', imports, None, reference)
        report(f"train --local-ranks {arguments.ranks}, to step 1", runs, FIRST_STEP_GOAL_SECONDS, reference)
        for words in QUICK:
            command = [*megamoe_command(), *words]
            wall_seconds(command)
            seconds = [wall_seconds(command) for _ in range(arguments.quick_repeats)]
            report(f"megamoe {' '.join(words)}", seconds, QUICK_GOAL_SECONDS, reference)
    except MegamoeError as error:
        print(f"startup: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Speed of multiple choice where what the choices share is computed once, against each choice scored whole.

Both sides score the same texts by the same model on one rank, with as many texts in a micro-batch. They take turns, and
who goes first changes from pair to pair, so that a machine that slows down or speeds up hurts both alike.

    python tools/benchmarks/priming.py                                        # laptop-moe, one step old
    python tools/benchmarks/priming.py --prefix 48 --ending 16 --pairs 9

Prints the ratio of times of every pair, their median, and by how much the two sides' log-probabilities differ.
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

from megamoe.inference.worker import forward_model  # first: it quietens the engines, which others import

# isort: split
import numpy as np
import torch

from megamoe.checkpoint.folders import resolve_checkpoint
from megamoe.data.indexed import IndexedWriter
from megamoe.errors import MegamoeError
from megamoe.inference.model import ForwardModel
from megamoe.inference.rows import TokenRows
from megamoe.inference.settings import forward_config
from megamoe.priming.batching import Family, family_of
from megamoe.priming.encoding import Scored
from megamoe.priming.scoring import log_probabilities

GOAL = 2.0
TIMEOUT_SECONDS = 300.0
SETTINGS = (
    "run.num_steps=1", "run.micro_batch_size=1", "run.global_batch_size=1", "optimizer.warmup_steps=0",
    "run.num_eval_batches=0", "monitor.wandb_mode=disabled",
)  # fmt: skip


def train_once(folder: Path, preset: str, overrides: Sequence[str]) -> Path:
    """A run of one step on random tokens, for a checkpoint of that shape. Raises MegamoeError if it fails."""
    with IndexedWriter(folder / "random", 256) as writer:
        ids = np.random.default_rng(0).integers(0, 256, 50_000).astype(writer.dtype)
        writer.add_documents(ids, np.array([len(ids)]))
    command = [
        sys.executable, "-m", "megamoe", "train", preset, *SETTINGS, f"run.dir={folder / 'run'}",
        f"data.train=[{{path: {folder / 'random'}}}]", *overrides,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    if done.returncode:
        raise MegamoeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return folder / "run"


def make_families(options: argparse.Namespace) -> list[Family]:
    """Random tokens: a common beginning and so many endings of it."""
    draw = np.random.default_rng(1)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.integers(0, 256, count).tolist())

    made = []
    for _ in range(options.examples):
        prefix = tokens(options.prefix)
        texts = [prefix + tokens(options.ending) for _ in range(options.choices)]
        made.append(family_of([Scored(text, len(prefix), len(text)) for text in texts]))
    return made


def score_whole(model: ForwardModel, families: Sequence[Family], num_texts: int) -> list[list[float]]:
    """Each text by itself, `num_texts` in a micro-batch; all are of one length."""
    texts = [text for family in families for text in family.texts]
    sums: list[float] = []
    for start in range(0, len(texts), num_texts):
        batch = texts[start : start + num_texts]
        ids = torch.tensor([text.tokens for text in batch])
        first = batch[0].start
        kept = torch.arange(first - 1, ids.shape[1] - 1).expand(len(batch), -1)
        (losses,) = model.losses([TokenRows(ids[:, :-1], ids[:, first:], kept)])
        sums += (-losses.double().sum(1)).tolist()
    width = len(families[0].texts)
    return [sums[start : start + width] for start in range(0, len(sums), width)]


def race(model: ForwardModel, families: Sequence[Family], options: argparse.Namespace) -> list[float]:
    """Alternating runs; prints a line and returns a ratio for every pair."""
    sides = {
        "shared": lambda: log_probabilities(model, families, batch_size=options.batch),
        "whole": lambda: score_whole(model, families, options.batch * options.choices),
    }
    results = [np.array(side()) for side in sides.values()]  # the first runs allocate, and do not count
    print(f"largest difference of log-probabilities: {np.abs(results[0] - results[1]).max():.1e} nats")
    ratios = []
    for pair in range(options.pairs):
        seconds = {}
        for name in list(sides) if pair % 2 == 0 else list(reversed(sides)):
            started = time.perf_counter()
            sides[name]()
            seconds[name] = time.perf_counter() - started
        ratios.append(seconds["whole"] / seconds["shared"])
        print(
            f"pair {pair + 1}: shared {seconds['shared']:.2f} s, whole {seconds['whole']:.2f} s, "
            f"ratio {ratios[-1]:.2f}", flush=True,
        )  # fmt: skip
    return ratios


def main() -> int:
    """Run the benchmark; 0, or 2 after printing what the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--preset", default="laptop-moe", help="preset or YAML file (default: %(default)s)")
    for name, default, what in (
        ("examples", 64, "examples"), ("choices", 4, "choices of each"), ("prefix", 96, "tokens that choices share"),
        ("ending", 8, "tokens of a choice"), ("batch", 8, "examples in a micro-batch"), ("pairs", 5, "pairs of runs"),
        ("threads", os.cpu_count(), "torch threads"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", help="section.key=value of the model")
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = resolve_checkpoint(train_once(Path(folder), options.preset, options.overrides))
            config = forward_config(checkpoint)
            with forward_model(config, checkpoint) as model:
                torch.set_num_threads(options.threads)
                print(
                    f"{options.preset}: {options.choices} choices of {options.ending} tokens after {options.prefix} "
                    f"shared ones, {options.batch} examples a micro-batch, {options.threads} threads"
                )
                ratios = race(model, make_families(options), options)
    except MegamoeError as error:
        print(f"priming: {error}", file=sys.stderr)
        return error.exit_code
    median = statistics.median(ratios)
    print(f"median ratio whole / shared: {median:.2f}, goal {GOAL:.0f}: {'met' if median >= GOAL else 'MISSED'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

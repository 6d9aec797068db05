"""Tokens per second that one process scores: `megamoe evaluate`'s scoring against transformers on the exported model.

A model of random weights is written as a Hugging Face folder and imported, so that both sides have the same weights.
They score the same batches of random tokens and must find the same losses; then they take turns in one process, and
who goes first changes from pair to pair. Theirs is `model(ids).logits` and torch's cross entropy by token, under
`torch.inference_mode`, with the attention that transformers chooses.

    python tools/benchmarks/evaluate.py                                # the three laptop presets
    python tools/benchmarks/evaluate.py laptop-moe --pairs 9 --threads 1 run.micro_batch_size=2
    python tools/benchmarks/evaluate.py laptop-moe --profile           # where our time goes, by operator

Prints tokens per second of both sides for every pair, and the median ratio.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megamoe.inference.worker import forward_model  # first: it quietens the engines, which others import

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors.numpy import save_file

from megamoe.config.loading import load_config
from megamoe.config.schema import Config
from megamoe.convert.custom_code import custom_files
from megamoe.convert.hf_folders import import_folder
from megamoe.convert.hf_tables import choose_architecture, conversion, to_hf_config
from megamoe.errors import MegamoeError
from megamoe.hf import MegamoeForCausalLM
from megamoe.inference.model import ForwardModel
from megamoe.inference.rows import TokenRows
from megamoe.inference.settings import forward_config

PRESETS = ("laptop-dense", "laptop-moe", "laptop-moe-modern")
FIXED = ("moe.dropless=true", "run.micro_batch_size=4")
LARGEST_DIFFERENCE = 1e-4
Score = Callable[[np.ndarray], np.ndarray]  # ids int64 [micro-batches, b, s + 1] -> nats fp32 [micro-batches, b, s]


@dataclass(frozen=True)
class Side:
    """One of the two competitors."""

    name: str
    score: Score


def write_model(config: Config, folder: Path) -> None:
    """A Hugging Face folder of random weights that nearly predict nothing."""
    their_config = to_hf_config(config, dtype="float32")
    generator = np.random.default_rng(0)
    tensors = {}
    for name, shape in conversion(config, their_config).theirs.items():
        is_norm = "norm" in name and len(shape) == 1 and name.endswith("weight")
        tensors[name] = (0.02 * generator.normal(size=shape) + is_norm).astype(np.float32)
    for duplicate in conversion(config, their_config).duplicates:
        tensors[duplicate.theirs] = tensors[duplicate.original].copy()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(their_config))
    for name, content in custom_files().items():
        (folder / name).write_bytes(content)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def hugging_face_side(config: Config, folder: Path) -> Side:
    """The class that an export of this model gets."""
    architecture, _ = choose_architecture(config)
    kind = MegamoeForCausalLM if architecture == "MegamoeForCausalLM" else getattr(transformers, architecture)
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def score(ids: np.ndarray) -> np.ndarray:
        found = []
        for each in torch.from_numpy(ids):
            logits = model(input_ids=each[:, :-1], use_cache=False).logits
            labels = each[:, 1:]
            found.append(F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none"))
        return torch.stack(found).view(*ids.shape[:2], -1).numpy()

    return Side(architecture, score)


def megamoe_side(model: ForwardModel) -> Side:
    """What `megamoe evaluate` calls for each round."""

    def score(ids: np.ndarray) -> np.ndarray:
        rows = [TokenRows(each[:, :-1], each[:, 1:]) for each in torch.from_numpy(ids)]
        return torch.stack(model.losses(rows)).numpy()

    return Side("megamoe", score)


def race(ours: Side, theirs: Side, ids: np.ndarray, num_pairs: int, clock: Callable[[], float]) -> list[float]:
    """Score the same batches in turns; prints a line and returns a ratio for every pair."""
    ratios = []
    num_tokens = ids[..., 1:].size
    for pair in range(num_pairs):
        speed = {}
        for side in (ours, theirs) if pair % 2 == 0 else (theirs, ours):
            started = clock()
            side.score(ids)
            speed[side.name] = num_tokens / (clock() - started)
        ratios.append(speed[ours.name] / speed[theirs.name])
        print(
            f"  pair {pair + 1}: megamoe {speed[ours.name]:,.0f} tokens/s, {theirs.name} {speed[theirs.name]:,.0f} "
            f"tokens/s, ratio {ratios[-1]:.3f}",
            flush=True,
        )
    return ratios


def compare(preset: str, arguments: argparse.Namespace) -> None:
    """One model: its losses agree, then the race, or our profile."""
    config = load_config(preset, [*FIXED, *arguments.overrides])
    with tempfile.TemporaryDirectory() as scratch:
        write_model(config, Path(scratch) / "hf")
        checkpoint = import_folder(Path(scratch) / "hf", Path(scratch) / "run", keeps_tokenizer=False)
        micro_batch = f"run.micro_batch_size={config.run.micro_batch_size}"
        with forward_model(forward_config(checkpoint, [micro_batch, "run.device=cpu"]), checkpoint) as model:
            torch.set_num_threads(arguments.threads)  # an engine may have changed it
            ours, theirs = megamoe_side(model), hugging_face_side(config, Path(scratch) / "hf")
            shape = (arguments.micro_batches, config.run.micro_batch_size, config.model.seq_length + 1)
            ids = np.random.default_rng(0).integers(0, config.model.vocab_size, shape)
            print(f"{preset}: {shape[0]} micro-batches of {shape[1]} x {shape[2] - 1} tokens, "
                  f"{arguments.threads} threads, torch {torch.__version__}")  # fmt: skip
            difference = np.abs(ours.score(ids) - theirs.score(ids)).max()
            print(f"  largest difference of a token's nats: {difference:.1g}")
            if difference > LARGEST_DIFFERENCE:
                raise MegamoeError("the two sides are not the same function")
            if arguments.profile:
                with torch.profiler.profile() as profile:
                    ours.score(ids)
                print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))
                return
            clock = time.process_time if arguments.processor_time else time.perf_counter
            ratios = race(ours, theirs, ids, arguments.pairs, clock)
            print(f"  median ratio megamoe / {theirs.name}: {statistics.median(ratios):.3f}", flush=True)


def main() -> int:
    """Run the benchmark; 0, or 2 after printing what the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("presets", nargs="*", help=f"presets or YAML files (default: {', '.join(PRESETS)})")
    parser.add_argument("--pairs", type=int, default=7, help="alternating pairs of runs (default: %(default)s)")
    parser.add_argument("--micro-batches", type=int, default=4, help="in one run (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads (default: %(default)s)")
    parser.add_argument(
        "--processor-time", action="store_true",
        help="tokens per second of processor time, of all threads: with --threads 1, for a machine that does much else",
    )  # fmt: skip
    parser.add_argument("--profile", action="store_true", help="no race: where our time goes")
    arguments, rest = parser.parse_known_args()
    named = [*arguments.presets, *rest]
    arguments.overrides = [word for word in named if "=" in word]
    try:
        environment = dict(os.environ)
        for preset in [word for word in named if "=" not in word] or PRESETS:
            compare(preset, arguments)
            for variable in os.environ.keys() - environment.keys():  # of the world that is gone
                del os.environ[variable]
    except MegamoeError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`megamoe evaluate`: arguments, output and exit codes. No torch.

Results go to stdout as a table or as JSON, and with --out to a file that a broken-off evaluation goes on from; progress
goes to stderr.
"""

import argparse
import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamoe.arguments import positive
from megamoe.errors import ConfigError, MegamoeError

if TYPE_CHECKING:
    from megamoe.config.schema import Config
    from megamoe.evaluation.plan import Capacity

_EPILOG = """examples:
  megamoe evaluate runs/first --text some.txt
  megamoe evaluate runs/first --sets sets.yaml --out results.json --local-ranks 4 parallel.expert_parallel_size=4
  megamoe evaluate runs/first --every --sets sets.yaml --out curve.json
  torchrun --nproc-per-node 8 -m megamoe evaluate runs/big --sets sets.yaml --out results.json run.precision=bf16"""


def add_evaluate_commands(commands: Any) -> None:
    """Add `evaluate` to the subparsers of `megamoe`."""
    summary = "score texts: perplexity and bits per byte of a model, by set and domain"
    parser = commands.add_parser(
        "evaluate", help=summary, description=f"{summary.capitalize()}. See docs/evaluate.md.", epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(command=_evaluate, parser=parser)
    parser.add_argument(
        "path", metavar="MODEL", type=Path, help="a checkpoint's folder, a run's (its newest), or a Hugging Face folder"
    )
    parser.add_argument(
        "overrides", metavar="section.key=value", nargs="*",
        help="parallel.…, run.precision, run.device, run.micro_batch_size, data.tokenizer.…",
    )  # fmt: skip
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument("--sets", metavar="FILE", type=Path, help="a YAML file of sets: see docs/evaluate.md")
    texts.add_argument("--text", metavar="FILE", type=Path, help="one .txt or .jsonl file, or one indexed dataset")
    parser.add_argument("--reading", choices=("blocks", "documents"), help="for sets that do not say (default: blocks)")
    parser.add_argument("--context", metavar="N", type=positive, help="tokens (default: the model's sequence length)")
    parser.add_argument("--stride", metavar="N", type=positive, help="tokens between windows (default: half of that)")
    several = parser.add_mutually_exclusive_group()
    several.add_argument("--every", action="store_true", help="every checkpoint of a run")
    several.add_argument("--steps", metavar="N,N,...", type=_steps, help="a run's checkpoints of these steps")
    capacity = parser.add_mutually_exclusive_group()
    capacity.add_argument("--capacity-factor", metavar="F", type=float, help="moe.eval_capacity_factor: drops tokens")
    capacity.add_argument("--capacity-fraction", metavar="F", type=float, help="moe.eval_capacity_fraction: likewise")
    capacity.add_argument("--as-trained", action="store_true", help="with the capacity that training had")
    parser.add_argument("--out", metavar="FILE", type=Path, help="results.json; the same command goes on from it")
    parser.add_argument("--overwrite", action="store_true", help="start anew where FILE holds other results")
    parser.add_argument(
        "--save-interval", metavar="SECONDS", type=float, default=30.0, help="between writes inside a set (default 30)"
    )
    parser.add_argument("--local-ranks", type=positive, metavar="N", help="start N ranks on this machine")
    parser.add_argument("--json", action="store_true", help="print JSON, as in FILE, instead of a table")


class _NothingToDo(Exception):
    """All that was asked for is there."""

    def __init__(self, tree: dict[str, Any]) -> None:
        super().__init__()
        self.tree = tree


def _evaluate(options: argparse.Namespace) -> int:
    from megamoe.evaluation.results import tokens_folder
    from megamoe.evaluation.table import shown
    from megamoe.inference.launching import compute_on_ranks
    from megamoe.launch.environment import rank_environment
    from megamoe.launch.refusal import refused

    environment = rank_environment()  # before a world of one is made of this process
    try:
        with _checkpoints(options) as folders:
            return compute_on_ranks(
                "megamoe.evaluation.worker:run_rank",
                lambda num_ranks: _prepare(options, folders, num_ranks),
                local_ranks=options.local_ranks,
            )
    except _NothingToDo as done:
        if environment.rank == 0:
            shutil.rmtree(tokens_folder(options.out), ignore_errors=True)  # a command that died at its end has left it
            print(shown(done.tree, as_json=options.json))
        return 0
    except MegamoeError as error:
        return refused(error, environment)


@contextlib.contextmanager
def _checkpoints(options: argparse.Namespace) -> Iterator[list[Path]]:
    """What is evaluated, in this order; an imported model is there while this lasts."""
    from megamoe.evaluation.plan import checkpoints_of_run
    from megamoe.inference.sources import model_checkpoint
    from megamoe.inference.tokenizer import names_tokenizer

    if options.every or options.steps is not None:
        yield checkpoints_of_run(options.path, options.steps)
        return
    with model_checkpoint(options.path, keeps_tokenizer=not names_tokenizer(options.overrides)) as newest:
        yield [newest]


def _prepare(
    options: argparse.Namespace, folders: Sequence[Path], num_ranks: int
) -> tuple["Config", Mapping[str, Any]]:
    """The ranks' configuration and their payload. All that can be refused without a rank is refused here."""
    from megamoe.evaluation.corpora import check_sets
    from megamoe.evaluation.plan import header, model_identity, taken_up
    from megamoe.evaluation.results import Results
    from megamoe.evaluation.sets import read_sets, settled_sets, single_text
    from megamoe.inference.settings import forward_config
    from megamoe.inference.tokenizer import names_tokenizer
    from megamoe.launch.devices import choose_device
    from megamoe.launch.environment import rank_environment

    capacity, several = _capacity(options), options.every or options.steps is not None
    config = forward_config(folders[0], [*options.overrides, *capacity.overrides()], num_ranks=num_ranks)
    found = single_text(options.text) if options.sets is None else read_sets(options.sets)
    texts = settled_sets(
        found, seq_length=config.model.seq_length, reading=options.reading, context_tokens=options.context,
        stride_tokens=options.stride,
    )  # fmt: skip
    notes = check_sets(
        texts, tokenizer=config.data.tokenizer, vocab_size=config.model.vocab_size,
        names_tokenizer=names_tokenizer(options.overrides),
    )  # fmt: skip
    environment = rank_environment()
    here = options.local_ranks or environment.local_world_size
    if options.out is None and here < num_ranks and any(text.settings.format != "indexed" for text in texts):
        raise ConfigError("texts are tokenized into files that all nodes must see: say where, with --out")
    one_gpu_each = environment.source == "srun" and not options.local_ranks
    device = choose_device(config.run.device, here, os.environ, one_gpu_each=one_gpu_each)
    models = [model_identity(folder, options.path, config) for folder in folders]
    results = taken_up(
        Results.begin(header(config, num_ranks, texts, capacity, device), models), options.out,
        overwrite=options.overwrite, keeps_others=several,
    )  # fmt: skip
    for note in [*([] if results.is_complete else notes), *results.notes] if environment.rank == 0 else ():
        print(f"megamoe: note: {note}", file=sys.stderr)
    if options.out is not None and environment.rank == 0 and (results.notes or not results.is_complete):
        results.write(options.out)
    if results.is_complete:
        raise _NothingToDo(results.tree)
    return config, {
        "results": results.tree, "out": None if options.out is None else str(options.out), "json": options.json,
        "save_interval_seconds": options.save_interval,
    }  # fmt: skip


def _capacity(options: argparse.Namespace) -> "Capacity":
    from megamoe.evaluation.plan import Capacity

    for override in options.overrides:
        if override.startswith("moe.eval_capacity_"):
            raise ConfigError(
                f"{override.partition('=')[0]} alone would not make experts drop tokens: give --capacity-factor or "
                "--capacity-fraction"
            )
    for name, value in (("factor", options.capacity_factor), ("fraction", options.capacity_fraction)):
        if value is not None and not value > 0:
            raise ConfigError(f"--capacity-{name} {value:g} is not possible: use a number above 0")
    return Capacity(options.capacity_factor, options.capacity_fraction, options.as_trained)


def _steps(text: str) -> list[int]:
    """ "100,200" -> [100, 200]."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f'"{text}" is no list of steps, as in 100,200') from None

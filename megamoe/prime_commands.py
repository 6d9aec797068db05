"""`megamoe prime`: tasks of multiple choice, zero- and few-shot. No torch before there is something to compute.

Exit codes: 0 done, 2 usage, a task or data that is not as it should be. Results go to stdout, progress to stderr.
"""

import argparse
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamoe.arguments import positive
from megamoe.errors import ConfigError, MegamoeError

if TYPE_CHECKING:
    from megamoe.config.schema import Config
    from megamoe.priming.settings import LocatedTask, PrimingSettings

_DEFAULTS = ("run.micro_batch_size=8",)  # examples that are computed together


def add_prime_commands(commands: Any) -> None:
    """Add `prime` to the subcommands of `megamoe`."""
    summary = "score a model on tasks of multiple choice, zero- and few-shot"
    parser = commands.add_parser(
        "prime", help=summary, description=f"{summary.capitalize()}. See docs/priming.md.",
        epilog="examples:\n"
        "  megamoe prime runs/mine --task my_task.yaml --shots 0,4 --out results.json\n"
        "  megamoe prime runs/mine --task hellaswag --task piqa --data downloads --local-ranks 8 "
        "parallel.expert_parallel_size=8",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(command=_prime, parser=parser)
    model_help = "a checkpoint's folder, a run's (its newest checkpoint), or a Hugging Face folder"
    parser.add_argument("model", metavar="CHECKPOINT|RUN|HF_FOLDER", type=Path, help=model_help)
    parser.add_argument(
        "overrides", metavar="section.key=value", nargs="*",
        help="parallel.…, run.precision, run.micro_batch_size (examples at once, default 8), data.tokenizer.…",
    )  # fmt: skip
    task_help = (
        "a task's YAML file, or hellaswag, openbookqa, piqa, record, storycloze, winogrande; may be repeated"
    )
    parser.add_argument("--task", metavar="TASK", action="append", required=True, dest="tasks", help=task_help)
    parser.add_argument(
        "--data", metavar="FOLDER", type=Path, help="where the tasks' data lies; default: beside the YAML file"
    )
    parser.add_argument("--shots", default="0", metavar="N,N", help="examples shown before each one (default 0)")
    parser.add_argument("--draws", type=positive, default=25, help="random draws of shots to average (default 25)")
    parser.add_argument("--seed", type=int, default=1, help="of the draws (default 1)")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N examples of each task")
    parser.add_argument(
        "--newlines", choices=("end_of_document", "as_is"), help="what a newline becomes; default: what the task says"
    )
    parser.add_argument(
        "--no-document-start", action="store_true", help="no end-of-document id before a text, whatever the task says"
    )
    long_help = "prompts longer than the model's context; drop-shots (default): shots go, and without any it is refused"
    parser.add_argument("--too-long", choices=("drop-shots", "cut", "refuse"), default="drop-shots", help=long_help)
    out_help = "write the result as JSON; passes that are done lie beside it, and a rerun goes on from them"
    parser.add_argument("--out", metavar="FILE", type=Path, help=out_help)
    parser.add_argument("--samples", metavar="FILE", type=Path, help="write each example's scores as JSON Lines")
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of a table")
    lm_eval_help = "compute nothing: write the tasks for lm_eval into a new folder"
    parser.add_argument("--write-lm-eval", metavar="FOLDER", type=Path, help=lm_eval_help)
    parser.add_argument("--scratch", metavar="FOLDER", type=Path, help="room for the import of a Hugging Face folder")
    parser.add_argument("--local-ranks", type=positive, metavar="N", help="start N ranks on this machine")


def _prime(options: argparse.Namespace) -> int:
    from megamoe.inference.launching import compute_on_ranks
    from megamoe.launch.environment import rank_environment
    from megamoe.launch.refusal import refused
    from megamoe.priming.prompts import check
    from megamoe.priming.results import check_outputs, model_identity

    if options.write_lm_eval is not None:
        return _write_lm_eval(options)

    def prepare(num_ranks: int) -> "tuple[Config, dict[str, Any]]":
        settings = _settings(options)
        config = _config(checkpoint, options, num_ranks)
        check_outputs(options.out, options.samples)
        check(settings, config)
        paths = {name: _absolute(getattr(options, name)) for name in ("out", "samples")}
        return config, paths | {
            "checkpoint": str(checkpoint.resolve()), "source": str(options.model), "model": model_identity(checkpoint),
            "settings": settings.to_tree(), "json": options.json, "num_ranks": num_ranks,
        }  # fmt: skip

    environment = rank_environment()  # before a world of one is made of this process
    try:
        with _model(options) as checkpoint:
            return compute_on_ranks("megamoe.priming.worker:run_rank", prepare, local_ranks=options.local_ranks)
    except MegamoeError as error:
        return refused(error, environment)


def _model(options: argparse.Namespace) -> AbstractContextManager[Path]:
    from megamoe.inference.sources import model_checkpoint
    from megamoe.inference.tokenizer import names_tokenizer

    return model_checkpoint(
        options.model, scratch=options.scratch, keeps_tokenizer=not names_tokenizer(options.overrides)
    )


def _write_lm_eval(options: argparse.Namespace) -> int:
    from megamoe.priming.lm_eval_tasks import write_lm_eval_tasks

    settings = _settings(options)
    with _model(options) as checkpoint:
        config = _config(checkpoint, options, 1)
        for name in write_lm_eval_tasks(settings, config, options.write_lm_eval):
            print(name)
    print(f"written to {options.write_lm_eval}; its README.txt has the command", file=sys.stderr)
    return 0


def _settings(options: argparse.Namespace) -> "PrimingSettings":
    from megamoe.priming.settings import PrimingSettings, parse_shots

    try:
        shots = parse_shots(options.shots)
    except ValueError as error:
        raise ConfigError(f"--shots: {error}") from None
    return PrimingSettings(
        tuple(_located(source, options) for source in options.tasks), shots, options.draws, options.seed,
        options.too_long, options.limit,
    )  # fmt: skip


def _located(source: str, options: argparse.Namespace) -> "LocatedTask":
    from megamoe.priming.settings import LocatedTask
    from megamoe.priming.tasks import load_task

    task, folder = load_task(source, options.data)
    changes = {} if options.newlines is None else {"newlines": options.newlines}
    if options.no_document_start:
        changes["document_start"] = False
    return LocatedTask(task.model_copy(update=changes), folder.resolve())


def _config(checkpoint: Path, options: argparse.Namespace, num_ranks: int) -> "Config":
    """Raises ConfigError, and DataError where the tokenizer is missing or has more ids than the model."""
    from megamoe.data.tokenizers import tokenizer_of_model
    from megamoe.inference.settings import forward_config
    from megamoe.inference.tokenizer import notes_of_tokenizer
    from megamoe.launch.environment import rank_environment

    for override in options.overrides:
        if override.startswith("moe.eval_capacity_"):
            raise ConfigError(
                f"{override.partition('=')[0]} has no use here: experts take all tokens, or an example's score would "
                "depend on those beside it"
            )
    config = forward_config(checkpoint, (*_DEFAULTS, *options.overrides), num_ranks=num_ranks)
    tokenizer = tokenizer_of_model(config.data.tokenizer, config.model.vocab_size)
    for note in notes_of_tokenizer(tokenizer, config.model.vocab_size) if rank_environment().rank == 0 else ():
        print(f"megamoe: note: {note}", file=sys.stderr)
    return config


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.resolve())

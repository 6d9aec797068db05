"""`megamoe generate`: arguments and refusals. No torch.

Exit codes: 0 all prompts are continued, 1 a rank failed, 2 refused.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from megamoe.arguments import positive
from megamoe.errors import ConfigError, DataError, MegamoeError, OutputError

_EPILOG = """examples:
  megamoe generate runs/first --prompt 'Once upon a time' --max-new-tokens 60 --temperature 0.8
  megamoe generate runs/first --prompts prompts.jsonl --out texts.jsonl run.micro_batch_size=16
  megamoe generate runs/large --prompts - --local-ranks 4 parallel.tensor_parallel_size=2 run.precision=bf16"""


def add_generate_commands(commands: Any) -> None:
    """Add `generate` to the subcommands of `megamoe`."""
    parser = commands.add_parser(
        "generate",
        help="continue texts with a model",
        description="Continue texts with a checkpoint or a Hugging Face folder, under any layout. Experts take all "
        "tokens: no text depends on the others of its batch.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=_generate, parser=parser)
    parser.add_argument("model", metavar="MODEL", type=Path, help="a checkpoint, a run, or a Hugging Face folder")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="layout, precision, micro-batch size")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", action="append", metavar="TEXT", help="may be repeated")
    given.add_argument("--prompts", metavar="FILE", help='JSON Lines with "prompt" each, or plain lines; - is stdin')
    parser.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="default: 64")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default: the likeliest")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw among the K likeliest; 0: among all")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw among those that make up P")
    parser.add_argument("--seed", type=int, default=0, help="each prompt has its own draws, whatever its batch (0)")
    parser.add_argument("--ignore-end", action="store_true", help="go on after the end of a document")
    parser.add_argument("--out", metavar="FILE", help="write JSON Lines there, each text when it is done")
    parser.add_argument("--json", action="store_true", help="print JSON Lines")
    parser.add_argument("--local-ranks", type=positive, metavar="N", help="start N ranks on this machine")


def _generate(options: argparse.Namespace) -> int:
    from megamoe.inference.launching import compute_on_ranks
    from megamoe.inference.sources import model_checkpoint
    from megamoe.inference.tokenizer import names_tokenizer
    from megamoe.launch.environment import rank_environment
    from megamoe.launch.refusal import refused

    environment = rank_environment()  # before a world of one is made of this process
    try:
        with model_checkpoint(options.model, keeps_tokenizer=not names_tokenizer(options.overrides)) as checkpoint:
            return compute_on_ranks(
                "megamoe.generation.worker:run_rank", lambda num_ranks: _prepare(options, checkpoint, num_ranks),
                local_ranks=options.local_ranks,
            )  # fmt: skip
    except MegamoeError as error:
        return refused(error, environment)


def _prepare(options: argparse.Namespace, checkpoint: Path, num_ranks: int) -> Any:
    from megamoe.data.tokenizers import tokenizer_of_model
    from megamoe.inference.settings import forward_config
    from megamoe.inference.tokenizer import notes_of_tokenizer
    from megamoe.launch.environment import rank_environment

    if options.prompts == "-" and rank_environment().world_size > 1:
        raise ConfigError("--prompts - reads one input, which a launcher's ranks share: put the prompts into a file")
    if options.out is not None and rank_environment().rank == 0:
        _check_writable(Path(options.out), options.prompts)
    texts = _given(options.prompt) if options.prompt else _read(options.prompts)
    config = forward_config(checkpoint, options.overrides, num_ranks=num_ranks)
    tokenizer = tokenizer_of_model(config.data.tokenizer, config.model.vocab_size)
    for note in notes_of_tokenizer(tokenizer, config.model.vocab_size) if rank_environment().rank == 0 else ():
        print(f"megamoe: note: {note}", file=sys.stderr)
    context = config.model.seq_length
    prompts = []
    for where, text in texts:
        ids = tokenizer.encode(text) or [tokenizer.end_of_document_id]
        if len(ids) >= context:
            raise ConfigError(f"{where}: the prompt has {len(ids)} tokens: the model continues up to {context - 1}")
        prompts.append({"text": text, "ids": ids})
    ends = [] if options.ignore_end else [tokenizer.end_of_document_id]
    return config, {
        "checkpoint": str(checkpoint.resolve()), "prompts": prompts, "out": options.out, "json": options.json,
        "limits": {"num_new": options.max_new_tokens, "context": context, "end_ids": ends},
        "sampling": _sampling(options),
    }  # fmt: skip


def _check_writable(out: Path, prompts: str | None) -> None:
    """Before a model is loaded, and without touching what stands there. Raises OutputError."""
    if out.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
        raise OutputError(f"{out} cannot be written: give --out a file in a folder that is there and not read-only")
    if prompts is not None and out.exists() and Path(prompts).exists() and out.samefile(prompts):
        raise OutputError(f"{out} holds the prompts, whose place the texts would take: give --out another file")


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    from megamoe.generation.settings import Sampling

    made = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    return {"temperature": made.temperature, "top_k": made.top_k, "top_p": made.top_p, "seed": made.seed}


def _given(texts: list[str]) -> list[tuple[str, str]]:
    """(where, prompt) of the command line. Raises DataError for one whose bytes are no text."""
    from megamoe.data.json_text import check_text

    named = [(f"--prompt {number}", text) for number, text in enumerate(texts, start=1)]
    for where, text in named:
        check_text(where, "prompt", text)
    return named


def _read(name: str) -> list[tuple[str, str]]:
    """(where, prompt) of each in a file. Raises DataError naming the line that is none."""
    from megamoe.data.json_text import json_object, text_of

    try:
        content = (sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{name} cannot be read as text: {error}") from None
    lines = [(f"{name}, line {number}", line) for number, line in enumerate(content.split("\n"), start=1)]
    lines = [(where, line.removesuffix("\r")) for where, line in lines if line.strip()]
    if not lines:
        raise DataError(f"{name} holds no prompt")
    if not lines[0][1].lstrip().startswith("{"):
        return lines
    return [(where, text_of(where, json_object(where, line), "prompt")) for where, line in lines]

#!/usr/bin/env python3
"""Train a sentencepiece tokenizer (BPE or unigram, byte fallback) on .txt and .jsonl files. See docs/data.md."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed


def build_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="FILE", help="files or globs: .txt, .jsonl, also with .gz or .zst")
    add("--output", required=True, metavar="PREFIX", help="writes PREFIX.model and PREFIX.model.json")
    add("--vocab-size", type=int, default=32_000, help="number of pieces, specials and bytes included (%(default)s)")
    add("--model-type", choices=("bpe", "unigram"), default="bpe", help="(%(default)s)")
    add("--character-coverage", type=float, default=0.9995, help="share of characters with own pieces (%(default)s)")
    add("--special-token", action="append", default=[], metavar="TEXT", help="kept whole as one id; may be repeated")
    add("--sample-megabytes", type=float, default=64.0, help="train on a sample of at most this much (%(default)s)")
    add("--seed", type=int, default=1, help="of the sample (%(default)s)")
    add("--json-key", default="text", help="where the text is in a jsonl line (%(default)s)")
    add("--overwrite", action="store_true", help="replace an existing model")
    return parser


def main() -> int:
    """Parse, train, report; returns the exit code."""
    arguments = build_parser().parse_args()

    from megamoe.data.tokenizer_training import TrainingSettings, train_tokenizer
    from megamoe.errors import MegamoeError

    settings = TrainingSettings(
        inputs=tuple(arguments.inputs),
        output=arguments.output,
        vocab_size=arguments.vocab_size,
        model_type=arguments.model_type,
        character_coverage=arguments.character_coverage,
        special_tokens=tuple(arguments.special_token),
        sample_bytes=int(arguments.sample_megabytes * 1e6),
        seed=arguments.seed,
        json_key=arguments.json_key,
        overwrite=arguments.overwrite,
    )
    try:
        train_tokenizer(settings)
    except MegamoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Tokenize .txt and .jsonl files into Megatron's indexed dataset (.bin/.idx). See docs/data.md."""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed


def build_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="FILE", help="files or globs: .txt, .jsonl, also with .gz or .zst")
    add("--output", required=True, metavar="PREFIX", help="writes PREFIX.bin, PREFIX.idx and PREFIX.json")
    add("--tokenizer", choices=("sentencepiece", "gpt2_bpe", "byte"), default="sentencepiece", help="(%(default)s)")
    add("--tokenizer-path", help="sentencepiece: the .model file; gpt2_bpe: folder with vocab.json and merges.txt")
    add(
        "--rules",
        choices=("document", "paper"),
        default="document",
        help="document: one end-of-document id per document; paper: each line end becomes that id, a document ends "
        "with two (%(default)s)",
    )
    add(
        "--txt-documents",
        choices=("blank_line", "file"),
        default="blank_line",
        help="what ends a document in .txt files (%(default)s)",
    )
    add("--json-key", default="text", help="where the text is in a jsonl line (%(default)s)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="tokenizing processes (all cores: %(default)s)")
    add("--overwrite", action="store_true", help="replace an existing dataset")
    return parser


def main() -> int:
    """Parse, tokenize, report; returns the exit code."""
    arguments = build_parser().parse_args()

    from megamoe.config.schema import TokenizerConfig
    from megamoe.data.preprocess import PreprocessSettings, preprocess
    from megamoe.errors import MegamoeError

    settings = PreprocessSettings(
        inputs=tuple(arguments.inputs),
        output=arguments.output,
        tokenizer=TokenizerConfig(kind=arguments.tokenizer, path=arguments.tokenizer_path),
        rules=arguments.rules,
        json_key=arguments.json_key,
        txt_documents=arguments.txt_documents,
        num_workers=arguments.workers,
        overwrite=arguments.overwrite,
    )
    try:
        preprocess(settings)
    except MegamoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

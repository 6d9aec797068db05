"""Train a sentencepiece model on text files, with bounded memory and the same bytes every time.

The pieces start with fairseq's four special tokens: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3. Text is taken as it is
(no normalisation, no collapsing of spaces) and bytes without a piece fall back to byte pieces, so every text decodes
to itself, but for the character U+2581, which sentencepiece uses for the space.
"""

import heapq
import io
import os
import random
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from megamoe.data.manifest import read_manifest, same_inputs, write_manifest
from megamoe.data.readers import Source, document_text, find_sources, read_chunks
from megamoe.data.tokenizers import BOS_ID, EOS_ID, PAD_ID, SPECIAL_TOKENS, UNK_ID
from megamoe.errors import DataError

MAX_SENTENCE_CHARACTERS = 1000  # longer lines are cut at spaces: sentencepiece would drop them
NUM_THREADS = 8  # fixed, for unigram sums depend on it in their last bits
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class TrainingSettings:
    """One run of tools/train_tokenizer.py.

    `sample_bytes` bounds the text that sentencepiece sees, and with it the memory: lines beyond it are left out by a
    draw with `seed` that gives every line the same chance.
    """

    inputs: tuple[str, ...]
    output: str
    vocab_size: int
    model_type: Literal["bpe", "unigram"] = "bpe"
    character_coverage: float = 0.9995
    special_tokens: tuple[str, ...] = ()
    sample_bytes: int = 64_000_000
    seed: int = 1
    json_key: str = "text"
    overwrite: bool = False


def train_tokenizer(settings: TrainingSettings, log: TextIO = sys.stderr) -> bool:
    """Write OUTPUT.model and OUTPUT.model.json.

    Returns:
        False when a model of the same inputs was there already and nothing was done.

    Raises:
        DataError: inputs are unusable, or the vocabulary size does not suit the text.
    """
    _check(settings)
    sources = find_sources(settings.inputs)
    description = _describe(settings, sources)
    model_path = Path(f"{settings.output}.model")
    if _is_done(settings, model_path, description, log):
        return False
    started = time.monotonic()
    sample, num_lines, num_bytes = sample_lines(
        _lines(sources, settings.json_key), settings.sample_bytes, settings.seed
    )
    if not sample:
        raise DataError(f"the inputs hold no text: {', '.join(source.path for source in sources[:5])}")
    sample_megabytes = sum(map(len, sample)) / 1e6
    print(
        f"training a {settings.model_type} model of {settings.vocab_size} pieces on {len(sample)} of {num_lines} "
        f"lines, {sample_megabytes:.1f} of {num_bytes / 1e6:.1f} MB",
        file=log,
        flush=True,
    )
    _write(model_path, _train(settings, sample), description)
    print(f"{model_path}: {settings.vocab_size} pieces in {time.monotonic() - started:.1f} s", file=log)
    return True


def sample_lines(lines: Iterable[bytes], budget_bytes: int, seed: int) -> tuple[list[bytes], int, int]:
    """A uniform sample of lines that fits into `budget_bytes`, in their own order.

    Every line draws a number; those with the smallest numbers are kept as long as they fit. Memory is the budget.

    Returns:
        the sample, the number of all lines, and their bytes.
    """
    draw = random.Random(seed)
    kept: list[tuple[float, int, bytes]] = []
    kept_bytes = num_lines = num_bytes = 0
    for line in lines:
        heapq.heappush(kept, (-draw.random(), num_lines, line))
        num_lines += 1
        num_bytes += len(line)
        kept_bytes += len(line)
        while kept_bytes > budget_bytes:
            kept_bytes -= len(heapq.heappop(kept)[2])
    return [line for _, _, line in sorted(kept, key=lambda entry: entry[1])], num_lines, num_bytes


def _check(settings: TrainingSettings) -> None:
    smallest = len(SPECIAL_TOKENS) + 256 + len(settings.special_tokens) + 1
    if settings.vocab_size < smallest:
        raise DataError(
            f"--vocab-size {settings.vocab_size} is too small: {len(SPECIAL_TOKENS)} special tokens, 256 bytes and "
            f"{len(settings.special_tokens)} tokens of yours need {smallest} or more"
        )
    if not 0.98 <= settings.character_coverage <= 1.0:
        raise DataError(f"--character-coverage {settings.character_coverage} is not between 0.98 and 1")
    for number, token in enumerate(settings.special_tokens):
        if not token or token in SPECIAL_TOKENS or token in settings.special_tokens[:number]:
            raise DataError(f"--special-token {token!r} is empty, given twice, or one of {', '.join(SPECIAL_TOKENS)}")
    if settings.sample_bytes < 1:
        raise DataError("--sample-megabytes must be above 0")


def _describe(settings: TrainingSettings, sources: Iterable[Source]) -> dict[str, Any]:
    return {
        "kind": "sentencepiece",
        "vocab_size": settings.vocab_size,
        "model_type": settings.model_type,
        "character_coverage": settings.character_coverage,
        "special_tokens": list(settings.special_tokens),
        "sample_bytes": settings.sample_bytes,
        "seed": settings.seed,
        "json_key": settings.json_key,
        "sources": [source.describe() for source in sources],
    }


def _is_done(settings: TrainingSettings, model_path: Path, description: dict[str, Any], log: TextIO) -> bool:
    if settings.overwrite or not model_path.exists():
        return False
    same, difference = same_inputs(read_manifest(model_path), description)
    if not same:
        raise DataError(
            f"{model_path} exists and was made from something else ({difference}): "
            f"add --overwrite to replace it, or choose another --output"
        )
    print(f"{model_path} is complete and was made from the same inputs: nothing to do", file=log)
    return True


def _lines(sources: Iterable[Source], json_key: str) -> Iterator[bytes]:
    for chunk in read_chunks(sources, "blank_line", CHUNK_BYTES):
        for document in chunk.documents:
            for line in document_text(document, json_key).split("\n"):
                yield from (part.encode() for part in _parts(line))


def _parts(line: str) -> Iterator[str]:
    while len(line) > MAX_SENTENCE_CHARACTERS:
        at = line.rfind(" ", 1, MAX_SENTENCE_CHARACTERS)
        at = at if at > 0 else MAX_SENTENCE_CHARACTERS
        yield line[:at]
        line = line[at:].removeprefix(" ")
    if line.strip():
        yield line


def _train(settings: TrainingSettings, sample: list[bytes]) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type=settings.model_type,
            vocab_size=settings.vocab_size,
            character_coverage=settings.character_coverage,
            user_defined_symbols=list(settings.special_tokens),
            bos_id=BOS_ID,
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            bos_piece=SPECIAL_TOKENS[BOS_ID],
            pad_piece=SPECIAL_TOKENS[PAD_ID],
            eos_piece=SPECIAL_TOKENS[EOS_ID],
            unk_piece=SPECIAL_TOKENS[UNK_ID],
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=4 * MAX_SENTENCE_CHARACTERS + 1,
            shuffle_input_sentence=False,
            num_threads=NUM_THREADS,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise DataError(_explain(settings.vocab_size, str(error))) from error
    return model.getvalue()


def _explain(vocab_size: int, complaint: str) -> str:
    too_high = re.search(r"Vocabulary size too high .* value <= (\d+)", complaint)
    if too_high:
        return f"--vocab-size {vocab_size} is too large for this text: use {too_high[1]} or less, or bring more text"
    reason = complaint.strip().rsplit("] ", 1)[-1]  # what stands before is a place in the library's source
    return f"sentencepiece cannot train --vocab-size {vocab_size} on this text: {reason}"


def _write(path: Path, content: bytes, description: dict[str, Any]) -> None:
    temporary = Path(f"{path}.tmp{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        # The model comes last: where it stands, it is whole and its description is its own.
        path.unlink(missing_ok=True)
        write_manifest(path, description)
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error

"""Text files to an indexed dataset: read in one process, tokenize in several, write in order.

The cut into chunks depends on the inputs alone and results are written in the order they were read, so the bytes are
the same whatever the number of workers.
"""

import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, Literal, TextIO

import numpy as np

from megamoe.config.schema import TokenizerConfig
from megamoe.data.indexed import IndexedDataset, IndexedWriter, bin_path, idx_path, token_dtype
from megamoe.data.manifest import read_manifest, same_inputs, write_manifest
from megamoe.data.readers import (
    JSON_KEY_ADVICE,
    Chunk,
    Source,
    TxtDocuments,
    document_text,
    find_sources,
    read_chunks,
)
from megamoe.data.tokenizers import Tokenizer, build_tokenizer
from megamoe.errors import DataError
from megamoe.progress import StatusLine

Rules = Literal["document", "paper"]
CHUNK_BYTES = 1 << 19
CHUNKS_IN_FLIGHT_PER_WORKER = 4


@dataclass(frozen=True)
class PreprocessSettings:
    """One run of tools/preprocess_data.py.

    `rules` "document": text as it is, then one end-of-document id. "paper" (arXiv 2112.10684, fairseq): one
    paragraph per line, every line end becomes an end-of-document id, and a document ends with one more of them.
    """

    inputs: tuple[str, ...]
    output: str
    tokenizer: TokenizerConfig
    rules: Rules = "document"
    json_key: str = "text"
    txt_documents: TxtDocuments = "blank_line"
    num_workers: int = 1
    overwrite: bool = False


@dataclass(frozen=True)
class EncodedChunk:
    """A chunk turned to ids: `tokens` of all documents in a row, `lengths` of each, both int arrays.

    `text_bytes`, int64: UTF-8 bytes of the text that each document's ids stand for, lines joined by one byte.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    text_bytes: np.ndarray
    num_text_bytes: int
    source_bytes: int


def preprocess(settings: PreprocessSettings, log: TextIO = sys.stderr) -> bool:
    """Tokenize `settings.inputs` into OUTPUT.bin, .idx and .json.

    Returns:
        False when a complete dataset of the same inputs was there already and nothing was done.

    Raises:
        DataError: inputs, tokenizer or output are unusable; for text the message names file and line.
    """
    if settings.num_workers < 1:
        raise DataError(f"--workers {settings.num_workers} is not possible: use 1 or more")
    # The workers are the parallelism; threads of the tokenizer library inside each would fight them for cores.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sources = find_sources(settings.inputs)
    tokenizer = build_tokenizer(settings.tokenizer)
    description = _describe(settings, sources, tokenizer)
    if _is_done(settings, description, log):
        return False
    started = time.monotonic()
    progress = _Progress(log, total_bytes=sum(source.size_bytes for source in sources))
    chunks = read_chunks(sources, settings.txt_documents, CHUNK_BYTES)

    def publish_manifest() -> None:
        counts = {"num_documents": writer.num_documents, "num_tokens": writer.num_tokens}
        write_manifest(settings.output, {**description, **counts, "dtype": writer.dtype.name})

    try:
        with IndexedWriter(settings.output, tokenizer.vocab_size, before_index=publish_manifest) as writer:
            for encoded in _encode_all(chunks, settings, tokenizer):
                writer.add_documents(encoded.tokens, encoded.lengths)
                progress.add(len(encoded.lengths), encoded.num_text_bytes, encoded.source_bytes)
            if writer.num_documents == 0:
                raise DataError(f"the inputs hold no text: {', '.join(source.path for source in sources[:5])}")
    except OSError as error:  # a full disk; what goes wrong in reading is a DataError already
        raise DataError(f"cannot write {settings.output}: {error.strerror or error}") from error
    _report(settings, writer, progress, time.monotonic() - started)
    return True


class _Progress:
    """Counts documents and text bytes and shows their rates."""

    def __init__(self, stream: TextIO, total_bytes: int) -> None:
        """`total_bytes` is the size of the input files as they lie on disk."""
        self.text_bytes = self.num_documents = 0
        self._line, self._started, self._total_bytes = StatusLine(stream), time.monotonic(), max(total_bytes, 1)

    def add(self, num_documents: int, text_bytes: int, source_bytes: int) -> None:
        """Count finished work; `source_bytes` is the position reached in the inputs."""
        self.num_documents += num_documents
        self.text_bytes += text_bytes
        if self._line.is_due:
            seconds = time.monotonic() - self._started
            self._line.show(
                f"{100 * source_bytes / self._total_bytes:3.0f}%  {self.num_documents} documents  "
                f"{self.text_bytes / 1e6:.1f} MB  {self.num_documents / seconds:.0f} docs/s  "
                f"{self.text_bytes / 1e6 / seconds:.2f} MB/s"
            )

    def finish(self, message: str) -> None:
        self._line.end(message)


def _report(settings: PreprocessSettings, writer: IndexedWriter, progress: _Progress, seconds: float) -> None:
    workers = f"{settings.num_workers} worker{'s' if settings.num_workers > 1 else ''}"
    progress.finish(
        f"{bin_path(settings.output)}: {writer.num_documents} documents, {writer.num_tokens} tokens "
        f"({writer.dtype.name}) of {progress.text_bytes / 1e6:.1f} MB text in {seconds:.1f} s with {workers}: "
        f"{writer.num_documents / seconds:.0f} docs/s, {progress.text_bytes / 1e6 / seconds:.2f} MB/s"
    )


def _describe(settings: PreprocessSettings, sources: Iterable[Source], tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "tokenizer": {**tokenizer.describe(), "end_of_document_id": tokenizer.end_of_document_id},
        "rules": settings.rules,
        "json_key": settings.json_key,
        "txt_documents": settings.txt_documents,
        "sources": [source.describe() for source in sources],
    }


def _is_done(settings: PreprocessSettings, description: dict[str, Any], log: TextIO) -> bool:
    prefix = settings.output
    if settings.overwrite or not idx_path(prefix).exists():
        return False
    try:
        IndexedDataset(prefix)
    except DataError as error:
        print(f"writing {prefix} again: {error}", file=log)
        return False
    same, difference = same_inputs(read_manifest(prefix), description)
    if not same:
        raise DataError(
            f"{bin_path(prefix)} exists and was made from something else ({difference}): "
            f"add --overwrite to replace it, or choose another --output"
        )
    print(f"{bin_path(prefix)} is complete and was made from the same inputs: nothing to do", file=log)
    return True


def encode_chunk(
    chunk: Chunk, tokenizer: Tokenizer, rules: Rules, json_key: str, advice: str = JSON_KEY_ADVICE
) -> EncodedChunk:
    """Ids of every document of a chunk that holds any text. advice: as for `document_text`.

    Raises:
        DataError: a document cannot be decoded; the message names file and line.
    """
    texts = [document_text(document, json_key, advice) for document in chunk.documents]
    num_text_bytes = sum(len(document.content) for document in chunk.documents)
    if rules == "paper":
        # Blank lines inside a document would read as its end, so two ends in a row always mean a new document.
        pieces = [[line for line in text.split("\n") if line.strip()] for text in texts]
    else:
        pieces = [[text] if text.strip() else [] for text in texts]
    encoded = iter(tokenizer.encode_batch([piece for group in pieces for piece in group]))
    end = tokenizer.end_of_document_id
    flat: list[int] = []
    lengths, text_bytes = [], []
    for group in pieces:
        start = len(flat)
        for _ in group:
            flat += next(encoded)
            flat.append(end)
        if group:
            if rules == "paper":
                flat.append(end)
            lengths.append(len(flat) - start)
            text_bytes.append(sum(map(_num_bytes, group)) + len(group) - 1)
    tokens = np.array(flat, dtype=token_dtype(tokenizer.vocab_size))
    counts = (np.array(lengths, dtype=np.int64), np.array(text_bytes, dtype=np.int64))
    return EncodedChunk(tokens, *counts, num_text_bytes, chunk.source_bytes)


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8"))


def _encode_all(chunks: Iterator[Chunk], settings: PreprocessSettings, tokenizer: Tokenizer) -> Iterator[EncodedChunk]:
    if settings.num_workers == 1:  # a process of its own would only add a copy of every chunk
        for chunk in chunks:
            yield encode_chunk(chunk, tokenizer, settings.rules, settings.json_key)
        return
    arguments = (settings.tokenizer.model_dump(), settings.rules, settings.json_key)
    pool = ProcessPoolExecutor(settings.num_workers, get_context("spawn"), _start_worker, arguments)
    try:
        yield from _in_order(pool, _work, chunks, settings.num_workers * CHUNKS_IN_FLIGHT_PER_WORKER)
    except BrokenProcessPool as error:
        raise DataError("a worker process was killed, perhaps for want of memory: use fewer --workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(
    pool: ProcessPoolExecutor, function: Callable[[Chunk], EncodedChunk], chunks: Iterable[Chunk], depth: int
) -> Iterator[EncodedChunk]:
    """Results in the order of `chunks`, with no more than `depth` of them in memory."""
    waiting: deque[Future[EncodedChunk]] = deque()
    for chunk in chunks:
        waiting.append(pool.submit(function, chunk))
        if len(waiting) >= depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


_worker: tuple[Tokenizer, Rules, str] | None = None  # one per worker process: loading a model takes longer than a chunk


def _start_worker(tokenizer: dict[str, Any], rules: Rules, json_key: str) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _worker = (build_tokenizer(TokenizerConfig(**tokenizer)), rules, json_key)


def _work(chunk: Chunk) -> EncodedChunk:
    if _worker is None:
        raise RuntimeError("the worker was not started by _start_worker")
    return encode_chunk(chunk, *_worker)

"""Sets as indexed datasets: text is tokenized once, into files that all ranks map; nothing is held in memory.

The most that tokenizing holds is one document, and half a MiB of text with its ids; what scoring holds does not grow
with a set either.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megamoe.config.schema import TokenizerConfig
from megamoe.data.indexed import IndexedDataset, IndexedWriter, idx_path
from megamoe.data.manifest import (
    check_tokenizer,
    check_vocabulary,
    manifest_path,
    read_manifest,
    same_inputs,
    write_manifest,
)
from megamoe.data.preprocess import CHUNK_BYTES, encode_chunk
from megamoe.data.readers import read_chunks
from megamoe.data.token_bytes import TokenBytes, token_bytes
from megamoe.data.tokenizers import ByteTokenizer, Tokenizer, build_tokenizer, tokenizer_of_model
from megamoe.errors import DataError
from megamoe.evaluation.sets import TextSet
from megamoe.evaluation.windows import WindowPlan, plan_windows
from megamoe.inference.tokenizer import notes_of_tokenizer

_JSON_KEY_ADVICE = "name another as the set's json_key in a file of --sets"
Tick = Callable[[str], None]  # called now and then with what is being done


@dataclass(frozen=True)
class OpenSet:
    """A set that can be scored: how it is cut, and how its bytes are counted."""

    description: TextSet
    plan: WindowPlan
    bytes_of_ids: TokenBytes | None  # None: nothing says what text the ids stand for
    document_bytes: np.ndarray | None  # int64 [documents] of a set that was text, read from its file
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.description.settings.name

    def bytes_between(self, first: int, last: int) -> int | None:
        """UTF-8 bytes that tokens [first, last) of the corpus stand for; None where that is not known."""
        if self.bytes_of_ids is None:
            return None
        if first >= last:
            return 0
        end, begin = self.bytes_of_ids.end_of_document_id, max(0, first - 1)
        ids = self.plan.corpus.tokens(begin, last, vocab_size=self.plan.vocab_size)
        if ids.max() >= len(self.bytes_of_ids.table):  # another tokenizer has made them
            return None
        if first == 0:
            return self.bytes_of_ids.count(ids, end)
        return self.bytes_of_ids.count(ids[1:], int(ids[0]))

    def text_bytes(self, counted: int | None) -> int | None:
        """UTF-8 bytes of the text scored. `counted`: `bytes_between` of all that was scored, piece by piece.

        Of text that was tokenized here, documents that are scored whole count as they were read.
        """
        if self.bytes_of_ids is None or counted is None:
            return None
        if self.document_bytes is None:
            return counted
        first, last = self.plan.span
        corpus = self.plan.corpus
        whole = self.plan.end_document
        if corpus.document_start(whole) > last:
            whole -= 1
        before, rest = self.bytes_between(0, first), self.bytes_between(corpus.document_start(whole), last)
        return None if before is None or rest is None else int(self.document_bytes[:whole].sum()) - before + rest

    def why_uncounted(self) -> str | None:
        """What the user should hear where `text_bytes` is None and no note has said it before scoring."""
        if self.bytes_of_ids is None:
            return None
        return (
            f"set {self.name}: its bytes are not counted, for it has ids beyond the {len(self.bytes_of_ids.table)} of "
            "data.tokenizer: name the tokenizer that made it, as in data.tokenizer.path=…"
        )


def tokenize(text: TextSet, tokenizer: Tokenizer, prefix: Path, tick: Tick = lambda what: None) -> None:
    """Write the set, which is text, as an indexed dataset and the bytes of its documents; nothing if that is done.

    It ends where `max_documents` or `max_tokens` are reached. Raises DataError naming file and line.
    """
    settings = text.settings
    description = {
        "tokenizer": {**tokenizer.describe(), "end_of_document_id": tokenizer.end_of_document_id},
        "set": text.describe(),
    }
    if idx_path(prefix).exists() and same_inputs(read_manifest(prefix), description)[0]:
        return
    # A block needs one token more than it scores.
    most_tokens = None if settings.max_tokens is None else settings.max_tokens + 1
    chunks = read_chunks(text.sources(), settings.text_documents, CHUNK_BYTES)
    growing = prefix.with_name(f"{prefix.name}.bytes.tmp{os.getpid()}")

    def publish() -> None:
        os.replace(growing, _bytes_path(prefix))
        write_manifest(prefix, description)

    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with open(growing, "wb") as sizes, IndexedWriter(prefix, tokenizer.vocab_size, before_index=publish) as writer:
            for chunk in chunks:
                encoded = encode_chunk(chunk, tokenizer, settings.rules, settings.json_key, _JSON_KEY_ADVICE)
                count = _num_wanted(encoded.lengths, writer, settings.max_documents, most_tokens)
                writer.add_documents(encoded.tokens[: int(encoded.lengths[:count].sum())], encoded.lengths[:count])
                sizes.write(encoded.text_bytes[:count].astype("<i8").tobytes())
                tick(f"tokenizing {settings.name}: {writer.num_documents:,} documents, {writer.num_tokens:,} tokens")
                if count < len(encoded.lengths):
                    break
            sizes.flush()
            if writer.num_documents == 0:
                raise DataError(f"set {settings.name}: the files of {settings.path} hold no text")
    except OSError as error:
        raise DataError(f"set {settings.name}: cannot write {prefix}: {error.strerror or error}") from error
    finally:
        growing.unlink(missing_ok=True)


def _num_wanted(lengths: np.ndarray, writer: IndexedWriter, documents: int | None, tokens: int | None) -> int:
    """How many of these documents are still needed."""
    count = len(lengths) if documents is None else min(len(lengths), documents - writer.num_documents)
    if tokens is not None:
        before = writer.num_tokens + np.cumsum(lengths) - lengths
        count = min(count, int(np.searchsorted(before, tokens)))
    return count


def _bytes_path(prefix: Path) -> Path:
    return Path(f"{prefix}.bytes")


def open_set(
    text: TextSet, prefix: Path, *, tokenizer: TokenizerConfig, vocab_size: int
) -> OpenSet:
    """Open a set: an indexed one where it lies, a text where `tokenize` has left it (`prefix`).

    vocab_size: of the model. Raises DataError where the data are damaged or do not fit the model.
    """
    is_indexed = text.settings.format == "indexed"
    place = text.settings.path if is_indexed else str(prefix)
    corpus = IndexedDataset(place)
    check_vocabulary(place, vocab_size)
    written = (read_manifest(place) or {}).get("tokenizer", {})
    notes: list[str] = []
    table, end = None, written.get("end_of_document_id")
    try:
        built = build_tokenizer(tokenizer)
        check_tokenizer(place, built.describe())
        table, end = token_bytes(built), built.end_of_document_id if end is None else end
    except DataError as error:
        if end is None and text.settings.reading == "documents":
            raise
        notes.append(f"set {text.settings.name}: its bytes are not counted, for {error}")
    if text.settings.reading == "documents" and end is not None and end >= vocab_size:
        raise DataError(
            f"set {text.settings.name}: its documents end with id {end}, but model.vocab_size is {vocab_size}: name "
            "the tokenizer that the model was trained with, as in data.tokenizer.path=…"
        )
    document_bytes = None
    if not is_indexed:
        document_bytes = np.memmap(_bytes_path(prefix), dtype="<i8", mode="r", shape=(corpus.num_documents,))
    plan = plan_windows(corpus, text.settings, end_of_document_id=end or 0, vocab_size=vocab_size)
    return OpenSet(text, plan, table, document_bytes, tuple(notes))


def check_sets(
    texts: Sequence[TextSet], *, tokenizer: TokenizerConfig, vocab_size: int, names_tokenizer: bool = False
) -> list[str]:
    """Before any rank is started: indexed sets open and fit the model, and a tokenizer for the others is there.

    names_tokenizer: whether the command has named it, and not a default. Returns what the user should hear of. Raises
    DataError.
    """
    notes = []
    for text in texts:
        if text.settings.format == "indexed":
            if not names_tokenizer:
                _check_end(text, tokenizer, vocab_size)
            notes += open_set(text, Path(), tokenizer=tokenizer, vocab_size=vocab_size).notes
    if any(text.settings.format != "indexed" for text in texts):
        notes += notes_of_tokenizer(tokenizer_of_model(tokenizer, vocab_size), vocab_size)
    return notes


def _check_end(text: TextSet, tokenizer: TokenizerConfig, vocab_size: int) -> None:
    """Where nothing says which id ends documents, the default of data.tokenizer must not. Raises DataError."""
    settings = text.settings
    if settings.reading != "documents" or tokenizer != TokenizerConfig() or vocab_size == ByteTokenizer.vocab_size:
        return
    if read_manifest(settings.path) is None:
        raise DataError(
            f"set {settings.name}: nothing says which id ends the documents of {settings.path}, for there is no "
            f"{manifest_path(settings.path)} and data.tokenizer is not set: name the tokenizer that made it, as in "
            "data.tokenizer.kind=… data.tokenizer.path=…, or read it in blocks"
        )


def describe_tokenizer(config: TokenizerConfig) -> dict[str, Any]:
    """What a tokenizer is known by; where it cannot be loaded, what the configuration says of it."""
    try:
        return build_tokenizer(config).describe()
    except DataError:
        return config.model_dump(mode="json")

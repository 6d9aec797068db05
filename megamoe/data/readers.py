"""Text files as a stream of documents: .txt and .jsonl, plain, gzipped or zstd, in bounded memory.

Reading and cutting is done on bytes; decoding, which costs more and may fail, is `document_text`, so that it can run
in another process and still name the line.
"""

import glob
import gzip
import hashlib
import io
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from megamoe.data.json_text import json_object, text_of
from megamoe.errors import DataError

TxtDocuments = Literal["blank_line", "file"]
READ_BYTES = 1 << 20
HASHED_FILE_BYTES = 1 << 26
UTF8_BOM = b"\xef\xbb\xbf"
JSON_KEY_ADVICE = "name another with --json-key"  # of the tools that read corpora
VALID_ENDINGS = ".txt, .jsonl, and both with .gz or .zst"


@dataclass(frozen=True)
class Source:
    """One input file."""

    path: str
    kind: Literal["txt", "jsonl"]
    compression: Literal["", "gz", "zst"]
    size_bytes: int
    modified_ns: int

    def describe(self) -> dict[str, Any]:
        """What a manifest records of the file, to tell later whether it is still the same.

        Small files are known by a hash of their bytes, so that copying a corpus or checking it out again changes
        nothing; for large ones, which would have to be read twice, the time of last change must do.

        Raises:
            DataError: the file cannot be read.
        """
        return describe_file(self.path, self.size_bytes, self.modified_ns)


@dataclass(frozen=True)
class RawDocument:
    """One document as read: for jsonl the line, for txt the paragraph lines; `line` is where it starts, from 1."""

    path: str
    kind: Literal["txt", "jsonl"]
    line: int
    content: bytes


@dataclass(frozen=True)
class Chunk:
    """Consecutive documents handed to a worker together; `source_bytes` is how far into all inputs they reach."""

    documents: tuple[RawDocument, ...]
    source_bytes: int


def describe_file(path: str, size_bytes: int, modified_ns: int) -> dict[str, Any]:
    """See `Source.describe`. Raises DataError where the file cannot be read."""
    entry: dict[str, Any] = {"path": path, "size_bytes": size_bytes}
    if size_bytes > HASHED_FILE_BYTES:
        return {**entry, "modified_ns": modified_ns}
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(READ_BYTES):
                digest.update(block)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    return {**entry, "sha256": digest.hexdigest()}


def find_sources(patterns: Iterable[str]) -> tuple[Source, ...]:
    """Files named by paths or globs, in the order given, each glob sorted.

    Raises:
        DataError: a pattern matches nothing, or a file is of an unknown kind.
    """
    sources = []
    for pattern in patterns:
        paths = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        if not paths:
            raise DataError(f"no input file matches {pattern}")
        sources.extend(_source(path) for path in paths)
    if not sources:
        raise DataError("no input files are given")
    return tuple(sources)


def _source(path: str) -> Source:
    name = Path(path).name
    compression: Literal["", "gz", "zst"] = ""
    if name.endswith(".gz"):
        name, compression = name[:-3], "gz"
    elif name.endswith(".zst"):
        name, compression = name[:-4], "zst"
    if not Path(path).is_file() or not name.endswith((".txt", ".jsonl")):
        raise DataError(f"{path} is no input file: its name must end in {VALID_ENDINGS}")
    status = Path(path).stat()
    kind: Literal["txt", "jsonl"] = "txt" if name.endswith(".txt") else "jsonl"
    return Source(path, kind, compression, status.st_size, status.st_mtime_ns)


def read_chunks(sources: Iterable[Source], txt_documents: TxtDocuments, chunk_bytes: int) -> Iterator[Chunk]:
    """All documents in order, in chunks of about `chunk_bytes` of text. The cut depends on nothing but the inputs.

    Raises:
        DataError: a file cannot be read or unpacked; the message names file and line.
    """
    done_bytes = 0
    pending: list[RawDocument] = []
    pending_bytes = 0
    for source in sources:
        try:
            raw: BinaryIO = open(source.path, "rb")  # noqa: SIM115 (closed by `with` below)
        except OSError as error:
            raise DataError(f"cannot read {source.path}: {error.strerror}") from error
        with raw:
            for document in _documents(source, raw, txt_documents):
                pending.append(document)
                pending_bytes += len(document.content)
                if pending_bytes >= chunk_bytes:
                    yield Chunk(tuple(pending), done_bytes + raw.tell())
                    pending, pending_bytes = [], 0
        done_bytes += source.size_bytes
    if pending:
        yield Chunk(tuple(pending), done_bytes)


def document_text(document: RawDocument, json_key: str, advice: str = JSON_KEY_ADVICE) -> str:
    r"""The text of a document, with "\n" as its only line ending. advice: what to do where there is no `json_key`.

    Raises:
        DataError: it is not UTF-8, no JSON object, or has no text under `json_key`; the message names file and line.
    """
    try:
        text = document.content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = document.line + document.content.count(b"\n", 0, error.start)
        column = error.start - document.content.rfind(b"\n", 0, error.start)
        raise DataError(f"{document.path}, line {line}, byte {column}: not UTF-8 ({error.reason})") from error
    if document.kind == "jsonl":
        where = f"{document.path}, line {document.line}"
        text = text_of(where, json_object(where, text), json_key, advice=f"; {advice}")
    return text.replace("\r\n", "\n")


def _documents(source: Source, raw: BinaryIO, txt_documents: TxtDocuments) -> Iterator[RawDocument]:
    lines = _numbered_lines(source, raw)
    if source.kind == "jsonl":
        for number, line in lines:
            if line.strip():
                yield RawDocument(source.path, "jsonl", number, line.rstrip(b"\r\n"))
        return
    gathered: list[bytes] = []
    first = 1
    for number, line in lines:
        if line.strip() or txt_documents == "file":
            if not gathered:
                first = number
            gathered.append(line)
        elif gathered:
            yield RawDocument(source.path, "txt", first, b"".join(gathered).rstrip(b"\r\n"))
            gathered = []
    content = b"".join(gathered).rstrip(b"\r\n")
    if content.strip():
        yield RawDocument(source.path, "txt", first, content)


def _numbered_lines(source: Source, raw: BinaryIO) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        for number, line in enumerate(_unpacked(source, raw), start=1):
            yield number, line.removeprefix(UTF8_BOM) if number == 1 else line
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{source.path}, after line {number}: cannot be read further ({error})") from error


def _unpacked(source: Source, raw: BinaryIO) -> Iterable[bytes]:
    if source.compression == "gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw, mode="rb"), READ_BYTES)
    if source.compression == "zst":
        return io.BufferedReader(_ZstdStream(raw), READ_BYTES)
    return raw


class _ZstdStream(io.RawIOBase):
    """Unpacks zstd frames one after another and, unlike the library's own reader, notices a file that is cut off."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw = raw
        self._library = zstandard
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._frame_started = False
        self._packed = b""
        self._unpacked = memoryview(b"")

    def readable(self) -> bool:
        """Always: see io.RawIOBase."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` as far as one step goes; 0 at the end: see io.RawIOBase."""
        while not self._unpacked:
            if not self._packed:
                self._packed = self._raw.read(READ_BYTES // 4)
            if not self._packed:
                if self._frame_started:
                    raise EOFError("the zstd stream is cut off")
                return 0
            self._step()
        count = min(len(buffer), len(self._unpacked))
        buffer[:count] = self._unpacked[:count]
        self._unpacked = self._unpacked[count:]
        return count

    def _step(self) -> None:
        try:
            self._unpacked = memoryview(self._frame.decompress(self._packed))
        except self._library.ZstdError as error:
            raise OSError(str(error)) from error
        self._frame_started = not self._frame.eof
        self._packed = b""
        if self._frame.eof:
            self._packed = self._frame.unused_data
            self._frame = self._library.ZstdDecompressor().decompressobj()

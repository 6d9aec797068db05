"""Megatron's indexed dataset: a `.bin` file of token ids and an `.idx` file that says where documents lie in it.

Layout of the index (little endian): 9 bytes magic, u64 version 1, u8 dtype code, u64 number of sequences n, u64
number of document bounds d, then n i32 lengths in tokens, n i64 offsets into the .bin in bytes, d i64 bounds: the
sequence numbers at which documents end, starting with 0. We write one sequence per document, so d = n + 1.
Source of the format: megatron/core/datasets/indexed_dataset.py, whose own reader is the oracle in our tests.
"""

import os
import struct
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from megamoe.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER_BYTES = 34
DTYPES = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
UINT16_VOCAB_LIMIT = 65_500  # Megatron's own bound: vocabularies below it are stored in two bytes a token
MAX_DOCUMENT_TOKENS = 2**31 - 1  # lengths are i32
COPY_ITEMS = 1 << 20
FULL_CHECK_SEQUENCES = 1 << 24  # indexes up to this size (about 330 MB) are checked whole when opened


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype Megatron would choose for ids in [0, vocab_size): uint16 below 65,500, else int32."""
    return np.dtype("<u2") if vocab_size < UINT16_VOCAB_LIMIT else np.dtype("<i4")


def bin_path(prefix: str | Path) -> Path:
    """The token file of a dataset."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """The index file of a dataset; it is written last, so its presence means the dataset is complete."""
    return Path(f"{prefix}.idx")


class IndexedWriter:
    """Writes a dataset as a stream: memory does not grow with its size, a half-written one is never visible.

    Use as a context manager. Leaving it normally publishes PREFIX.bin and then PREFIX.idx by renaming; leaving it
    through an exception removes the temporary files and keeps whatever dataset stood there before.
    """

    def __init__(self, prefix: str | Path, vocab_size: int, *, before_index: Callable[[], None] | None = None) -> None:
        """Open temporary files beside `prefix`.

        Args:
            prefix: path of the dataset without ending.
            vocab_size: ids lie in [0, vocab_size); decides the dtype.
            before_index: called when the tokens are in place and the index is not yet, to write companion files.

        Raises:
            DataError: the folder cannot be created or written.
        """
        self.prefix = Path(prefix)
        self.dtype = token_dtype(vocab_size)
        self._before_index = before_index
        self.num_documents = 0
        self.num_tokens = 0
        ending = f".tmp{os.getpid()}"
        self._temporary_bin = Path(f"{prefix}.bin{ending}")
        self._temporary_idx = Path(f"{prefix}.idx{ending}")
        # Lengths go to a file of their own until their number is known: a corpus may hold billions of documents.
        self._temporary_lengths = Path(f"{prefix}.lengths{ending}")
        try:
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
            self._bin: BinaryIO = open(self._temporary_bin, "wb")  # noqa: SIM115 (closed in __exit__)
            self._lengths: BinaryIO = open(self._temporary_lengths, "wb")  # noqa: SIM115
        except OSError as error:
            raise DataError(f"cannot write the dataset {prefix}: {error}") from error

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            # Names first: on a full disk, closing may fail too.
            for path in (self._temporary_bin, self._temporary_idx, self._temporary_lengths):
                path.unlink(missing_ok=True)
            self._bin.close()
            self._lengths.close()

    def add_documents(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents.

        Args:
            tokens: [sum(lengths)] ids of all documents, one after another, in `self.dtype`.
            lengths: [num_documents] tokens of each.

        Raises:
            DataError: a document is longer than the format can say.
            ValueError: the arrays do not agree, or `tokens` has another dtype.
        """
        if tokens.dtype != self.dtype or int(lengths.sum()) != len(tokens):
            raise ValueError(f"{tokens.dtype} tokens {tokens.shape} do not fit {self.dtype} lengths {lengths.shape}")
        if len(lengths) and int(lengths.max()) > MAX_DOCUMENT_TOKENS:
            number = self.num_documents + int(lengths.argmax()) + 1
            raise DataError(
                f"document {number} has {int(lengths.max())} tokens; the indexed format holds at most "
                f"{MAX_DOCUMENT_TOKENS} in one document: cut the input into smaller documents"
            )
        self._bin.write(tokens.tobytes())
        self._lengths.write(lengths.astype("<i4").tobytes())
        self.num_documents += len(lengths)
        self.num_tokens += len(tokens)

    def _publish(self) -> None:
        for stream in (self._bin, self._lengths):
            stream.flush()
        os.fsync(self._bin.fileno())
        with open(self._temporary_idx, "wb") as index:
            self._write_index(index)
            index.flush()
            os.fsync(index.fileno())
        # The old index goes first: at no moment does an index stand beside tokens that are not its own.
        idx_path(self.prefix).unlink(missing_ok=True)
        os.replace(self._temporary_bin, bin_path(self.prefix))
        if self._before_index is not None:
            self._before_index()
        os.replace(self._temporary_idx, idx_path(self.prefix))

    def _write_index(self, index: BinaryIO) -> None:
        index.write(MAGIC + struct.pack("<QB", VERSION, DTYPE_CODES[self.dtype]))
        index.write(struct.pack("<QQ", self.num_documents, self.num_documents + 1))
        if self.num_documents == 0:
            index.write(struct.pack("<q", 0))
            return
        lengths = np.memmap(self._temporary_lengths, dtype="<i4", mode="r")
        starts = range(0, self.num_documents, COPY_ITEMS)
        index.writelines(lengths[start : start + COPY_ITEMS].tobytes() for start in starts)
        offset = 0
        for start in starts:
            ends = offset + np.cumsum(lengths[start : start + COPY_ITEMS], dtype=np.int64) * self.dtype.itemsize
            index.write(np.concatenate(([offset], ends[:-1])).astype("<i8").tobytes())
            offset = int(ends[-1])
        for start in range(0, self.num_documents + 1, COPY_ITEMS):
            stop = min(start + COPY_ITEMS, self.num_documents + 1)
            index.write(np.arange(start, stop, dtype="<i8").tobytes())


class IndexedDataset:
    """A dataset opened for reading: memory mapped, checked when opened.

    Attributes:
        prefix: path without ending, as given.
        num_tokens, num_documents: totals.
        dtype: how ids are stored.
    """

    def __init__(self, prefix: str | Path) -> None:
        """Map the two files and check that they belong together.

        Raises:
            DataError: a file is missing, truncated, of another format, or the dataset is empty; the message names
                the file and the byte or token where it goes wrong.
        """
        self.prefix = str(prefix)
        self._idx, self._bin = idx_path(prefix), bin_path(prefix)
        idx_bytes, bin_bytes = self._sizes()
        self.dtype, num_sequences, num_bounds = self._read_header(idx_bytes)
        expected = HEADER_BYTES + 12 * num_sequences + 8 * num_bounds
        if idx_bytes not in (expected, expected + num_sequences):  # the longer: Megatron's multimodal modes, unread
            state = "truncated" if idx_bytes < expected else "longer than it says"
            raise DataError(
                f"{self._idx} is {state}: its header announces {num_sequences} sequences and {num_bounds} document "
                f"bounds, {expected} bytes, but the file ends at byte {idx_bytes}"
            )
        index = np.memmap(self._idx, mode="r", dtype=np.uint8)
        offsets_at = HEADER_BYTES + 4 * num_sequences
        bounds_at = offsets_at + 8 * num_sequences
        self.sequence_lengths = index[HEADER_BYTES:offsets_at].view("<i4")
        self.sequence_offsets_bytes = index[offsets_at:bounds_at].view("<i8")
        self.document_bounds = index[bounds_at : bounds_at + 8 * num_bounds].view("<i8")
        self.num_documents = max(num_bounds - 1, 0)
        self._check_tables(num_sequences)
        self.num_tokens = self._check_bin(num_sequences, bin_bytes)
        self._tokens = np.memmap(self._bin, mode="r", dtype=self.dtype)

    def _sizes(self) -> tuple[int, int]:
        sizes = []
        for path, other in ((self._idx, self._bin), (self._bin, self._idx)):
            try:
                sizes.append(path.stat().st_size)
            except OSError as error:
                if isinstance(error, FileNotFoundError) and other.exists():
                    hint = f"{other} is there, so the dataset is incomplete: run tools/preprocess_data.py again"
                else:
                    hint = "give the path of a .bin/.idx pair without the ending"
                raise DataError(f"cannot open {path}: {error.strerror}; {hint}") from error
        return sizes[0], sizes[1]

    def _read_header(self, idx_bytes: int) -> tuple[np.dtype, int, int]:
        with open(self._idx, "rb") as stream:
            header = stream.read(HEADER_BYTES)
        if not MAGIC.startswith(header[:9]):
            raise DataError(f"{self._idx} is no indexed dataset: byte 0 starts {header[:9]!r}, not {MAGIC!r}")
        if len(header) < HEADER_BYTES:
            raise DataError(
                f"{self._idx} is truncated: its header is {HEADER_BYTES} bytes, it ends at byte {idx_bytes}"
            )
        version, code = struct.unpack("<QB", header[9:18])
        if version != VERSION:
            raise DataError(f"{self._idx} has version {version} at byte 9; only version {VERSION} is known")
        if code not in DTYPES:
            valid = ", ".join(f"{known} ({dtype.name})" for known, dtype in DTYPES.items())
            raise DataError(f"{self._idx} has dtype code {code} at byte 17; valid for token ids: {valid}")
        num_sequences, num_bounds = struct.unpack("<QQ", header[18:34])
        return DTYPES[code], num_sequences, num_bounds

    def _check_tables(self, num_sequences: int) -> None:
        """Lengths, offsets and bounds must chain. Large indexes are checked at both ends only, to open quickly."""
        if num_sequences <= FULL_CHECK_SEQUENCES:
            spans = [(0, num_sequences)]
        else:
            spans = [(0, COPY_ITEMS), (num_sequences - COPY_ITEMS, num_sequences)]
        for start, stop in spans:
            lengths = self.sequence_lengths[start:stop].astype(np.int64)
            offsets = self.sequence_offsets_bytes[start:stop]
            ends = offsets + lengths * self.dtype.itemsize
            bad = np.flatnonzero((lengths < 0) | (offsets != np.concatenate((offsets[:1], ends[:-1]))))
            if start == 0 and len(offsets) and offsets[0] != 0:
                bad = np.zeros(1, dtype=np.int64)
            if len(bad):
                at = start + int(bad[0])
                raise DataError(
                    f"{self._idx} is damaged: sequence {at} of {num_sequences} (length "
                    f"{int(self.sequence_lengths[at])} tokens, offset {int(self.sequence_offsets_bytes[at])} bytes) "
                    f"does not follow the one before it"
                )
        bounds = self.document_bounds
        if len(bounds) == 0 or bounds[0] != 0 or bounds[-1] != num_sequences:
            raise DataError(f"{self._idx} is damaged: document bounds do not run from 0 to {num_sequences} sequences")
        for start, stop in spans:
            falling = np.flatnonzero(np.diff(bounds[start : stop + 1]) < 0)
            if len(falling):
                at = start + int(falling[0]) + 1
                raise DataError(f"{self._idx} is damaged: document bound {at} is smaller than the one before it")

    def _check_bin(self, num_sequences: int, bin_bytes: int) -> int:
        num_bytes = 0
        if num_sequences:
            last_tokens = int(self.sequence_lengths[-1])
            num_bytes = int(self.sequence_offsets_bytes[-1]) + last_tokens * self.dtype.itemsize
        if bin_bytes != num_bytes:
            state = "truncated" if bin_bytes < num_bytes else "too long"
            raise DataError(
                f"{self._bin} is {state}: {self._idx} describes {num_bytes // self.dtype.itemsize} tokens "
                f"({num_bytes} bytes), but the file ends at byte {bin_bytes}, token {bin_bytes // self.dtype.itemsize}"
            )
        if num_bytes == 0:
            raise DataError(
                f"{self.prefix} is an empty corpus: {self._idx} lists {self.num_documents} documents, 0 tokens"
            )
        return num_bytes // self.dtype.itemsize

    def tokens(self, start: int, stop: int, *, vocab_size: int) -> np.ndarray:
        """Token ids [start, stop) of the whole corpus, across documents.

        Returns:
            int64 [stop - start].

        Raises:
            DataError: an id is outside [0, vocab_size).
            IndexError: the span is not inside the corpus.
        """
        if not 0 <= start < stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) are not in {self.prefix}, which has {self.num_tokens}")
        ids = self._tokens[start:stop].astype(np.int64)
        if ids.max() >= vocab_size or ids.min() < 0:
            at = int(np.flatnonzero((ids >= vocab_size) | (ids < 0))[0])
            raise DataError(
                f"{self._bin}, token {start + at}: id {int(ids[at])} is outside the vocabulary of {vocab_size} "
                f"(valid: 0 to {vocab_size - 1})"
            )
        return ids

    def document_start(self, number: int) -> int:
        """Where document `number` begins among the corpus's tokens; of `num_documents`, where the last one ends."""
        sequence = int(self.document_bounds[number])
        if sequence == len(self.sequence_offsets_bytes):
            return self.num_tokens
        return int(self.sequence_offsets_bytes[sequence]) // self.dtype.itemsize

    def document(self, number: int) -> np.ndarray:
        """Ids of one document, as stored: dtype `self.dtype`, [length]."""
        if not 0 <= number < self.num_documents:
            raise IndexError(f"document {number} is not in {self.prefix}, which has {self.num_documents}")
        first, last = int(self.document_bounds[number]), int(self.document_bounds[number + 1])
        if first == last:
            return np.empty(0, dtype=self.dtype)
        start = int(self.sequence_offsets_bytes[first]) // self.dtype.itemsize
        end_bytes = int(self.sequence_offsets_bytes[last - 1])
        stop = end_bytes // self.dtype.itemsize + int(self.sequence_lengths[last - 1])
        return np.array(self._tokens[start:stop])

"""Text to ids and back: sentencepiece, GPT-2's byte-level BPE from local files, and plain bytes.

Every tokenizer has `.kind`, `.vocab_size`, `.end_of_document_id`, `.encode`, `.encode_batch`, `.decode` and
`.describe`. Encoding adds no special ids; decoding drops them. The libraries are imported when first needed.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megamoe.config.schema import TokenizerConfig
from megamoe.data import protobuf
from megamoe.errors import DataError

# The first four ids of fairseq's dictionary, used by the byte tokenizer and by sentencepiece models that we train.
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
BOS_ID, PAD_ID, EOS_ID, UNK_ID = range(4)
MODEL_FIELDS = {1, 2, 3}  # sentencepiece's ModelProto: pieces, trainer settings, normaliser settings, in this order
GPT2_END_OF_DOCUMENT = "<|endoftext|>"


class Tokenizer(Protocol):
    """What the rest of megamoe may ask of a tokenizer."""

    kind: str
    vocab_size: int
    end_of_document_id: int

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without special ids."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, quicker than one by one."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special ids give nothing. Raises DataError for an id outside the vocabulary."""
        ...

    def describe(self) -> dict[str, Any]:
        """Kind, vocabulary size and a hash of the model files: equal descriptions give equal ids."""
        ...


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that a configuration names.

    Raises:
        DataError: the path is not given, a file is missing or damaged.
    """
    if config.kind == "byte":
        return ByteTokenizer()
    if config.path is None:
        needed = "the .model file" if config.kind == "sentencepiece" else "the folder of vocab.json and merges.txt"
        raise DataError(f"tokenizer kind {config.kind} needs a path: {needed}")
    if config.kind == "sentencepiece":
        return SentencePieceTokenizer(config.path)
    return Gpt2BpeTokenizer(config.path)


def tokenizer_of_model(config: TokenizerConfig, vocab_size: int) -> Tokenizer:
    """The tokenizer that a configuration names, for a model of `vocab_size` ids.

    Raises:
        DataError: as `build_tokenizer`, and where it makes ids that the model has not.
    """
    tokenizer = build_tokenizer(config)
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"data.tokenizer {config.kind} makes {tokenizer.vocab_size} ids, but model.vocab_size is {vocab_size}: "
            "name the tokenizer that the model was trained with, as in data.tokenizer.path=…"
        )
    return tokenizer


class ByteTokenizer:
    """One id per byte of UTF-8: 0 to 3 are special, byte b is 4 + b. Needs no files."""

    kind = "byte"
    vocab_size = len(SPECIAL_TOKENS) + 256
    end_of_document_id = EOS_ID

    def encode(self, text: str) -> list[int]:
        """Ids of the bytes of `text`."""
        return [byte + len(SPECIAL_TOKENS) for byte in text.encode("utf-8")]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD. Raises DataError for an id outside the vocabulary."""
        _check_ids(ids, self.vocab_size)
        first = len(SPECIAL_TOKENS)
        return bytes(index - first for index in ids if index >= first).decode("utf-8", errors="replace")

    def describe(self) -> dict[str, Any]:
        """See `Tokenizer.describe`."""
        return {"kind": self.kind, "vocab_size": self.vocab_size, "sha256": None}


class SentencePieceTokenizer:
    """A sentencepiece model (BPE or unigram), ours from tools/train_tokenizer.py or anyone's with an end id."""

    kind = "sentencepiece"

    def __init__(self, path: str | Path) -> None:
        """Load a .model file.

        Raises:
            DataError: it is missing, damaged, or has no end-of-sentence piece.
        """
        import sentencepiece

        content = _read(Path(path), "sentencepiece model")
        self.processor = sentencepiece.SentencePieceProcessor()
        if MODEL_FIELDS - _protobuf_fields(content):
            raise DataError(f"{path} is not a sentencepiece model, or is damaged or cut off ({len(content)} bytes)")
        try:
            self.processor.LoadFromSerializedProto(content)
        except (RuntimeError, OSError) as error:
            first_line = str(error).strip().split("\n")[0]
            raise DataError(f"{path} is not a sentencepiece model, or is damaged: {first_line}") from error
        self.vocab_size = self.processor.vocab_size()
        self.end_of_document_id = self.processor.eos_id()
        if self.end_of_document_id < 0:
            raise DataError(f"{path} has no end-of-sentence piece (eos_id), which marks ends of documents")
        self._special = {index for index in range(self.vocab_size) if self.processor.is_control(index)}
        self._sha256 = hashlib.sha256(content).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; what the model has no piece for becomes bytes, where it has byte fallback."""
        return self.processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on one thread: parallel work is the caller's."""
        return self.processor.encode(list(texts), num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`. Raises DataError for an id outside the vocabulary."""
        _check_ids(ids, self.vocab_size)
        return self.processor.decode([int(index) for index in ids if int(index) not in self._special])

    def describe(self) -> dict[str, Any]:
        """See `Tokenizer.describe`."""
        return {"kind": self.kind, "vocab_size": self.vocab_size, "sha256": self._sha256}


class Gpt2BpeTokenizer:
    """GPT-2's byte-level BPE from a folder with its vocab.json and merges.txt; ids are those of vocab.json."""

    kind = "gpt2_bpe"

    def __init__(self, folder: str | Path) -> None:
        """Load both files.

        Raises:
            DataError: a file is missing or damaged, the two do not fit, or `<|endoftext|>` is not in the vocabulary.
        """
        from tokenizers.implementations import ByteLevelBPETokenizer

        vocab_path, merges_path = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocab_bytes, merges_bytes = _read(vocab_path, "vocabulary"), _read(merges_path, "merges")
        vocab = _parse_vocab(vocab_path, vocab_bytes)
        merges = _parse_merges(merges_path, merges_bytes, vocab)
        self._bpe = ByteLevelBPETokenizer(vocab, merges, add_prefix_space=False)
        self.vocabulary = vocab
        self.vocab_size = len(vocab)
        self.end_of_document_id = vocab[GPT2_END_OF_DOCUMENT]
        self._sha256 = hashlib.sha256(vocab_bytes + merges_bytes).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; the characters `<|endoftext|>` in it are text like any other."""
        return self._bpe.encode(text).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text; the library's threads follow TOKENIZERS_PARALLELISM."""
        return [encoding.ids for encoding in self._bpe.encode_batch(list(texts))]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`. Raises DataError for an id outside the vocabulary."""
        _check_ids(ids, self.vocab_size)
        return self._bpe.decode([int(index) for index in ids if index != self.end_of_document_id])

    def describe(self) -> dict[str, Any]:
        """See `Tokenizer.describe`."""
        return {"kind": self.kind, "vocab_size": self.vocab_size, "sha256": self._sha256}


def _parse_vocab(path: Path, content: bytes) -> dict[str, int]:
    try:
        vocab = json.loads(content)
    except ValueError as error:
        raise DataError(f"{path} is damaged: no valid JSON ({error})") from error
    if not isinstance(vocab, dict) or sorted(map(str, vocab.values())) != sorted(map(str, range(len(vocab)))):
        raise DataError(f"{path} is damaged: it must map tokens to the ids 0, 1, 2, ... each used once")
    if GPT2_END_OF_DOCUMENT not in vocab:
        raise DataError(f"{path} has no token {GPT2_END_OF_DOCUMENT}, which marks ends of documents")
    missing = [character for character in byte_characters() if character not in vocab]
    if missing:
        raise DataError(f"{path} lacks {len(missing)} of the 256 byte tokens, the first is {missing[0]!r}")
    return vocab


def _parse_merges(path: Path, content: bytes, vocab: dict[str, int]) -> list[tuple[str, str]]:
    merges = []
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is damaged: byte {error.start} is not UTF-8") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2 or not all(token in vocab for token in (*pair, "".join(pair))):
            raise DataError(f"{path}, line {number}: {line!r} is no merge of two tokens of vocab.json into a third")
        merges.append((pair[0], pair[1]))
    if not merges:
        raise DataError(f"{path} holds no merges")
    return merges


def byte_characters() -> list[str]:
    """The printable characters that stand for the 256 bytes in GPT-2's files (openai/gpt-2, `bytes_to_unicode`)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(256 - len(printable))]


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the {what} {path}: {error.strerror}") from error


def _check_ids(ids: Sequence[int], vocab_size: int) -> None:
    for index in ids:
        if not 0 <= index < vocab_size:
            raise DataError(f"id {index} is outside the vocabulary of {vocab_size} (valid: 0 to {vocab_size - 1})")


def _protobuf_fields(content: bytes) -> set[int]:
    """Numbers of the fields at the top of a protobuf message of length-delimited ones; empty if it is none.

    The library itself accepts a file that ends between two fields, and then makes other ids with what is left.
    """
    try:
        found = {(number, wire) for number, wire, _ in protobuf.fields(content)}
    except IndexError:
        return set()
    return {number for number, _ in found} if all(wire == protobuf.BYTES for _, wire in found) else set()

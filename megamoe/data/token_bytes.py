"""How many bytes of text ids stand for, id by id: the sum over a document is the size of its text in UTF-8.

Decoding would not say: a cut through a character decodes to U+FFFD, and what is decoded piece by piece does not add up.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from megamoe.data.tokenizers import (
    GPT2_END_OF_DOCUMENT,
    SPECIAL_TOKENS,
    ByteTokenizer,
    Gpt2BpeTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)

SPACE = "▁"  # sentencepiece's sign for a blank


@dataclass(frozen=True)
class TokenBytes:
    """Of a byte-level tokenizer the counts are exact. Of sentencepiece they are those of the text after its
    normalisation. Special ids and unknown pieces stand for no bytes."""

    table: np.ndarray  # int64 [vocab]
    begins_with_space: np.ndarray  # bool [vocab]: such a piece at the start of a text has one blank that was added
    end_of_document_id: int

    def count(self, ids: np.ndarray, previous_id: int) -> int:
        """Bytes of `ids`, int64, which follow `previous_id`; at the start of a corpus that is the end id."""
        if not len(ids):
            return 0
        before = np.concatenate(([previous_id], ids[:-1]))
        added = self.begins_with_space[ids] & (before == self.end_of_document_id)
        return int(self.table[ids].sum()) - int(added.sum())


def token_bytes(tokenizer: Tokenizer) -> TokenBytes:
    """The table of any tokenizer that `build_tokenizer` makes."""
    begins_with_space = np.zeros(tokenizer.vocab_size, dtype=bool)
    if isinstance(tokenizer, ByteTokenizer):
        table = np.ones(tokenizer.vocab_size, dtype=np.int64)
        table[: len(SPECIAL_TOKENS)] = 0
    elif isinstance(tokenizer, Gpt2BpeTokenizer):
        table = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        for token, index in tokenizer.vocabulary.items():
            table[index] = 0 if token == GPT2_END_OF_DOCUMENT else len(token)  # one character for each byte
    elif isinstance(tokenizer, SentencePieceTokenizer):
        processor = tokenizer.processor
        table = np.array([_piece_bytes(processor, index) for index in range(tokenizer.vocab_size)], dtype=np.int64)
        if processor.encode("a", out_type=str)[0].startswith(SPACE):
            starts = [processor.id_to_piece(index).startswith(SPACE) for index in range(tokenizer.vocab_size)]
            begins_with_space = np.array(starts) & (table > 0)
    else:
        raise TypeError(f"no table for a tokenizer of kind {tokenizer.kind}")
    return TokenBytes(table, begins_with_space, tokenizer.end_of_document_id)


def _piece_bytes(processor: Any, index: int) -> int:
    if processor.is_control(index) or processor.is_unknown(index) or processor.is_unused(index):
        return 0
    if processor.is_byte(index):
        return 1
    return len(processor.id_to_piece(index).replace(SPACE, " ").encode("utf-8"))

"""Tokenizers for Hugging Face folders: files that AutoTokenizer loads, with ids proved equal to megamoe's.

megamoe adds no special ids to a text and reads special tokens in it as text like any other; so do these files. What
ends a document also begins one: nothing else ever stands before a document's first token in training.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from megamoe.config.schema import TokenizerConfig
from megamoe.convert.sentencepiece_json import (
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    read_model,
    tokenizer_json,
)
from megamoe.data.tokenizers import (
    EOS_ID,
    GPT2_END_OF_DOCUMENT,
    PAD_ID,
    SPECIAL_TOKENS,
    Tokenizer,
    build_tokenizer,
    byte_characters,
)
from megamoe.errors import ConversionError

# Texts that every tokenizer must agree on, before any that are given.
PROBES = (
    "In the beginning God created the heaven and the earth.",
    "",
    " ",
    " one space before, one behind ",
    "two  spaces,   three, a tab\tand\n\nnewlines\r\n",
    "1234567890 + 0.5 = 12,345.67; it's we'll DON'T",
    "naïve café, Größe, Ελλάδα, Москва, 日本語テキスト, हिन्दी, العربية",
    "ﬁ ½ Ａ é e\u0301 \u00a0 \u3000 \u200b \ufeff \U0001f642\U0001f469\u200d\U0001f4bb",
    "def f(x):\n    return {'a': [x ** 2, -1]}  # done",
    "\x00\x07\x7f\u0085\u2028",
)
_SPELLED = "a </s> <s> <unk> <pad> <|endoftext|> b"
_EXCERPT = 60  # characters of a text that an error shows


@dataclass(frozen=True)
class SpecialIds:
    """Ids that config.json and generation_config.json carry; the same three for every kind of tokenizer."""

    bos: int
    eos: int
    pad: int

    def settings(self) -> dict[str, int]:
        """As transformers' configurations name them."""
        return {"bos_token_id": self.bos, "eos_token_id": self.eos, "pad_token_id": self.pad}


@dataclass(frozen=True)
class TokenizerExport:
    """Files of an export by name, the special ids, and how many texts were compared."""

    files: dict[str, bytes]
    special: SpecialIds
    num_compared_texts: int


def export_tokenizer(
    config: TokenizerConfig, *, model_rows: int, max_length: int, texts: Iterable[str] = ()
) -> TokenizerExport:
    """tokenizer.json, tokenizer_config.json, special_tokens_map.json, and the files that they were made from.

    Ids and decoded text of `PROBES` and `texts` are compared with megamoe's. `model_rows` is the number of rows of the
    model's embedding, `max_length` its context in tokens.

    Raises:
        DataError: the tokenizer's own files are missing or damaged.
        ConversionError: some text's ids differ (it is named), the model has too few rows, or there is no equal.
    """
    ours = build_tokenizer(config)
    if ours.vocab_size > model_rows:
        raise ConversionError(f"the tokenizer has {ours.vocab_size} ids, but the model {model_rows} rows for them")
    make = {"sentencepiece": _from_sentencepiece, "gpt2_bpe": _from_gpt2, "byte": _from_bytes}[config.kind]
    text, tokens, sources, extra_probes = make(config)
    num_compared = prove(ours, text, chain(PROBES, extra_probes, texts))
    vocabulary = _load(text).get_vocab(with_added_tokens=True)
    special = SpecialIds(*(vocabulary[tokens[role]] for role in ("bos_token", "eos_token", "pad_token")))
    if special.eos != ours.end_of_document_id or len(vocabulary) != ours.vocab_size:
        raise ConversionError(
            f"tokenizer.json ends documents with id {special.eos} and has {len(vocabulary)} ids, the {config.kind} "
            f"tokenizer has {ours.end_of_document_id} and {ours.vocab_size}"
        )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "add_bos_token": False,
        "add_eos_token": False,
        **tokens,
    }
    files = {
        "tokenizer.json": text.encode(),
        "tokenizer_config.json": _json(settings),
        "special_tokens_map.json": _json(tokens),
    }
    return TokenizerExport(files | sources, special, num_compared)


def prove(ours: Tokenizer, text: str, texts: Iterable[str]) -> int:
    """Compare ids, and what they decode to, of `texts` by megamoe's tokenizer and by a tokenizer.json; their number.

    Raises ConversionError with the first text that differs.
    """
    theirs, number = _load(text), 0
    unknown = theirs.token_to_id(SPECIAL_TOKENS[3])
    for number, line in enumerate(texts, start=1):
        own_ids, their_ids = ours.encode(line), theirs.encode(line, add_special_tokens=False).ids
        if own_ids != their_ids:
            raise ConversionError(_difference(line, own_ids, their_ids))
        # sentencepiece writes a sign of its own for the unknown.
        if unknown not in own_ids and ours.decode(own_ids) != theirs.decode(their_ids, skip_special_tokens=True):
            raise ConversionError(
                f"text {number}, {line[:_EXCERPT]!r}, decodes to {ours.decode(own_ids)[:_EXCERPT]!r} by megamoe's "
                f"tokenizer and to {theirs.decode(their_ids)[:_EXCERPT]!r} by tokenizer.json"
            )
    return number


def _difference(line: str, own_ids: Sequence[int], their_ids: Sequence[int]) -> str:
    at = next(
        (i for i, pair in enumerate(zip(own_ids, their_ids, strict=False)) if pair[0] != pair[1]),
        min(len(own_ids), len(their_ids)),
    )
    shown = line if len(line) <= 2 * _EXCERPT else f"{line[: 2 * _EXCERPT]}..."
    return (
        f"the text {shown!r} has other ids by tokenizer.json than by megamoe's tokenizer: from token {at} on, "
        f"{list(their_ids[at : at + 4])} and not {list(own_ids[at : at + 4])}"
    )


def _load(text: str) -> Any:
    from tokenizers import Tokenizer as HfTokenizer

    tokenizer = HfTokenizer.from_str(text)
    tokenizer.encode_special_tokens = True  # what split_special_tokens says to transformers
    return tokenizer


def _json(tree: dict[str, Any]) -> bytes:
    return (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode()


Made = tuple[str, dict[str, str], dict[str, bytes], list[str]]  # tokenizer.json, tokens by role, sources, more probes


def _from_sentencepiece(config: TokenizerConfig) -> Made:
    content = Path(config.path).read_bytes()
    model = read_model(content)
    end = model.pieces[model.ids["eos"]].text
    pad = model.pieces[model.ids["pad"]].text if model.ids["pad"] >= 0 else end
    (unknown,) = model.texts(UNKNOWN)
    tokens = {"bos_token": end, "eos_token": end, "pad_token": pad, "unk_token": unknown}
    probes = [_SPELLED, *model.texts(CONTROL)]
    for symbol in model.texts(USER_DEFINED):
        probes += [f"{symbol}a b{symbol}{symbol} c {symbol} d", f"a\n{symbol}", f" {symbol}"]
    return tokenizer_json(model), tokens, {"tokenizer.model": content}, probes


def _from_gpt2(config: TokenizerConfig) -> Made:
    from tokenizers import Tokenizer as HfTokenizer
    from tokenizers import models

    folder = Path(config.path)
    sources = {name: (folder / name).read_bytes() for name in ("vocab.json", "merges.txt")}
    lines = sources["merges.txt"].decode().split("\n")
    pairs = [line.rstrip("\r").split(" ") for line in lines if line.strip() and not line.startswith("#version")]
    vocabulary = json.loads(sources["vocab.json"])
    text = _byte_level(HfTokenizer(models.BPE(vocabulary, [(a, b) for a, b in pairs])), [GPT2_END_OF_DOCUMENT], True)
    return text, dict.fromkeys(("bos_token", "eos_token", "pad_token"), GPT2_END_OF_DOCUMENT), sources, [_SPELLED]


def _from_bytes(config: TokenizerConfig) -> Made:
    from tokenizers import Tokenizer as HfTokenizer
    from tokenizers import models

    end = SPECIAL_TOKENS[EOS_ID]
    tokens = {"bos_token": end, "eos_token": end, "pad_token": SPECIAL_TOKENS[PAD_ID]}
    text = _byte_level(HfTokenizer(models.BPE(byte_vocabulary(), [])), list(SPECIAL_TOKENS), False)
    return text, tokens, {}, [_SPELLED]


def byte_vocabulary() -> dict[str, int]:
    """The byte tokenizer's ids, by GPT-2's characters for bytes."""
    printable = {ord(character): character for character in byte_characters() if ord(character) < 256}
    others = iter([character for character in byte_characters() if ord(character) >= 256])
    by_byte = [printable[byte] if byte in printable else next(others) for byte in range(256)]
    return {token: number for number, token in enumerate([*SPECIAL_TOKENS, *by_byte])}


def _byte_level(tokenizer: Any, special: list[str], splits_words: bool) -> str:
    from tokenizers import AddedToken, decoders, pre_tokenizers

    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splits_words)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    return tokenizer.to_str(pretty=False)

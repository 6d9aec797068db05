"""A sentencepiece model as the tokenizers library's JSON, by the model's own normaliser, pieces and scores.

The model file is a protobuf message (sentencepiece_model.proto of google/sentencepiece). transformers 5 itself builds
tokenizers from such files, too, but others, which give other ids.
"""

import re
from dataclasses import dataclass
from typing import Any

from megamoe.data import protobuf
from megamoe.errors import ConversionError

SPACE = "\u2581"  # what sentencepiece writes for a space
UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_ALGORITHMS = {UNIGRAM: "unigram", BPE: "bpe", 3: "word", 4: "char"}


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its id is its place."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class Model:
    """What decides which ids a text gets."""

    algorithm: int
    pieces: tuple[Piece, ...]
    byte_fallback: bool
    space_is_suffix: bool
    charsmap: bytes
    adds_prefix: bool  # a space before the text
    removes_extra_spaces: bool
    escapes_spaces: bool
    ids: dict[str, int]  # unk, bos, eos, pad; -1: there is none

    def texts(self, kind: int) -> list[str]:
        return [piece.text for piece in self.pieces if piece.kind == kind]


def read_model(content: bytes) -> Model:
    """Parse a .model file that sentencepiece accepts. Raises ConversionError where the message is cut off."""
    try:
        parts = {1: [], 2: [], 3: []}
        for number, _, value in protobuf.fields(content):
            if number in parts:
                parts[number].append(value)
        trainer, normalizer = _fields(b"".join(parts[2])), _fields(b"".join(parts[3]))
        pieces = tuple(_piece(_fields(value)) for value in parts[1])
    except (IndexError, UnicodeDecodeError) as error:
        raise ConversionError(f"the sentencepiece model is damaged: {error}") from error
    defaults = {"unk": (40, 0), "bos": (41, 1), "eos": (42, 2), "pad": (43, -1)}
    return Model(
        algorithm=trainer.get(3, UNIGRAM),
        pieces=pieces,
        byte_fallback=bool(trainer.get(35, 0)),
        space_is_suffix=bool(trainer.get(24, 0)),
        charsmap=normalizer.get(2, b""),
        adds_prefix=bool(normalizer.get(3, 1)),
        removes_extra_spaces=bool(normalizer.get(4, 1)),
        escapes_spaces=bool(normalizer.get(5, 1)),
        ids={name: _signed(trainer.get(number, default)) for name, (number, default) in defaults.items()},
    )


def tokenizer_json(model: Model) -> str:
    """tokenizer.json of `model`, without special ids added to a text.

    Raises ConversionError for what the tokenizers library has no equal of.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers

    _check(model)
    tokenizer = Tokenizer(_unigram(model) if model.algorithm == UNIGRAM else _bpe(model))
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.removes_extra_spaces:
        # Not the library's Strip, which also takes line ends and other white space that is no space.
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    symbols = model.texts(USER_DEFINED)
    if model.adds_prefix:
        # Symbols are looked up in the normalised text, and are normalised for it themselves: alone they stay as they
        # are. (So a text that is one symbol and nothing else lacks the prefix.)
        alone = "|".join(map(re.escape, symbols))
        pattern = r"\A(?=[\s\S])" if not symbols else rf"\A(?!(?:{alone})\z)(?=[\s\S])"
        steps.append(normalizers.Replace(Regex(pattern), SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    if cuts := _cuts(model):
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(cuts)), "isolated")
    back: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.adds_prefix:
        back.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(back)
    special = [piece.text for piece in model.pieces if piece.kind in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    tokenizer.add_tokens([AddedToken(text, normalized=True, special=False) for text in symbols])
    return tokenizer.to_str(pretty=False)


def _check(model: Model) -> None:
    algorithm = _ALGORITHMS.get(model.algorithm, f"number {model.algorithm}")
    if model.algorithm not in (UNIGRAM, BPE):
        raise ConversionError(f"the sentencepiece model is of the kind {algorithm}: only bpe and unigram convert")
    if model.space_is_suffix or not model.escapes_spaces:
        raise ConversionError("the sentencepiece model treats spaces as suffixes or leaves them as they are: no such "
                              "tokenizer.json can be written")  # fmt: skip
    if unused := model.texts(UNUSED):
        raise ConversionError(f"the sentencepiece model has unused pieces, such as {unused[0]!r}, which do not convert")
    if len(model.texts(UNKNOWN)) != 1:
        raise ConversionError("the sentencepiece model must have one unknown piece")
    if len({piece.text for piece in model.pieces}) != len(model.pieces):
        raise ConversionError("the sentencepiece model has a piece twice")


def _unigram(model: Model) -> Any:
    from tokenizers import models

    lowest = min(piece.score for piece in model.pieces if piece.kind == NORMAL)
    # The library lets every entry match in the text; a special one must lose against pieces. See also `_cuts`.
    never = [lowest - (len(piece.text) + 1) * abs(lowest) for piece in model.pieces]
    vocabulary = [
        (piece.text, piece.score if piece.kind in (NORMAL, USER_DEFINED, BYTE) else score)
        for piece, score in zip(model.pieces, never, strict=True)
    ]
    (unknown,) = model.texts(UNKNOWN)
    number = next(i for i, piece in enumerate(model.pieces) if piece.text == unknown)
    return models.Unigram(vocabulary, unk_id=number, byte_fallback=model.byte_fallback)


def _cuts(model: Model) -> list[str]:
    """Places inside of spelled special pieces where a unigram text is cut, as patterns, so that none can match.

    They are needed where a character of the special piece is in no other: what stands for the unknown loses against
    every entry. No piece crosses such a cut, for no piece has that character; known on its other side, it also parts no
    two unknown characters, which become one unknown token.
    """
    if model.algorithm != UNIGRAM:
        return []
    known = {character for piece in model.pieces if piece.kind == NORMAL for character in piece.text}
    cuts = []
    for text in model.texts(CONTROL) + model.texts(UNKNOWN):
        places = [i for i in range(1, len(text)) if (text[i - 1] in known) != (text[i] in known)]
        if not places and model.byte_fallback and text[0] not in known and len(text) > 1:
            places = [1]  # all unknown: bytes are the same on both sides of a cut
        cuts += [f"(?<={re.escape(text[:i])})(?={re.escape(text[i:])})" for i in places[:1]]
    return cuts


def _bpe(model: Model) -> Any:
    from tokenizers import models

    numbers = {piece.text: number for number, piece in enumerate(model.pieces)}
    normal = {piece.text: piece.score for piece in model.pieces if piece.kind == NORMAL}
    merges = []
    for text, score in normal.items():
        # A piece may come about in several ways; sentencepiece takes any of them, by the piece's score alone.
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in normal and right in normal:
                merges.append((-score, numbers[left], numbers[right], (left, right)))
    (unknown,) = model.texts(UNKNOWN)
    return models.BPE(
        numbers, [pair for *_, pair in sorted(merges)], unk_token=unknown, fuse_unk=True,
        byte_fallback=model.byte_fallback,
    )  # fmt: skip


def _piece(fields: dict[int, Any]) -> Piece:
    return Piece(fields.get(1, b"").decode(), fields.get(2, 0.0), fields.get(3, NORMAL))


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _fields(content: bytes) -> dict[int, Any]:
    """The last value of each field of a message."""
    return {number: value for number, _, value in protobuf.fields(content)}

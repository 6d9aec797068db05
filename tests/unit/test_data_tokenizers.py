"""Tokenizers: text survives the round trip, ids are stable, damaged model files are refused."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.config.schema import TokenizerConfig
from megamoe.data.manifest import check_tokenizer, write_manifest
from megamoe.data.tokenizer_training import TrainingSettings, train_tokenizer
from megamoe.data.tokenizers import build_tokenizer, byte_characters
from megamoe.errors import DataError

TEXTS = [
    "In the beginning God created the heaven and the earth.",
    "",
    " ",
    "  two  spaces, a tab\tand\n\nnewlines\r\n",
    "naïve café, 日本語, \U0001f642, \x00 and </s> <unk> <|endoftext|> as text",
    "1234567890 + 0.5",
]
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "then",
    "it",
    "sleeps",
    "for",
    "hours",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    lines = [" ".join(WORDS[(7 * i + j * j) % len(WORDS)] for j in range(12)) + f" {i}." for i in range(400)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module", params=["byte", "bpe", "unigram", "gpt2_bpe"])
def config(request, corpus, tmp_path_factory) -> TokenizerConfig:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "byte":
        return TokenizerConfig(kind="byte")
    if request.param == "gpt2_bpe":
        write_gpt2_files(folder)
        return TokenizerConfig(kind="gpt2_bpe", path=str(folder))
    training = TrainingSettings((str(corpus),), str(folder / "m"), vocab_size=300, model_type=request.param)
    train_tokenizer(training)
    return TokenizerConfig(kind="sentencepiece", path=str(folder / "m.model"))


def write_gpt2_files(folder: Path) -> None:
    tokens = [*byte_characters(), "th", "the", "Ġthe", "in", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e\nĠ the\ni n\n", encoding="utf-8")


def test_round_trip(config):
    tokenizer = build_tokenizer(config)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert all(0 <= index < tokenizer.vocab_size for index in ids)
        assert tokenizer.end_of_document_id not in ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([*ids, tokenizer.end_of_document_id]) == text
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.encode_batch([]) == []


def test_round_trip_of_any_text(config):
    tokenizer = build_tokenizer(config)

    @settings(deadline=None)
    @given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=40))
    def round_trip(text: str) -> None:
        assert tokenizer.decode(tokenizer.encode(text)) == text

    round_trip()


def test_ids_outside_the_vocabulary_are_refused(config):
    tokenizer = build_tokenizer(config)
    size = tokenizer.vocab_size
    for wrong in (-1, size):
        with pytest.raises(DataError) as caught:
            tokenizer.decode([5, wrong])
        assert str(caught.value) == f"id {wrong} is outside the vocabulary of {size} (valid: 0 to {size - 1})"


def test_descriptions_tell_tokenizers_apart(config, tmp_path):
    tokenizer = build_tokenizer(config)
    description = tokenizer.describe()
    assert description == build_tokenizer(config).describe()
    check_tokenizer(tmp_path / "unknown", description)
    write_manifest(tmp_path / "corpus", {"tokenizer": description})
    check_tokenizer(tmp_path / "corpus", description)
    with pytest.raises(DataError, match=r"was written with another tokenizer than .* its vocab_size is"):
        check_tokenizer(tmp_path / "corpus", {**description, "vocab_size": 7})


def test_byte_ids():
    tokenizer = build_tokenizer(TokenizerConfig(kind="byte"))
    assert (tokenizer.vocab_size, tokenizer.end_of_document_id) == (260, 2)
    assert tokenizer.encode("Aé") == [4 + 65, 4 + 0xC3, 4 + 0xA9]
    assert tokenizer.decode([0, 1, 69, 2, 3, 4 + 0xC3]) == "A\ufffd"


@pytest.mark.parametrize("config", ["bpe", "unigram"], indirect=True)
def test_sentencepiece_ids(config):
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=config.path)
    assert [processor.id_to_piece(index) for index in range(5)] == ["<s>", "<pad>", "</s>", "<unk>", "<0x00>"]
    tokenizer = build_tokenizer(config)
    assert (tokenizer.vocab_size, tokenizer.end_of_document_id) == (300, 2)
    assert tokenizer.encode("\n")[-1] == 4 + 10


def test_gpt2_ids(tmp_path):
    write_gpt2_files(tmp_path)
    tokenizer = build_tokenizer(TokenizerConfig(kind="gpt2_bpe", path=str(tmp_path)))
    assert (tokenizer.vocab_size, tokenizer.end_of_document_id) == (261, 260)
    assert tokenizer.encode("the the!") == [257, 258, ord("!") - 33]
    assert tokenizer.encode("thin") == [256, 259]
    # Merges stop at GPT-2's word boundaries: "Ġ" belongs to the next word, never to the one before.
    assert tokenizer.encode("in the") == [259, 258]


def error_of(config: TokenizerConfig) -> str:
    with pytest.raises(DataError) as caught:
        build_tokenizer(config)
    return str(caught.value)


def test_missing_paths(tmp_path):
    assert error_of(TokenizerConfig(kind="sentencepiece")) == (
        "tokenizer kind sentencepiece needs a path: the .model file"
    )
    assert error_of(TokenizerConfig(kind="gpt2_bpe")) == (
        "tokenizer kind gpt2_bpe needs a path: the folder of vocab.json and merges.txt"
    )
    assert error_of(TokenizerConfig(kind="sentencepiece", path=str(tmp_path / "no.model"))) == (
        f"cannot read the sentencepiece model {tmp_path}/no.model: No such file or directory"
    )
    assert error_of(TokenizerConfig(kind="gpt2_bpe", path=str(tmp_path))) == (
        f"cannot read the vocabulary {tmp_path}/vocab.json: No such file or directory"
    )


def test_damaged_sentencepiece_models(corpus, tmp_path):
    train_tokenizer(TrainingSettings((str(corpus),), str(tmp_path / "m"), vocab_size=300))
    whole = (tmp_path / "m.model").read_bytes()
    damaged = tmp_path / "damaged.model"
    config = TokenizerConfig(kind="sentencepiece", path=str(damaged))
    for size in [*range(200), *range(len(whole) - 700, len(whole))]:  # ends between pieces are among them
        damaged.write_bytes(whole[:size])
        assert error_of(config) == (f"{damaged} is not a sentencepiece model, or is damaged or cut off ({size} bytes)")
    damaged.write_bytes(b"this is no model at all")
    assert "is not a sentencepiece model" in error_of(config)
    damaged.write_bytes(whole)
    assert build_tokenizer(config).vocab_size == 300


def test_damaged_gpt2_files(tmp_path):
    config = TokenizerConfig(kind="gpt2_bpe", path=str(tmp_path))
    write_gpt2_files(tmp_path)
    vocab_path, merges_path = tmp_path / "vocab.json", tmp_path / "merges.txt"
    vocab = vocab_path.read_text()
    vocab_path.write_text(vocab[:100])
    assert error_of(config).startswith(f"{vocab_path} is damaged: no valid JSON (")
    vocab_path.write_text(vocab.replace("260", "261"))
    assert error_of(config) == f"{vocab_path} is damaged: it must map tokens to the ids 0, 1, 2, ... each used once"
    vocab_path.write_text(vocab.replace("<|endoftext|>", "<end>"))
    assert error_of(config) == f"{vocab_path} has no token <|endoftext|>, which marks ends of documents"
    vocab_path.write_text(vocab.replace('"A"', '"AAA"'))
    assert error_of(config) == f"{vocab_path} lacks 1 of the 256 byte tokens, the first is 'A'"
    vocab_path.write_text(vocab)
    merges_path.write_text("#version: 0.2\nt h\nx y\n")
    assert error_of(config) == (f"{merges_path}, line 3: 'x y' is no merge of two tokens of vocab.json into a third")
    merges_path.write_text("#version: 0.2\n")
    assert error_of(config) == f"{merges_path} holds no merges"
    merges_path.unlink()
    assert error_of(config) == f"cannot read the merges {merges_path}: No such file or directory"

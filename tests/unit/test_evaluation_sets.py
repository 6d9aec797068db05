"""SETS.yaml, what a set is known by, how it is cut into windows, and how many bytes its tokens stand for."""

import errno
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from megamoe.config.schema import TokenizerConfig
from megamoe.data.indexed import IndexedDataset, IndexedWriter
from megamoe.data.token_bytes import token_bytes
from megamoe.data.tokenizer_training import TrainingSettings, train_tokenizer
from megamoe.data.tokenizers import ByteTokenizer, Gpt2BpeTokenizer, SentencePieceTokenizer, byte_characters
from megamoe.errors import ConfigError, DataError
from megamoe.evaluation.corpora import check_sets, open_set, tokenize
from megamoe.evaluation.sets import EvaluationSet, EvaluationSets, TextSet, read_sets, settled_sets, single_text
from megamoe.evaluation.sums import Sums
from megamoe.evaluation.windows import plan_windows

TEXTS = ["Größe zählt.\n", "日本語 text, two lines\nand more\n", "x", " leading and  double blanks"]
BYTE = TokenizerConfig()


def sets_file(folder: Path, text: str) -> Path:
    path = folder / "sets.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "sets: [{name: a, path: b, formt: text}]",
            'unknown key "sets[0].formt" in {path}: did you mean "sets[0].format"?',
        ),
        ("set: []", 'unknown key "set" in {path}: did you mean "sets"?'),
        ("learning_rate: 1", 'unknown key "learning_rate" in {path}: the keys are sets, reading, context_tokens, '
         "stride_tokens"),
        (
            "sets: [{name: a, path: b, reading: lines}]",
            'sets[0].reading is "lines" in {path}: it must be one of blocks, documents or null',
        ),
        (
            "sets: [{path: b}]",
            "sets[0].name is missing in {path}: it must be text of letters, digits and ._- (at most 100)",
        ),
        (
            "sets: [{name: a b, path: b}]",
            'sets[0].name is "a b" in {path}: it must be text of letters, digits and ._- (at most 100)',
        ),
        (
            "sets: [{name: a, path: b, max_tokens: 0}]",
            "sets[0].max_tokens is 0 in {path}: it must be a whole number of at least 1 or null",
        ),
        (
            "sets: [{name: a, path: b}, {name: a, path: c}]",
            'two sets of {path} are named "a": give each a name of its own',
        ),
    ],
)  # fmt: skip
def test_a_file_that_is_wrong_is_answered_in_one_sentence(text, message, tmp_path):
    path = sets_file(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_sets(path)
    assert str(caught.value) == message.format(path=path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"context_tokens": 65},
            "set a: context_tokens 65 is longer than the model's sequences: use at most 64",
        ),
        (
            {"reading": "documents", "stride_tokens": 33, "context_tokens": 32},
            "set a: stride_tokens 33 is longer than its context of 32 tokens, so that tokens would be left out: use at "
            "most 32",
        ),
        (
            {"stride_tokens": 3},
            "set a: stride_tokens is for reading documents, but it is read in blocks: leave it out, or set reading: "
            "documents",
        ),
        (
            {"path": "gone/*.txt"},
            "set a: no file matches gone/*.txt: give a text file, a .jsonl file, a glob, or the path of a .bin/.idx "
            "pair without the ending",
        ),
        ({"path": "gone", "format": "indexed"}, "set a: cannot open gone.idx (No such file or directory)"),
    ],
)
def test_settings_that_do_not_fit_are_answered_in_one_sentence(settings, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here.txt").write_text("text")
    found = EvaluationSets(sets=(EvaluationSet(**{"name": "a", "path": "here.txt", **settings}),))
    with pytest.raises((ConfigError, DataError)) as caught:
        settled_sets(found, seq_length=64)
    assert str(caught.value) == message


def test_a_stride_that_no_set_would_use_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    found = single_text(tmp_path / "a.txt")
    with pytest.raises(ConfigError) as caught:
        settled_sets(found, seq_length=64, stride_tokens=4)
    assert str(caught.value) == (
        "--stride is for reading documents, but all sets are read in blocks: leave it out, or add --reading documents"
    )
    with pytest.raises(ConfigError) as caught:
        settled_sets(found.model_copy(update={"stride_tokens": 4}), seq_length=64)
    assert str(caught.value) == (
        "stride_tokens is for reading documents, but all sets are read in blocks: leave it out, or set reading: "
        "documents"
    )
    one, other = found.sets[0], found.sets[0].model_copy(update={"name": "b", "reading": "documents"})
    mixed = EvaluationSets(sets=(one, other), stride_tokens=4)
    assert [text.settings.stride_tokens for text in settled_sets(mixed, seq_length=64)] == [None, 4]


def test_a_text_in_place_of_a_path_is_answered_in_one_sentence(tmp_path):
    advice = "give a text file, a .jsonl file, a glob, or the path of a .bin/.idx pair without the ending"
    text = "This is a text and no path. " * 20
    with pytest.raises(DataError) as caught:
        settled_sets(single_text(Path(text)), seq_length=64)
    assert str(caught.value).endswith(f": cannot look for a file (File name too long) at {text[:100]}…: {advice}")
    with pytest.raises(DataError, match="no file matches"):
        settled_sets(EvaluationSets(sets=(EvaluationSet(name="a", path="nul\0"),)), seq_length=64)
    longest = tmp_path / ("x" * 253)  # with .idx behind it, it would be too long
    longest.write_text("text")
    (found,) = settled_sets(single_text(longest), seq_length=64)
    assert found.settings.format == "text"


def test_a_folder_that_cannot_be_looked_into_is_named(monkeypatch):
    def denied(path, **_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("os.stat", denied)  # root may look into every folder
    with pytest.raises(DataError) as caught:
        settled_sets(single_text(Path("/secret/a.txt")), seq_length=64)
    assert str(caught.value).startswith(
        "set a.txt: cannot look for a file (Permission denied) at /secret/a.txt: give a text file"
    )


def test_the_set_the_file_and_the_command_are_asked_in_this_order(tmp_path):
    for name in ("a.txt", "b.jsonl"):
        (tmp_path / name).write_text("{}")
    path = sets_file(
        tmp_path,
        f"context_tokens: 32\nsets:\n  - {{name: a, path: {tmp_path}/a.txt, reading: documents}}\n"
        f"  - {{name: b, path: {tmp_path}/b.jsonl, context_tokens: 16, domain: near}}\n",
    )
    one, other = (text.settings for text in settled_sets(read_sets(path), seq_length=64, context_tokens=8))
    assert (one.reading, one.context_tokens, one.stride_tokens, one.format) == ("documents", 32, 16, "text")
    assert (other.reading, other.context_tokens, other.stride_tokens, other.format) == ("blocks", 16, None, "jsonl")
    (alone,) = settled_sets(single_text(tmp_path / "a.txt"), seq_length=64, reading="documents", stride_tokens=3)
    assert (alone.settings.name, alone.settings.context_tokens, alone.settings.stride_tokens) == ("a.txt", 64, 3)
    assert TextSet.from_description(json.loads(json.dumps(alone.describe()))) == alone


def test_a_set_is_known_by_the_content_of_its_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    (before,) = settled_sets(single_text(path), seq_length=64)
    path.write_text("two")
    (after,) = settled_sets(single_text(path), seq_length=64)
    assert before.files[0]["size_bytes"] == after.files[0]["size_bytes"] and before.files != after.files
    path.write_text("one")
    assert settled_sets(single_text(path), seq_length=64) == (before,)


def write(prefix: Path, lengths: list[int]) -> IndexedDataset:
    with IndexedWriter(prefix, 1000) as writer:
        writer.add_documents(np.arange(sum(lengths)).astype(writer.dtype), np.array(lengths))
    return IndexedDataset(prefix)


@pytest.mark.parametrize(("context", "stride"), [(8, 8), (8, 3), (5, 1), (1, 1), (64, 32)])
def test_each_token_of_a_document_is_scored_once_with_its_context(context, stride, tmp_path):
    lengths = [3, 0, 8, 9, 30, 1]
    corpus = write(tmp_path / "text", lengths)
    settings = EvaluationSet(
        name="a", path="", reading="documents", context_tokens=context, stride_tokens=stride
    )
    plan = plan_windows(corpus, settings, end_of_document_id=999, vocab_size=1000)
    windows = list(plan.windows())
    scored = []
    for window in windows:
        ids = plan.tokens(window)
        start = corpus.document_start(window.unit)
        before = window.first_scored - start  # tokens of the document before the first that counts
        assert window.length <= context
        assert window.length - window.scored >= min(before, context - stride)
        assert (ids[0] == 999) == (window.index == 0)
        expected = np.arange(window.first, window.first + window.length + 1)  # ids are their positions
        np.testing.assert_array_equal(ids[1:], expected[1:])
        assert ids[0] in (expected[0], 999)
        scored += range(window.first_scored, window.first_scored + window.scored)
        assert window.ends_unit == (scored[-1] == start + lengths[window.unit] - 1)
    assert scored == list(range(sum(lengths))) and plan.span == (0, sum(lengths))
    for number, window in enumerate(windows):  # from any place on
        assert list(plan.windows(window.unit, window.index)) == windows[number:]


def test_limits_take_the_first_documents_and_blocks(tmp_path):
    corpus = write(tmp_path / "text", [10, 10, 10, 10])

    def plan(**settings):
        chosen = EvaluationSet(**{"name": "a", "path": "", "context_tokens": 4, "stride_tokens": 2, **settings})
        found = plan_windows(corpus, chosen, end_of_document_id=0, vocab_size=1000)
        return found.num_units, found.num_documents, found.span

    assert plan(reading="documents") == (4, 4, (0, 40))
    assert plan(reading="documents", max_documents=3) == (3, 3, (0, 30))
    assert plan(reading="documents", max_tokens=10) == (1, 1, (0, 10))
    assert plan(reading="documents", max_tokens=11) == (2, 2, (0, 20))
    assert plan(reading="documents", max_tokens=1000) == (4, 4, (0, 40))
    assert plan(reading="blocks") == (9, 4, (1, 37))
    assert plan(reading="blocks", max_documents=2) == (4, 2, (1, 17))
    assert plan(reading="blocks", max_tokens=9) == (2, 1, (1, 9))
    with pytest.raises(DataError, match="set a has 40 tokens, of which max_tokens allows 3: one block of context_tok"):
        plan(reading="blocks", max_tokens=3)


def test_documents_without_a_token_are_refused(tmp_path):
    write(tmp_path / "text", [0, 0, 5])
    chosen = EvaluationSet(name="a", path=str(tmp_path / "text"), reading="documents", max_documents=2)
    with pytest.raises(DataError) as caught:
        check_sets(settled_sets(EvaluationSets(sets=(chosen,)), seq_length=8), tokenizer=BYTE, vocab_size=260)
    assert str(caught.value) == (
        "set a has no token in the documents that are chosen (2 of 3), so that there is nothing to score: choose more "
        "with max_documents, or name other data"
    )
    enough = chosen.model_copy(update={"max_documents": 3})
    assert check_sets(settled_sets(EvaluationSets(sets=(enough,)), seq_length=8), tokenizer=BYTE, vocab_size=260) == []


def gpt2_folder(folder: Path) -> Path:
    characters = byte_characters()
    merges = [("Ã", "¤"), ("o", "r"), ("Ġ", "t")]
    tokens = [*characters, *("".join(pair) for pair in merges), "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def tokenizers(folder: Path) -> list:
    corpus = folder / "corpus.txt"
    corpus.write_text("\n\n".join(TEXTS * 30), encoding="utf-8")
    settings = TrainingSettings(inputs=(str(corpus),), output=str(folder / "pieces"), vocab_size=320)
    train_tokenizer(settings)
    pieces = SentencePieceTokenizer(folder / "pieces.model")
    return [ByteTokenizer(), Gpt2BpeTokenizer(gpt2_folder(folder / "bpe")), pieces]


def test_bytes_of_ids_add_up_to_those_of_the_text(tmp_path):
    for tokenizer in tokenizers(tmp_path):
        counts, end = token_bytes(tokenizer), tokenizer.end_of_document_id
        for text in TEXTS:
            ids = np.array([*tokenizer.encode(text), end, end])
            assert counts.count(ids, end) == len(text.encode("utf-8")), (tokenizer.kind, text)
            parts = counts.count(ids[:3], end) + counts.count(ids[3:], int(ids[2]))  # cut anywhere, characters too
            assert parts == counts.count(ids, end)


def test_text_is_tokenized_once_and_its_bytes_are_known(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"body": text}) + "\n" for text in TEXTS)
    found = EvaluationSets(
        sets=(EvaluationSet(name="a", path=str(tmp_path / "a.jsonl.gz"), json_key="body"),), reading="documents"
    )
    (text,) = settled_sets(found, seq_length=8)
    said = []
    tokenize(text, ByteTokenizer(), tmp_path / "made" / "000-a", said.append)
    written = (tmp_path / "made" / "000-a.bin").stat().st_mtime_ns
    tokenize(text, ByteTokenizer(), tmp_path / "made" / "000-a", said.append)
    assert (tmp_path / "made" / "000-a.bin").stat().st_mtime_ns == written and len(said) == 1
    opened = open_set(text, tmp_path / "made" / "000-a", tokenizer=BYTE, vocab_size=260)
    num_bytes = sum(len(each.encode()) for each in TEXTS)
    assert opened.plan.span == (0, num_bytes + len(TEXTS))  # bytes are tokens, and each document's end is one
    assert opened.text_bytes(0) == num_bytes == opened.bytes_between(0, num_bytes + len(TEXTS))
    (blocks,) = settled_sets(found.model_copy(update={"reading": "blocks"}), seq_length=8)
    opened = open_set(blocks, tmp_path / "made" / "000-a", tokenizer=BYTE, vocab_size=260)
    first, last = opened.plan.span
    joined = b"\0".join(each.encode() for each in TEXTS) + b"\0"
    assert opened.text_bytes(0) == len(joined[first:last].replace(b"\0", b""))


def test_a_line_without_the_key_is_told_with_what_an_evaluation_can_set(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    (text,) = settled_sets(single_text(tmp_path / "a.jsonl"), seq_length=8)
    with pytest.raises(DataError) as caught:
        tokenize(text, ByteTokenizer(), tmp_path / "made")
    assert str(caught.value) == (
        f"{tmp_path}/a.jsonl, line 1: no key 'text' (keys here: body); name another as the set's json_key in a file of "
        "--sets"
    )


def test_tokenizing_ends_where_the_limits_are_reached(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(["ten bytes"] * 50))
    for limits, documents in (({"max_documents": 7}, 7), ({"max_tokens": 30}, 4), ({}, 50)):
        found = EvaluationSets(sets=(EvaluationSet(name="a", path=str(tmp_path / "a.txt"), **limits),))
        (text,) = settled_sets(found, seq_length=8)
        tokenize(text, ByteTokenizer(), tmp_path / f"made{documents}")
        assert IndexedDataset(tmp_path / f"made{documents}").num_documents == documents


def test_bytes_of_a_foreign_dataset_are_not_guessed(tmp_path):
    prefix = tmp_path / "text"
    write(prefix, [10, 10])
    manifest = {"format_version": 1, "tokenizer": {"kind": "sentencepiece", "vocab_size": 900, "sha256": "0",
                                                   "end_of_document_id": 3}}  # fmt: skip
    Path(f"{prefix}.json").write_text(json.dumps(manifest))
    (text,) = settled_sets(EvaluationSets(sets=(EvaluationSet(name="a", path=str(prefix)),)), seq_length=8)
    opened = open_set(text, tmp_path / "none", tokenizer=BYTE, vocab_size=1000)
    assert opened.text_bytes(5) is None and opened.plan.end_of_document_id == 3
    assert opened.notes[0].startswith("set a: its bytes are not counted, for ")
    with pytest.raises(DataError, match=r"was written with a tokenizer of 900 ids, but model.vocab_size is 500"):
        open_set(text, tmp_path / "none", tokenizer=BYTE, vocab_size=500)


def test_a_dataset_without_a_description_is_read_with_the_models_vocabulary(tmp_path):
    """As Megatron's tools leave one. Its ids are their positions: 0 to 299, of which the byte tokenizer has 260."""
    prefix = tmp_path / "text"
    write(prefix, [100, 200])
    (text,) = settled_sets(EvaluationSets(sets=(EvaluationSet(name="a", path=str(prefix)),)), seq_length=8)
    opened = open_set(text, tmp_path / "none", tokenizer=BYTE, vocab_size=1000)
    assert opened.notes == () and opened.plan.tokens(list(opened.plan.windows())[-1])[-1] == 296
    sums = Sums()
    sums.add_bytes(opened.bytes_between(0, 200))
    assert sums.num_bytes == 196  # the first four are special
    sums.add_bytes(opened.bytes_between(200, 297))
    sums.add_bytes(opened.bytes_between(0, 200))
    assert Sums.from_json(json.loads(json.dumps(sums.to_json()))).num_bytes is None
    assert opened.text_bytes(sums.num_bytes) is None
    assert opened.why_uncounted() == (
        "set a: its bytes are not counted, for it has ids beyond the 260 of data.tokenizer: name the tokenizer that "
        "made it, as in data.tokenizer.path=…"
    )
    with pytest.raises(DataError, match=r"text.bin, token 250: id 250 is outside the vocabulary of 250"):
        open_set(text, tmp_path / "none", tokenizer=BYTE, vocab_size=250).bytes_between(240, 260)


def test_what_ends_documents_is_not_guessed(tmp_path):
    prefix = tmp_path / "text"
    write(prefix, [100, 200])
    found = EvaluationSets(sets=(EvaluationSet(name="a", path=str(prefix)),), reading="documents")
    texts = settled_sets(found, seq_length=8)
    with pytest.raises(DataError) as caught:
        check_sets(texts, tokenizer=BYTE, vocab_size=1000)
    assert str(caught.value) == (
        f"set a: nothing says which id ends the documents of {prefix}, for there is no {prefix}.json and "
        "data.tokenizer is not set: name the tokenizer that made it, as in data.tokenizer.kind=… "
        "data.tokenizer.path=…, or read it in blocks"
    )
    assert check_sets(texts, tokenizer=BYTE, vocab_size=1000, names_tokenizer=True) == []
    assert check_sets(texts, tokenizer=BYTE, vocab_size=260) == []  # a model of bytes: there is no other tokenizer
    bpe = TokenizerConfig(kind="gpt2_bpe", path=str(gpt2_folder(tmp_path / "bpe")))
    assert check_sets(texts, tokenizer=bpe, vocab_size=1000) == []
    with pytest.raises(DataError, match=r"set a: its documents end with id 259, but model.vocab_size is 200: name"):
        check_sets(texts, tokenizer=bpe, vocab_size=200)
    tree = {"kind": "sentencepiece", "vocab_size": 900, "sha256": "0", "end_of_document_id": 3}
    Path(f"{prefix}.json").write_text(json.dumps({"format_version": 1, "tokenizer": tree}))
    (note,) = check_sets(texts, tokenizer=BYTE, vocab_size=1000)
    assert note.startswith("set a: its bytes are not counted, for ")

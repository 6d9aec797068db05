"""Blocks, splits, epochs and blends: every block once per epoch, in an order that only (seed, epoch, index) decide."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.config.schema import Corpus, DataConfig
from megamoe.data.datasets import cut_blocks, open_blend, open_splits
from megamoe.data.indexed import IndexedDataset, IndexedWriter
from megamoe.errors import DataError

SEQ_LENGTH = 8


def write(prefix: Path, num_tokens: int, first: int = 0, vocab_size: int = 70_000) -> str:
    """A corpus whose token t is first + t, in documents of 1 to 13 tokens: a sample shows where it was cut."""
    with IndexedWriter(prefix, vocab_size) as writer:
        tokens = np.arange(first, first + num_tokens, dtype=writer.dtype)
        at, length = 0, 1
        while at < num_tokens:
            piece = tokens[at : at + length]
            writer.add_documents(piece, np.array([len(piece)]))
            at, length = at + length, length % 13 + 1
    return str(prefix)


def open_one(path: str, *, seed: int = 1, **changes):
    data = DataConfig(train=(Corpus(path=path),), **changes)
    return open_splits(data, seq_length=SEQ_LENGTH, vocab_size=70_000, seed=seed)


def blocks_of(dataset, span) -> list[int]:
    return [int(dataset.sample(index)[0]) // SEQ_LENGTH for index in span]


def test_blocks_overlap_by_one_token_and_cross_documents(tmp_path):
    splits = open_one(write(tmp_path / "a", 50 * SEQ_LENGTH + 1), split=(0.8, 0.2, 0.0))
    assert (splits.train.num_samples, splits.valid.num_samples, splits.test) == (40, 10, None)
    for index in range(40):
        sample = splits.train.sample(index)
        assert sample.dtype == np.int64
        assert sample.shape == (SEQ_LENGTH + 1,)
        assert sample[0] % SEQ_LENGTH == 0
        assert (np.diff(sample) == 1).all()


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(17, 2), (16, 1), (9, 1)])
def test_number_of_blocks(tmp_path, num_tokens, num_blocks):
    assert open_one(write(tmp_path / "a", num_tokens), split=(1.0, 0.0, 0.0)).train.num_samples == num_blocks


def test_every_block_once_per_epoch_and_other_epochs_in_other_order(tmp_path):
    train = open_one(write(tmp_path / "a", 60 * SEQ_LENGTH + 5), split=(1.0, 0.0, 0.0)).train
    epochs = [blocks_of(train, range(60 * epoch, 60 * epoch + 60)) for epoch in range(3)]
    assert all(sorted(blocks) == list(range(60)) for blocks in epochs)
    assert epochs[0] != list(range(60))
    assert epochs[0] != epochs[1] != epochs[2]


def test_order_depends_on_the_seed_and_nothing_else(tmp_path):
    path = write(tmp_path / "a", 60 * SEQ_LENGTH + 5)
    one, again, other = (open_one(path, seed=seed).train for seed in (1, 1, 2))
    backwards = blocks_of(again, reversed(range(150)))[::-1]  # what was read before leaves no trace
    assert blocks_of(one, range(150)) == backwards
    assert blocks_of(one, range(58)) != blocks_of(other, range(58))


def test_resume_in_mid_epoch_yields_the_unseen_rest(tmp_path):
    path = write(tmp_path / "a", 60 * SEQ_LENGTH + 5)
    seen = blocks_of(open_one(path, split=(1.0, 0.0, 0.0)).train, range(23))
    rest = blocks_of(open_one(path, split=(1.0, 0.0, 0.0)).train, range(23, 60))
    assert sorted(seen + rest) == list(range(60))


def test_splits_are_contiguous_and_held_out_samples_unshuffled(tmp_path):
    splits = open_one(write(tmp_path / "a", 100 * SEQ_LENGTH + 1), split=(8, 1, 1))
    assert sorted(blocks_of(splits.train, range(80))) == list(range(80))
    assert blocks_of(splits.valid, range(25)) == [80 + index % 10 for index in range(25)]
    assert blocks_of(splits.test, range(10)) == list(range(90, 100))


def test_own_corpora_for_validation(tmp_path):
    train = write(tmp_path / "a", 100 * SEQ_LENGTH + 1)
    held_out = write(tmp_path / "b", 10 * SEQ_LENGTH + 1, first=8000)
    splits = open_one(train, valid=(Corpus(path=held_out),), split=(0.9, 0.1, 0.0))
    assert (splits.train.num_samples, splits.valid.num_samples, splits.test) == (100, 10, None)
    assert blocks_of(splits.valid, range(3)) == [1000, 1001, 1002]
    alone = open_blend([Corpus(path=held_out)], seq_length=SEQ_LENGTH, vocab_size=70_000)
    assert blocks_of(alone, range(3)) == [1000, 1001, 1002]


@settings(deadline=None)
@given(num_blocks=st.integers(3, 500), shares=st.lists(st.floats(0.0, 5.0), min_size=3, max_size=3).filter(any))
def test_cut_blocks_covers_everything_once(num_blocks, shares):
    class Sized:
        prefix, num_tokens = "corpus", num_blocks * SEQ_LENGTH + 1

    cuts = cut_blocks(Sized, shares, SEQ_LENGTH)
    assert [block for cut in cuts for block in cut] == list(range(num_blocks))
    for share, cut in zip(shares, cuts, strict=True):
        if share == 0.0:
            assert len(cut) == 0
        else:
            assert len(cut) >= 1
            assert abs(len(cut) - share / sum(shares) * num_blocks) <= 2


def blend_of(tmp_path, weights, num_blocks, **changes):
    corpora = tuple(
        Corpus(path=write(tmp_path / f"c{number}", count * SEQ_LENGTH + 1, first=8000 * number), weight=weight)
        for number, (weight, count) in enumerate(zip(weights, num_blocks, strict=True))
    )
    data = DataConfig(train=corpora, **{"split": (1.0, 0.0, 0.0)} | changes)
    return open_splits(data, seq_length=SEQ_LENGTH, vocab_size=70_000, seed=1)


def test_blend_proportions_and_epochs_of_its_members(tmp_path):
    train = blend_of(tmp_path, (0.5, 0.3, 0.2), (20, 60, 40)).train
    assert train.num_samples == 120
    order = [divmod(int(train.sample(index)[0]) // SEQ_LENGTH, 1000) for index in range(360)]
    for count in range(1, 361):
        seen = Counter(corpus for corpus, _ in order[:count])
        assert all(abs(seen[number] - share * count) <= 1 for number, share in enumerate((0.5, 0.3, 0.2)))
    for number, num_blocks in enumerate((20, 60, 40)):
        blocks = [block for corpus, block in order if corpus == number]
        for start in range(0, len(blocks) - num_blocks + 1, num_blocks):  # each corpus by epochs of its own
            assert sorted(blocks[start : start + num_blocks]) == list(range(num_blocks))


def test_corpora_of_equal_size_are_shuffled_differently(tmp_path):
    train = blend_of(tmp_path, (1.0, 1.0), (40, 40)).train
    order = [train.locate(index) for index in range(80)]
    first, second = ([block for corpus, block in order if corpus == number] for number in (0, 1))
    assert sorted(first) == sorted(second)
    assert first != second


def test_blended_validation_wraps_around(tmp_path):
    valid = blend_of(tmp_path, (3.0, 1.0), (40, 40), split=(0.9, 0.1, 0.0)).valid
    assert valid.num_samples == 8
    seen = [valid.locate(index) for index in range(16)]
    assert [block for corpus, block in seen if corpus == 0] == [36, 37, 38, 39] * 3
    assert [block for corpus, block in seen if corpus == 1] == [36, 37, 38, 39]


def test_errors_of_open_splits(tmp_path):
    def error_of(data: DataConfig, seq_length: int = SEQ_LENGTH) -> str:
        with pytest.raises(DataError) as caught:
            open_splits(data, seq_length=seq_length, vocab_size=100, seed=1)
        return str(caught.value)

    path = write(tmp_path / "a", 30)
    train = (Corpus(path=path),)
    assert error_of(DataConfig()) == (
        "data.train names no corpus: give at least one, such as data.train=[{path: corpora/text}]"
    )
    assert error_of(DataConfig(train=train, split=(0.0, 1.0, 0.0))) == (
        "data.split [0.0, 1.0, 0.0] leaves nothing for training: its first share must be positive"
    )
    assert error_of(DataConfig(train=train), seq_length=29) == (
        f"{path} holds 30 tokens, 1 blocks of sequence length 29, too few for 2 splits: shorten model.seq_length, "
        f"change data.split, or bring more text"
    )
    Path(f"{path}.json").write_text(json.dumps({"format_version": 1, "tokenizer": {"vocab_size": 260}}))
    assert error_of(DataConfig(train=train)) == (
        f"{path} was written with a tokenizer of 260 ids, but model.vocab_size is 100: set model.vocab_size to 260 "
        f"or more"
    )
    Path(f"{path}.json").write_text("{")
    assert error_of(DataConfig(train=train)).startswith(f"{path}.json cannot be read: ")


def test_an_id_beyond_the_vocabulary_is_met_when_read(tmp_path):
    path = write(tmp_path / "a", 5 * SEQ_LENGTH + 1)
    data = DataConfig(train=(Corpus(path=path),), split=(1.0, 0.0, 0.0))
    train = open_splits(data, seq_length=SEQ_LENGTH, vocab_size=40, seed=1).train
    last = blocks_of(open_one(path, split=(1.0, 0.0, 0.0)).train, range(5)).index(4)
    with pytest.raises(DataError, match=r"a\.bin, token 40: id 40 is outside the vocabulary of 40 \(valid: 0 to 39\)"):
        train.sample(last)


def test_a_damaged_corpus_is_refused_when_opened(tmp_path):
    path = write(tmp_path / "a", 100)
    Path(f"{path}.bin").write_bytes(Path(f"{path}.bin").read_bytes()[:-3])
    with pytest.raises(DataError, match=r"a\.bin is truncated: .* ends at byte 397, token 99"):
        open_one(path)
    assert IndexedDataset(write(tmp_path / "b", 100)).num_tokens == 100
